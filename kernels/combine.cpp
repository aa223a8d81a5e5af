// combine, combine_backward: weighted sums of rows and their transposes, in float32 (float64 for
// fp64). combine reads A*width and writes num_out*num_gates*width elements; combine_backward reads
// and writes each of the A rows once per gate and product. Outputs are dealt to threads and each
// sum is formed by one thread in the order of its entries: deterministic for any thread count.
#include "kernels/combine.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/combine_entries.h"
#include "kernels/cuda_launchers.h"
#include "kernels/lanes.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kElementsPerThread = int64_t{1} << 14;
/// Columns summed at a time: their sums stay in the first-level cache.
constexpr int64_t kTile = 512;
/// Rows ahead that are asked for: their order is irregular, so the hardware cannot foresee them.
constexpr int64_t kEntriesAhead = 4;

/// Everything one output needs; `weights` null means 1.
template <typename T>
struct CombineJob {
  const T* rows;
  CombineIndex index;
  const Accumulate<T>* weights;
  int64_t num_gates;
  T* out;
  int64_t width;
};

template <typename T>
struct BackwardJob {
  const T* grad_out;
  const T* rows;
  CombineIndex index;
  const Accumulate<T>* weights;
  int64_t num_gates;
  T* grad_rows;
  Accumulate<T>* grad_weights;
  int64_t width;
};

template <typename Job>
PERSEID_INLINE auto weight_of(const Job& job, int64_t entry, int64_t gate) {
  using A = std::remove_cv_t<std::remove_pointer_t<decltype(job.weights)>>;
  return job.weights == nullptr ? A{1} : job.weights[entry * job.num_gates + gate];
}

// ---- combine ----
/// Four rows at a time keep the sums in registers and several cache misses in flight.
template <typename T>
PERSEID_INLINE void add_entries(const CombineJob<T>& job, EntryRange entries, int64_t last_entry,
                                int64_t gate, int64_t column, int64_t num_columns,
                                Accumulate<T>* sum) {
  using A = Accumulate<T>;
  const auto row = [&](int64_t entry) __attribute__((always_inline)) {
    return job.rows + row_of_entry(job.index, entry) * job.width + column;
  };
  int64_t entry = entries.begin;
  for (; entry + 4 <= entries.end; entry += 4) {
    for (int64_t next = entry + 4; next < std::min(entry + 4 + kEntriesAhead, last_entry); ++next) {
      prefetch_for_read(row(next), num_columns);
    }
    const T *const r0 = row(entry), *const r1 = row(entry + 1), *const r2 = row(entry + 2),
                   *const r3 = row(entry + 3);
    const A w0 = weight_of(job, entry, gate), w1 = weight_of(job, entry + 1, gate),
            w2 = weight_of(job, entry + 2, gate), w3 = weight_of(job, entry + 3, gate);
#pragma omp simd
    for (int64_t i = 0; i < num_columns; ++i) {
      A s = sum[i];
      s += w0 * load(r0 + i);
      s += w1 * load(r1 + i);
      s += w2 * load(r2 + i);
      s += w3 * load(r3 + i);
      sum[i] = s;
    }
  }
  for (; entry < entries.end; ++entry) {
    const T* const r0 = row(entry);
    const A w0 = weight_of(job, entry, gate);
#pragma omp simd
    for (int64_t i = 0; i < num_columns; ++i) sum[i] += w0 * load(r0 + i);
  }
}

/// Two rows of weight 1, what top-2 leaves once weights are in the activation: no tile of sums.
template <typename T>
PERSEID_INLINE void add_two(const T* a, const T* b, int64_t width, T* out) {
  using A = Accumulate<T>;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) store(out + i, A{0} + load(a + i) + load(b + i));
}

template <typename T>
PERSEID_SIMD_CLONES void combine_outputs(const CombineJob<T>& job, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  alignas(64) A sum[kTile];
  const int64_t last_entry = entries_of(job.index, end - 1).end;
  for (int64_t n = begin; n < end; ++n) {
    const EntryRange entries = entries_of(job.index, n);
    if (job.weights == nullptr && entries.end - entries.begin == 2) {
      const auto row = [&](int64_t entry) __attribute__((always_inline)) {
        return job.rows + row_of_entry(job.index, entry) * job.width;
      };
      for (int64_t next = entries.end + 2; next < std::min(entries.end + 4, last_entry); ++next) {
        prefetch_for_read(row(next), job.width);
      }
      add_two(row(entries.begin), row(entries.begin + 1), job.width, job.out + n * job.width);
      continue;
    }
    for (int64_t gate = 0; gate < job.num_gates; ++gate) {
      T* const out = job.out + (n * job.num_gates + gate) * job.width;
      for (int64_t column = 0; column < job.width; column += kTile) {
        const int64_t num_columns = std::min(kTile, job.width - column);
        for (int64_t i = 0; i < num_columns; ++i) sum[i] = A{0};
        add_entries(job, entries, last_entry, gate, column, num_columns, sum);
#pragma omp simd
        for (int64_t i = 0; i < num_columns; ++i) store(out + column + i, sum[i]);
      }
    }
  }
}

// ---- backward ----
template <typename T>
PERSEID_INLINE Accumulate<T> dot(const T* a, const T* b, int64_t width) {
  Accumulate<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += load(a + i) * load(b + i);
  return sum;
}

/// One gate, both gradients: grad_out is read once.
template <typename T>
PERSEID_INLINE Accumulate<T> scale_and_dot(const T* grad, const T* row, Accumulate<T> weight,
                                           int64_t width, T* grad_row) {
  using A = Accumulate<T>;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) {
    const A g = load(grad + i);
    sum += g * load(row + i);
    store(grad_row + i, weight * g);
  }
  return sum;
}

/// grad_row = sum over gates of weights[entry, gate] * grad[gate, :].
template <typename T>
PERSEID_INLINE void sum_gates(const BackwardJob<T>& job, int64_t entry, const T* grad,
                              T* grad_row) {
  using A = Accumulate<T>;
  if (job.num_gates == 1) {
    const A weight = weight_of(job, entry, 0);
#pragma omp simd
    for (int64_t i = 0; i < job.width; ++i) store(grad_row + i, weight * load(grad + i));
    return;
  }
  alignas(64) A sum[kTile];
  for (int64_t column = 0; column < job.width; column += kTile) {
    const int64_t num_columns = std::min(kTile, job.width - column);
    for (int64_t i = 0; i < num_columns; ++i) sum[i] = A{0};
    for (int64_t gate = 0; gate < job.num_gates; ++gate) {
      const A weight = weight_of(job, entry, gate);
      const T* const source = grad + gate * job.width + column;
#pragma omp simd
      for (int64_t i = 0; i < num_columns; ++i) sum[i] += weight * load(source + i);
    }
#pragma omp simd
    for (int64_t i = 0; i < num_columns; ++i) store(grad_row + column + i, sum[i]);
  }
}

template <typename T>
PERSEID_SIMD_CLONES void combine_outputs_backward(const BackwardJob<T>& job, int64_t begin,
                                                  int64_t end) {
  const int64_t last_entry = entries_of(job.index, end - 1).end;
  for (int64_t n = begin; n < end; ++n) {
    const EntryRange entries = entries_of(job.index, n);
    const T* const grad = job.grad_out + n * job.num_gates * job.width;
    for (int64_t entry = entries.begin; entry < entries.end; ++entry) {
      const int64_t at = row_of_entry(job.index, entry) * job.width;
      if (entry + kEntriesAhead < last_entry) {
        const int64_t next = row_of_entry(job.index, entry + kEntriesAhead) * job.width;
        if (job.grad_weights != nullptr) prefetch_for_read(job.rows + next, job.width);
        if (job.grad_rows != nullptr) prefetch_for_write(job.grad_rows + next, job.width);
      }
      if (job.num_gates == 1 && job.grad_rows != nullptr && job.grad_weights != nullptr) {
        job.grad_weights[entry] = scale_and_dot(grad, job.rows + at, weight_of(job, entry, 0),
                                                job.width, job.grad_rows + at);
        continue;
      }
      if (job.grad_rows != nullptr) sum_gates(job, entry, grad, job.grad_rows + at);
      for (int64_t gate = 0; job.grad_weights != nullptr && gate < job.num_gates; ++gate) {
        job.grad_weights[entry * job.num_gates + gate] =
            dot(grad + gate * job.width, job.rows + at, job.width);
      }
    }
  }
}

// ---- checks ----
void check(const char* operation, const CombineIndex& index, const void* weights, int64_t num_gates,
           int64_t num_out, int64_t width, const Stream& stream = {}) {
  require_count(operation, "num_out", num_out);
  require_count(operation, "width", width);
  require_count(operation, "fixed", index.fixed);
  require(num_gates >= 1, operation, "num_gates", num_gates, "is below 1; choose 1 or more");
  if (weights != nullptr || num_gates == 1) return;
  // Weights of no entries may be null: that is what an empty tensor holds. Offsets of a device stay
  // unread.
  const bool is_readable = index.offsets == nullptr || stream.device == Device::kCpu;
  const bool has_entries = num_out > 0 && is_readable && entries_of(index, num_out - 1).end > 0;
  require(!has_entries, operation, "num_gates", num_gates,
          "differs from 1, but weights=null; pass weights or choose 1");
}

/// Rows of `width` a thread should have at least; with offsets the entries per output are unknown.
int64_t outputs_per_thread(const CombineIndex& index, int64_t num_gates, int64_t width) {
  const int64_t entries = index.offsets == nullptr ? std::max<int64_t>(index.fixed, 1) : 2;
  return ceil_div(kElementsPerThread, std::max<int64_t>(1, entries * num_gates * width));
}

}  // namespace

void combine(const void* rows, const CombineIndex& index, const void* weights, int64_t num_gates,
             void* out, int64_t num_out, int64_t width, DType dtype, Stream stream) {
  check("combine", index, weights, num_gates, num_out, width, stream);
  require_buffer("combine", "out", out, num_out * num_gates * width);
  if (stream.device == Device::kCuda) {
    return cuda::combine(rows, index, weights, num_gates, out, num_out, width, dtype, stream);
  }
  dispatch_dtype(dtype, "combine", [&](auto element) {
    using T = decltype(element);
    const CombineJob<T> job{
        static_cast<const T*>(rows), index, static_cast<const Accumulate<T>*>(weights), num_gates,
        static_cast<T*>(out),        width};
    parallel_for(0, num_out, outputs_per_thread(index, num_gates, width),
                 [&](int64_t begin, int64_t end) { combine_outputs(job, begin, end); });
  });
}

void combine_reference(const void* rows, const CombineIndex& index, const void* weights,
                       int64_t num_gates, void* out, int64_t num_out, int64_t width, DType dtype) {
  check("combine", index, weights, num_gates, num_out, width);
  dispatch_dtype(dtype, "combine", [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    for (int64_t n = 0; n < num_out; ++n) {
      const EntryRange entries = entries_of(index, n);
      for (int64_t gate = 0; gate < num_gates; ++gate) {
        for (int64_t i = 0; i < width; ++i) {
          double sum = 0;
          for (int64_t entry = entries.begin; entry < entries.end; ++entry) {
            const double weight =
                weights == nullptr ? 1.0 : static_cast<const A*>(weights)[entry * num_gates + gate];
            sum +=
                weight * load(static_cast<const T*>(rows) + row_of_entry(index, entry) * width + i);
          }
          store(static_cast<T*>(out) + (n * num_gates + gate) * width + i, static_cast<A>(sum));
        }
      }
    }
  });
}

void combine_backward(const void* grad_out, const void* rows, const CombineIndex& index,
                      const void* weights, int64_t num_gates, void* grad_rows, void* grad_weights,
                      int64_t num_out, int64_t width, DType dtype, Stream stream) {
  constexpr const char* kOperation = "combine_backward";
  check(kOperation, index, weights, num_gates, num_out, width, stream);
  require_buffer(kOperation, "grad_out", grad_out, num_out * num_gates * width);
  if (stream.device == Device::kCuda) {
    return cuda::combine_backward(grad_out, rows, index, weights, num_gates, grad_rows,
                                  grad_weights, num_out, width, dtype, stream);
  }
  dispatch_dtype(dtype, kOperation, [&](auto element) {
    using T = decltype(element);
    const BackwardJob<T> job{static_cast<const T*>(grad_out),
                             static_cast<const T*>(rows),
                             index,
                             static_cast<const Accumulate<T>*>(weights),
                             num_gates,
                             static_cast<T*>(grad_rows),
                             static_cast<Accumulate<T>*>(grad_weights),
                             width};
    parallel_for(0, num_out, outputs_per_thread(index, num_gates, width),
                 [&](int64_t begin, int64_t end) { combine_outputs_backward(job, begin, end); });
  });
}

void combine_backward_reference(const void* grad_out, const void* rows, const CombineIndex& index,
                                const void* weights, int64_t num_gates, void* grad_rows,
                                void* grad_weights, int64_t num_out, int64_t width, DType dtype) {
  check("combine_backward", index, weights, num_gates, num_out, width);
  dispatch_dtype(dtype, "combine_backward", [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    for (int64_t n = 0; n < num_out; ++n) {
      const T* const grad = static_cast<const T*>(grad_out) + n * num_gates * width;
      const EntryRange entries = entries_of(index, n);
      for (int64_t entry = entries.begin; entry < entries.end; ++entry) {
        const int64_t at = row_of_entry(index, entry) * width;
        for (int64_t i = 0; grad_rows != nullptr && i < width; ++i) {
          double sum = 0;
          for (int64_t gate = 0; gate < num_gates; ++gate) {
            const double weight =
                weights == nullptr ? 1.0 : static_cast<const A*>(weights)[entry * num_gates + gate];
            sum += weight * load(grad + gate * width + i);
          }
          store(static_cast<T*>(grad_rows) + at + i, static_cast<A>(sum));
        }
        for (int64_t gate = 0; grad_weights != nullptr && gate < num_gates; ++gate) {
          double sum = 0;
          for (int64_t i = 0; i < width; ++i) {
            sum += static_cast<double>(load(grad + gate * width + i)) *
                   load(static_cast<const T*>(rows) + at + i);
          }
          static_cast<A*>(grad_weights)[entry * num_gates + gate] = static_cast<A>(sum);
        }
      }
    }
  });
}

}  // namespace perseid::kernels
