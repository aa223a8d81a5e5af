// Rows of D are what vector instructions work on: for each active element one row is scaled and
// added to another, or two are multiplied. Reads the mask, one row of D for each active element,
// and writes the result. A thread owns rows of the result, of the transposed product a range of
// them, which takes its bits out of each row of the mask.
#include "kernels/masked_product.h"

#include <algorithm>

#include "kernels/checks.h"
#include "kernels/dense_row.h"
#include "kernels/mask_bits.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kValuesPerThread = int64_t{1} << 15;
constexpr int64_t kColumnsPerTask = 256;
constexpr const char* kOnCuda = "use LibTorch's dense products there, or give it CPU memory";

void check(const char* operation, const void* matrix, const uint64_t* is_active,
           const void* of_rows, const void* of_columns, int64_t M, int64_t N, int64_t D) {
  require_count(operation, "M", M);
  require_count(operation, "N", N);
  require_count(operation, "D", D);
  require_buffer(operation, "matrix", matrix, M * N);
  require_buffer(operation, "is_active", is_active, M * N);
  require_buffer(operation, "rows of M", of_rows, M * D);
  require_buffer(operation, "rows of N", of_columns, N * D);
}

template <typename T>
PERSEID_SIMD_CLONES void product_rows(const T* weight, const uint64_t* is_active, const T* x,
                                      int64_t begin, int64_t end, int64_t N, int64_t D, T* out) {
  std::fill(out + begin * D, out + end * D, T{0});
  for (int64_t m = begin; m < end; ++m) {
    for_each_set(is_active, m * N, (m + 1) * N,
                 [&](int64_t i) { add_scaled(weight[i], x + (i - m * N) * D, D, out + m * D); });
  }
}

template <typename T>
PERSEID_SIMD_CLONES void product_columns(const T* weight, const uint64_t* is_active, const T* delta,
                                         int64_t begin, int64_t end, int64_t M, int64_t N,
                                         int64_t D, T* grad_x) {
  std::fill(grad_x + begin * D, grad_x + end * D, T{0});
  for (int64_t m = 0; m < M; ++m) {
    for_each_set(is_active, m * N + begin, m * N + end, [&](int64_t i) {
      add_scaled(weight[i], delta + m * D, D, grad_x + (i - m * N) * D);
    });
  }
}

template <typename T>
PERSEID_SIMD_CLONES void outer_rows(const T* delta, const T* x, const uint64_t* is_active,
                                    int64_t begin, int64_t end, int64_t N, int64_t D,
                                    T* grad_weight) {
  std::fill(grad_weight + begin * N, grad_weight + end * N, T{0});
  for (int64_t m = begin; m < end; ++m) {
    for_each_set(is_active, m * N, (m + 1) * N,
                 [&](int64_t i) { grad_weight[i] = dot(delta + m * D, x + (i - m * N) * D, D); });
  }
}

bool is_set(const uint64_t* bits, int64_t i) { return (bits[i / 64] >> (i % 64) & 1) != 0; }

}  // namespace

void masked_product(const void* weight, const uint64_t* is_active, const void* x, int64_t M,
                    int64_t N, int64_t D, DType dtype, void* out, Stream stream) {
  constexpr const char* kOperation = "masked_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, weight, is_active, out, x, M, N, D);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const int64_t grain = ceil_div(kValuesPerThread, std::max<int64_t>(N + D, 1));
    parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
      product_rows(static_cast<const T*>(weight), is_active, static_cast<const T*>(x), begin, end,
                   N, D, static_cast<T*>(out));
    });
  });
}

void masked_transposed_product(const void* weight, const uint64_t* is_active, const void* delta,
                               int64_t M, int64_t N, int64_t D, DType dtype, void* grad_x,
                               Stream stream) {
  constexpr const char* kOperation = "masked_transposed_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, weight, is_active, delta, grad_x, M, N, D);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    parallel_tasks(ceil_div(N, kColumnsPerTask), [&](int64_t task) {
      const int64_t begin = task * kColumnsPerTask;
      product_columns(static_cast<const T*>(weight), is_active, static_cast<const T*>(delta), begin,
                      std::min(begin + kColumnsPerTask, N), M, N, D, static_cast<T*>(grad_x));
    });
  });
}

void masked_outer_product(const void* delta, const void* x, const uint64_t* is_active, int64_t M,
                          int64_t N, int64_t D, DType dtype, void* grad_weight, Stream stream) {
  constexpr const char* kOperation = "masked_outer_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, grad_weight, is_active, delta, x, M, N, D);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const int64_t grain = ceil_div(kValuesPerThread, std::max<int64_t>(N, 1));
    parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
      outer_rows(static_cast<const T*>(delta), static_cast<const T*>(x), is_active, begin, end, N,
                 D, static_cast<T*>(grad_weight));
    });
  });
}

void masked_product_reference(const void* weight, const uint64_t* is_active, const void* x,
                              int64_t M, int64_t N, int64_t D, DType dtype, void* out) {
  check("masked_product", weight, is_active, out, x, M, N, D);
  dispatch_float_dtype(dtype, "masked_product", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t n = 0; n < N; ++n) {
          if (!is_set(is_active, m * N + n)) continue;
          sum += double{static_cast<const T*>(weight)[m * N + n]} *
                 double{static_cast<const T*>(x)[n * D + d]};
        }
        static_cast<T*>(out)[m * D + d] = static_cast<T>(sum);
      }
    }
  });
}

void masked_transposed_product_reference(const void* weight, const uint64_t* is_active,
                                         const void* delta, int64_t M, int64_t N, int64_t D,
                                         DType dtype, void* grad_x) {
  check("masked_transposed_product", weight, is_active, delta, grad_x, M, N, D);
  dispatch_float_dtype(dtype, "masked_transposed_product", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t m = 0; m < M; ++m) {
          if (!is_set(is_active, m * N + n)) continue;
          sum += double{static_cast<const T*>(weight)[m * N + n]} *
                 double{static_cast<const T*>(delta)[m * D + d]};
        }
        static_cast<T*>(grad_x)[n * D + d] = static_cast<T>(sum);
      }
    }
  });
}

void masked_outer_product_reference(const void* delta, const void* x, const uint64_t* is_active,
                                    int64_t M, int64_t N, int64_t D, DType dtype,
                                    void* grad_weight) {
  check("masked_outer_product", grad_weight, is_active, delta, x, M, N, D);
  dispatch_float_dtype(dtype, "masked_outer_product", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = 0; i < M * N; ++i) {
      double sum = 0;
      for (int64_t d = 0; d < D; ++d) {
        sum += double{static_cast<const T*>(delta)[i / N * D + d]} *
               double{static_cast<const T*>(x)[i % N * D + d]};
      }
      static_cast<T*>(grad_weight)[i] = is_set(is_active, i) ? static_cast<T>(sum) : T{0};
    }
  });
}

}  // namespace perseid::kernels
