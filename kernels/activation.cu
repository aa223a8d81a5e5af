// activation_forward, activation_backward: one pass over rows, arithmetic in float32 (float64 for
// fp64), 16 bytes an access where width and pointers allow. One warp a row, four warps a wide one.
// Forward reads num_rows * (gated ? 2F : F) elements and writes num_rows * F; backward reads F more
// per row and writes up to 3F. A row's dot product is summed by one fixed tree: deterministic.
// Bound by memory. weighted_act may be grad_act: a thread reads an element before it writes it.
#include "kernels/activation_point.h"
#include "kernels/cuda_launchers.h"
#include "kernels/prim.cuh"
#include "kernels/vector.cuh"

namespace perseid::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
/// Rows of more accesses take all warps of a block.
constexpr int64_t kUnitsOfWarp = 4 * kWarpSize;

/// Widths are in accesses of kCount elements.
template <typename T, int kCount>
struct ForwardJob {
  const Pack<T, kCount>* pre;
  const Accumulate<T>* weights;
  Pack<T, kCount>* out;
  int64_t num_rows;
  int64_t units;
  int row_warps;  ///< 1 or kWarps
  bool gated;
};

template <typename T, int kCount>
struct BackwardJob {
  const Pack<T, kCount>* pre;
  const Accumulate<T>* weights;
  const Pack<T, kCount>* grad_act;
  Pack<T, kCount>* grad_pre;
  Pack<T, kCount>* weighted_act;
  Accumulate<T>* grad_weights;
  int64_t num_rows;
  int64_t units;
  int row_warps;
  bool gated;
};

/// Row of a thread, and its place among the threads of the row.
struct Place {
  int64_t row;
  int thread;
  int threads;
};
template <typename Job>
__device__ Place place_in(const Job& job) {
  const int threads = job.row_warps * kWarpSize, thread = static_cast<int>(threadIdx.x);
  return {int64_t{blockIdx.x} * (kThreads / threads) + thread / threads, thread % threads, threads};
}

template <typename Job>
PERSEID_INLINE auto weight_of(const Job& job, int64_t row) {
  using A = std::remove_cv_t<std::remove_pointer_t<decltype(job.weights)>>;
  return job.weights == nullptr ? A{1} : job.weights[row];
}

/// `up` of a plain expert is 1, which changes no bit of a product.
template <typename T, int kCount>
PERSEID_INLINE void read_up(const Pack<T, kCount>* up, bool gated,
                            Accumulate<T> (&values)[kCount]) {
  for (int i = 0; i < kCount; ++i) values[i] = 1;
  if (!gated) return;
  const Pack<T, kCount> pack = *up;
  for (int i = 0; i < kCount; ++i) values[i] = load(&pack.values[i]);
}

// ---- kernels -----------------------------------------------------------------------------------
/// Registers: 40.
template <Activation kActivation, typename T, int kCount>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardJob<T, kCount> job) {
  const Place at = place_in(job);
  if (at.row >= job.num_rows) return;
  const Pack<T, kCount>* const pre = job.pre + at.row * (job.gated ? 2 : 1) * job.units;
  const Accumulate<T> weight = weight_of(job, at.row);
  for (int64_t unit = at.thread; unit < job.units; unit += at.threads) {
    const Pack<T, kCount> gate = pre[unit];
    Accumulate<T> up[kCount];
    read_up(pre + job.units + unit, job.gated, up);
    Pack<T, kCount> out;
    for (int i = 0; i < kCount; ++i) {
      store(&out.values[i], weight * (evaluate<kActivation>(load(&gate.values[i])).value * up[i]));
    }
    job.out[at.row * job.units + unit] = out;
  }
}

/// Registers: 64. Shared: 32. No thread leaves early: the rows of a block meet at its barrier.
template <Activation kActivation, typename T, int kCount>
__global__ void __launch_bounds__(kThreads) backward_kernel(const BackwardJob<T, kCount> job) {
  using A = Accumulate<T>;
  using Reduce = prim::WarpReduce<A>;
  __shared__ typename Reduce::TempStorage storage[kWarps];
  __shared__ A sums[kWarps];
  const Place at = place_in(job);
  const bool is_row = at.row < job.num_rows;
  A sum = 0;
  if (is_row) {
    const int64_t pre_row = at.row * (job.gated ? 2 : 1) * job.units, row = at.row * job.units;
    const A weight = weight_of(job, at.row);
    for (int64_t unit = at.thread; unit < job.units; unit += at.threads) {
      const Pack<T, kCount> gate = job.pre[pre_row + unit];
      const Pack<T, kCount> grad = job.grad_act[row + unit];
      A up[kCount];
      read_up(job.pre + pre_row + job.units + unit, job.gated, up);
      Pack<T, kCount> grad_gate, grad_up, weighted;
      for (int i = 0; i < kCount; ++i) {
        const Point<A> f = evaluate<kActivation>(load(&gate.values[i]));
        const A g = load(&grad.values[i]), scaled = weight * g, act = f.value * up[i];
        sum += g * act;
        store(&grad_gate.values[i], scaled * up[i] * f.slope);
        store(&grad_up.values[i], scaled * f.value);
        store(&weighted.values[i], weight * act);
      }
      if (job.grad_pre != nullptr) {
        job.grad_pre[pre_row + unit] = grad_gate;
        if (job.gated) job.grad_pre[pre_row + job.units + unit] = grad_up;
      }
      if (job.weighted_act != nullptr) job.weighted_act[row + unit] = weighted;
    }
  }
  if (job.grad_weights == nullptr) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  A total = Reduce(storage[warp]).Sum(sum);
  if (job.row_warps > 1) {
    if (threadIdx.x % kWarpSize == 0) sums[warp] = total;
    __syncthreads();
    total = sums[0];
    for (int i = 1; i < kWarps; ++i) total += sums[i];
  }
  if (is_row && at.thread == 0) job.grad_weights[at.row] = total;
}

// ---- launch ------------------------------------------------------------------------------------
/// Calls body(ActivationTag<...>{}).
template <typename Body>
void dispatch_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kIdentity:
      return body(ActivationTag<Activation::kIdentity>{});
    case Activation::kRelu:
      return body(ActivationTag<Activation::kRelu>{});
    case Activation::kGelu:
      return body(ActivationTag<Activation::kGelu>{});
    case Activation::kSilu:
      return body(ActivationTag<Activation::kSilu>{});
  }
}

/// As dispatch_pack. float64, there for gradient tests, takes one element at a time: its
/// exponentials need the registers.
template <typename T, typename Body>
void dispatch_access(int64_t width, std::initializer_list<const void*> addresses, Body&& body) {
  if constexpr (std::is_same_v<T, double>) {
    body(std::integral_constant<int, 1>{});
  } else {
    dispatch_pack<T>(width, addresses, body);
  }
}

int row_warps(int64_t units) { return units > kUnitsOfWarp ? kWarps : 1; }
int64_t num_blocks(int64_t num_rows, int warps) { return ceil_div(num_rows, kWarps / warps); }

}  // namespace

void cuda::activation_forward(const ActivationShape& shape, DType dtype, const void* pre,
                              const void* weights, void* out, const Stream& stream) {
  constexpr const char* kOperation = "activation_forward";
  if (shape.d_ff == 0) return;
  dispatch_dtype(dtype, kOperation, [&](auto element) {
    using T = decltype(element);
    dispatch_access<T>(shape.d_ff, {pre, out}, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      using Unit = Pack<T, kCount>;
      const int64_t units = shape.d_ff / kCount;
      const ForwardJob<T, kCount> job{static_cast<const Unit*>(pre),
                                      static_cast<const Accumulate<T>*>(weights),
                                      static_cast<Unit*>(out),
                                      shape.num_rows,
                                      units,
                                      row_warps(units),
                                      shape.gated};
      dispatch_activation(shape.activation, [&](auto tag) {
        launch(kOperation, &forward_kernel<decltype(tag)::value, T, kCount>,
               num_blocks(shape.num_rows, job.row_warps), kThreads, stream, job);
      });
    });
  });
}

void cuda::activation_backward(const ActivationShape& shape, DType dtype, const void* pre,
                               const void* weights, const void* grad_act, void* grad_pre,
                               void* weighted_act, void* grad_weights, const Stream& stream) {
  constexpr const char* kOperation = "activation_backward";
  dispatch_dtype(dtype, kOperation, [&](auto element) {
    using T = decltype(element);
    dispatch_access<T>(shape.d_ff, {pre, grad_act, grad_pre, weighted_act}, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      using Unit = Pack<T, kCount>;
      const int64_t units = shape.d_ff / kCount;
      const BackwardJob<T, kCount> job{static_cast<const Unit*>(pre),
                                       static_cast<const Accumulate<T>*>(weights),
                                       static_cast<const Unit*>(grad_act),
                                       static_cast<Unit*>(grad_pre),
                                       static_cast<Unit*>(weighted_act),
                                       static_cast<Accumulate<T>*>(grad_weights),
                                       shape.num_rows,
                                       units,
                                       row_warps(units),
                                       shape.gated};
      dispatch_activation(shape.activation, [&](auto tag) {
        launch(kOperation, &backward_kernel<decltype(tag)::value, T, kCount>,
               num_blocks(shape.num_rows, job.row_warps), kThreads, stream, job);
      });
    });
  });
}

}  // namespace perseid::kernels
