// combine, combine_backward: weighted sums of rows and their transposes, float32 sums (float64 for
// fp64) in the order of the entries, 16 bytes an access where width and pointers allow. combine: a
// group of up to 128 threads an output, each thread some columns, four rows in flight; reads A *
// width + A * num_gates, writes num_out * num_gates * width elements. combine_backward: one warp an
// entry, which reads the gradient and the row once and forms the dot product by one fixed tree;
// with several gates, two launches. No atomics: deterministic. Bound by memory; the rows of one
// output are read again for each further gate, then from the first-level cache.
#include "kernels/combine_entries.h"
#include "kernels/cuda_launchers.h"
#include "kernels/prim.cuh"
#include "kernels/vector.cuh"

namespace perseid::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
/// Rows that a thread reads at a time.
constexpr int kRowsAtOnce = 4;

/// Counts are in accesses of kCount elements.
template <typename T, int kCount>
struct CombineJob {
  const Pack<T, kCount>* rows;
  CombineIndex index;
  const Accumulate<T>* weights;
  int64_t num_gates;
  Pack<T, kCount>* out;
  int64_t num_out;
  int64_t units;
  int group_threads;  ///< a power of two, at most kThreads
};

template <typename T, int kCount>
struct BackwardJob {
  const Pack<T, kCount>* grad_out;
  const Pack<T, kCount>* rows;
  CombineIndex index;
  const Accumulate<T>* weights;
  int64_t num_gates;
  Pack<T, kCount>* grad_rows;
  Accumulate<T>* grad_weights;
  int64_t num_out;
  int64_t units;
};

template <typename Job>
PERSEID_INLINE auto weight_of(const Job& job, int64_t entry, int64_t gate) {
  using A = std::remove_cv_t<std::remove_pointer_t<decltype(job.weights)>>;
  return job.weights == nullptr ? A{1} : job.weights[entry * job.num_gates + gate];
}

// ---- combine -----------------------------------------------------------------------------------
/// Sum of the entries' rows at one access of columns.
template <typename T, int kCount>
PERSEID_INLINE void sum_entries(const CombineJob<T, kCount>& job, EntryRange entries, int64_t gate,
                                int64_t unit, Accumulate<T> (&sum)[kCount]) {
  int64_t entry = entries.begin;
  for (; entry + kRowsAtOnce <= entries.end; entry += kRowsAtOnce) {
    Pack<T, kCount> row[kRowsAtOnce];
    Accumulate<T> weight[kRowsAtOnce];
    for (int j = 0; j < kRowsAtOnce; ++j) {
      row[j] = job.rows[row_of_entry(job.index, entry + j) * job.units + unit];
      weight[j] = weight_of(job, entry + j, gate);
    }
    for (int j = 0; j < kRowsAtOnce; ++j) {
      for (int i = 0; i < kCount; ++i) sum[i] += weight[j] * load(&row[j].values[i]);
    }
  }
  for (; entry < entries.end; ++entry) {
    const Pack<T, kCount> row = job.rows[row_of_entry(job.index, entry) * job.units + unit];
    const Accumulate<T> weight = weight_of(job, entry, gate);
    for (int i = 0; i < kCount; ++i) sum[i] += weight * load(&row.values[i]);
  }
}

/// Registers: 64.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineJob<T, kCount> job) {
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t n =
      int64_t{blockIdx.x} * (kThreads / job.group_threads) + thread / job.group_threads;
  if (n >= job.num_out) return;
  const EntryRange entries = entries_of(job.index, n);
  for (int64_t unit = thread % job.group_threads; unit < job.units; unit += job.group_threads) {
    for (int64_t gate = 0; gate < job.num_gates; ++gate) {
      Accumulate<T> sum[kCount] = {};
      sum_entries(job, entries, gate, unit, sum);
      Pack<T, kCount> out;
      for (int i = 0; i < kCount; ++i) store(&out.values[i], sum[i]);
      job.out[(n * job.num_gates + gate) * job.units + unit] = out;
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------
/// One gate and whichever gradients are wanted. Returns this lane's part of <grad, row>.
template <typename T, int kCount>
PERSEID_INLINE Accumulate<T> scale_and_dot(const BackwardJob<T, kCount>& job,
                                           const Pack<T, kCount>* grad, int64_t row,
                                           Accumulate<T> weight, int lane) {
  Accumulate<T> sum = 0;
  for (int64_t unit = lane; unit < job.units; unit += kWarpSize) {
    const Pack<T, kCount> g = grad[unit];
    if (job.grad_weights != nullptr) {
      const Pack<T, kCount> x = job.rows[row * job.units + unit];
      for (int i = 0; i < kCount; ++i) sum += load(&g.values[i]) * load(&x.values[i]);
    }
    if (job.grad_rows != nullptr) {
      Pack<T, kCount> out;
      for (int i = 0; i < kCount; ++i) store(&out.values[i], weight * load(&g.values[i]));
      job.grad_rows[row * job.units + unit] = out;
    }
  }
  return sum;
}

/// grad_rows of one entry: the sum over the gates.
template <typename T, int kCount>
__device__ __forceinline__ void sum_gates(const BackwardJob<T, kCount>& job,
                                          const Pack<T, kCount>* grad, int64_t entry, int64_t row,
                                          int lane) {
  for (int64_t unit = lane; unit < job.units; unit += kWarpSize) {
    Accumulate<T> sum[kCount] = {};
#pragma unroll 2  // by four float16 spills
    for (int64_t gate = 0; gate < job.num_gates; ++gate) {
      const Pack<T, kCount> g = grad[gate * job.units + unit];
      const Accumulate<T> weight = weight_of(job, entry, gate);
      for (int i = 0; i < kCount; ++i) sum[i] += weight * load(&g.values[i]);
    }
    Pack<T, kCount> out;
    for (int i = 0; i < kCount; ++i) store(&out.values[i], sum[i]);
    job.grad_rows[row * job.units + unit] = out;
  }
}

/// This lane's part of <grad of a gate, row>.
template <typename T, int kCount>
PERSEID_INLINE Accumulate<T> dot(const Pack<T, kCount>* a, const Pack<T, kCount>* b, int64_t units,
                                 int lane) {
  Accumulate<T> sum = 0;
  for (int64_t unit = lane; unit < units; unit += kWarpSize) {
    const Pack<T, kCount> x = a[unit], y = b[unit];
    for (int i = 0; i < kCount; ++i) sum += load(&x.values[i]) * load(&y.values[i]);
  }
  return sum;
}

/// One gate has both gradients in one pass; several take a launch for each.
enum class Part { kOneGate, kRows, kWeights };

/// Registers: 64. Without offsets a warp has one entry, with them a block has one output.
template <typename T, int kCount, Part kPart>
__global__ void __launch_bounds__(kThreads) backward_kernel(const BackwardJob<T, kCount> job) {
  using A = Accumulate<T>;
  using Reduce = prim::WarpReduce<A>;
  __shared__ typename Reduce::TempStorage storage[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  EntryRange entries;
  int64_t n = blockIdx.x;
  if (job.index.offsets != nullptr) {
    entries = entries_of(job.index, n);
    entries.begin += warp;
  } else {
    const int64_t entry = int64_t{blockIdx.x} * kWarps + warp;
    if (entry >= job.num_out * job.index.fixed) return;
    n = entry / job.index.fixed;
    entries = {entry, entry + 1};
  }
  const Pack<T, kCount>* const grad = job.grad_out + n * job.num_gates * job.units;
  for (int64_t entry = entries.begin; entry < entries.end; entry += kWarps) {
    const int64_t row = row_of_entry(job.index, entry);
    if constexpr (kPart == Part::kRows) {
      sum_gates(job, grad, entry, row, lane);
    } else if constexpr (kPart == Part::kOneGate) {
      const A part = scale_and_dot(job, grad, row, weight_of(job, entry, 0), lane);
      if (job.grad_weights == nullptr) continue;
      const A sum = Reduce(storage[warp]).Sum(part);
      if (lane == 0) job.grad_weights[entry] = sum;
    } else {
      for (int64_t gate = 0; gate < job.num_gates; ++gate) {
        const A part = dot(grad + gate * job.units, job.rows + row * job.units, job.units, lane);
        const A sum = Reduce(storage[warp]).Sum(part);
        if (lane == 0) job.grad_weights[entry * job.num_gates + gate] = sum;
      }
    }
  }
}

// ---- launch ------------------------------------------------------------------------------------
int group_threads(int64_t units) {
  int threads = 1;
  while (threads < kThreads && threads < units) threads *= 2;
  return threads;
}

}  // namespace

void cuda::combine(const void* rows, const CombineIndex& index, const void* weights,
                   int64_t num_gates, void* out, int64_t num_out, int64_t width, DType dtype,
                   const Stream& stream) {
  dispatch_dtype(dtype, "combine", [&](auto element) {
    using T = decltype(element);
    if (width == 0) return;
    dispatch_pack<T>(width, {rows, out}, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      using Unit = Pack<T, kCount>;
      const int64_t units = width / kCount;
      const int threads = group_threads(units);
      const CombineJob<T, kCount> job{static_cast<const Unit*>(rows),
                                      index,
                                      static_cast<const Accumulate<T>*>(weights),
                                      num_gates,
                                      static_cast<Unit*>(out),
                                      num_out,
                                      units,
                                      threads};
      launch("combine", &combine_kernel<T, kCount>, ceil_div(num_out, kThreads / threads), kThreads,
             stream, job);
    });
  });
}

void cuda::combine_backward(const void* grad_out, const void* rows, const CombineIndex& index,
                            const void* weights, int64_t num_gates, void* grad_rows,
                            void* grad_weights, int64_t num_out, int64_t width, DType dtype,
                            const Stream& stream) {
  constexpr const char* kOperation = "combine_backward";
  const int64_t blocks =
      index.offsets == nullptr ? ceil_div(num_out * index.fixed, kWarps) : num_out;
  dispatch_dtype(dtype, kOperation, [&](auto element) {
    using T = decltype(element);
    const void* const read_rows = grad_weights == nullptr ? nullptr : rows;
    dispatch_pack<T>(width, {grad_out, read_rows, grad_rows}, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      using Unit = Pack<T, kCount>;
      const BackwardJob<T, kCount> job{static_cast<const Unit*>(grad_out),
                                       static_cast<const Unit*>(read_rows),
                                       index,
                                       static_cast<const Accumulate<T>*>(weights),
                                       num_gates,
                                       static_cast<Unit*>(grad_rows),
                                       static_cast<Accumulate<T>*>(grad_weights),
                                       num_out,
                                       width / kCount};
      const auto launch_part = [&](auto* kernel) {
        launch(kOperation, kernel, blocks, kThreads, stream, job);
      };
      if (num_gates == 1) return launch_part(&backward_kernel<T, kCount, Part::kOneGate>);
      if (grad_rows != nullptr) launch_part(&backward_kernel<T, kCount, Part::kRows>);
      if (grad_weights != nullptr) launch_part(&backward_kernel<T, kCount, Part::kWeights>);
    });
  });
}

}  // namespace perseid::kernels
