// A row of the result stays in the first-level cache while rows of b are added to it. The
// transposed product takes a cache line of columns at a time, so that it reads a only once.
#include "kernels/sparse_product.h"

#include <algorithm>
#include <atomic>

#include "kernels/checks.h"
#include "kernels/dense_row.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kColumnsPerTask = 16;
constexpr int64_t kValuesPerThread = int64_t{1} << 15;

void check(const char* operation, const void* a, const void* b, int64_t M, int64_t N, int64_t D,
           const void* out, int64_t rows_of_b, int64_t rows_of_out) {
  require_count(operation, "M", M);
  require_count(operation, "N", N);
  require_count(operation, "D", D);
  require_buffer(operation, "a", a, M * N);
  require_buffer(operation, "b", b, rows_of_b * D);
  require_buffer(operation, "out", out, rows_of_out * D);
}

template <typename T>
PERSEID_SIMD_CLONES void product_rows(const T* a, const T* b, int64_t begin, int64_t end, int64_t N,
                                      int64_t D, T* out) {
  for (int64_t m = begin; m < end; ++m) {
    std::fill_n(out + m * D, D, T{0});
    for (int64_t n = 0; n < N; ++n) {
      const T scale = a[m * N + n];
      if (scale != T{0}) add_scaled(scale, b + n * D, D, out + m * D);
    }
  }
}

template <typename T>
PERSEID_SIMD_CLONES void product_columns(const T* a, const T* b, int64_t begin, int64_t end,
                                         int64_t M, int64_t N, int64_t D, T* out) {
  std::fill(out + begin * D, out + end * D, T{0});
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = begin; n < end; ++n) {
      const T scale = a[m * N + n];
      if (scale != T{0}) add_scaled(scale, b + m * D, D, out + n * D);
    }
  }
}

template <typename T>
PERSEID_SIMD_CLONES int64_t count_range(const T* values, int64_t begin, int64_t end) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = begin; i < end; ++i) count += values[i] != T{0} ? 1 : 0;
  return count;
}

/// out[i, :] = sum over j of a(i, j) b[j, :] by plain loops in double.
template <typename T, typename Entry>
void reference(const Entry& a, const T* b, int64_t rows, int64_t columns, int64_t D, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0;
      for (int64_t j = 0; j < columns; ++j) {
        const auto scale = static_cast<double>(a(i, j));
        if (scale != 0) sum += scale * static_cast<double>(b[j * D + d]);
      }
      out[i * D + d] = static_cast<T>(sum);
    }
  }
}

constexpr const char* kOnCuda = "use LibTorch's dense products there, or give it CPU memory";

}  // namespace

int64_t count_nonzero(const void* values, int64_t count, DType dtype, Stream stream) {
  constexpr const char* kOperation = "count_nonzero";
  require_device(stream, kOperation, kOnCuda);
  require_count(kOperation, "count", count);
  require_buffer(kOperation, "values", values, count);
  std::atomic<int64_t> total = 0;
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    parallel_for(0, count, kValuesPerThread, [&](int64_t begin, int64_t end) {
      total += count_range(static_cast<const decltype(tag)*>(values), begin, end);
    });
  });
  return total;
}

void sparse_product(const void* a, const void* b, int64_t M, int64_t N, int64_t D, DType dtype,
                    void* out, Stream stream) {
  constexpr const char* kOperation = "sparse_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, a, b, M, N, D, out, N, M);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const int64_t grain = ceil_div(kValuesPerThread, std::max<int64_t>(N + D, 1));
    parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
      product_rows(static_cast<const T*>(a), static_cast<const T*>(b), begin, end, N, D,
                   static_cast<T*>(out));
    });
  });
}

void sparse_transposed_product(const void* a, const void* b, int64_t M, int64_t N, int64_t D,
                               DType dtype, void* out, Stream stream) {
  constexpr const char* kOperation = "sparse_transposed_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, a, b, M, N, D, out, M, N);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    parallel_tasks(ceil_div(N, kColumnsPerTask), [&](int64_t task) {
      const int64_t begin = task * kColumnsPerTask;
      product_columns(static_cast<const T*>(a), static_cast<const T*>(b), begin,
                      std::min(begin + kColumnsPerTask, N), M, N, D, static_cast<T*>(out));
    });
  });
}

void sparse_product_reference(const void* a, const void* b, int64_t M, int64_t N, int64_t D,
                              DType dtype, void* out) {
  check("sparse_product", a, b, M, N, D, out, N, M);
  dispatch_float_dtype(dtype, "sparse_product", [&](auto tag) {
    using T = decltype(tag);
    const auto entry = [&](int64_t m, int64_t n) { return static_cast<const T*>(a)[m * N + n]; };
    reference(entry, static_cast<const T*>(b), M, N, D, static_cast<T*>(out));
  });
}

void sparse_transposed_product_reference(const void* a, const void* b, int64_t M, int64_t N,
                                         int64_t D, DType dtype, void* out) {
  check("sparse_transposed_product", a, b, M, N, D, out, M, N);
  dispatch_float_dtype(dtype, "sparse_transposed_product", [&](auto tag) {
    using T = decltype(tag);
    const auto entry = [&](int64_t n, int64_t m) { return static_cast<const T*>(a)[m * N + n]; };
    reference(entry, static_cast<const T*>(b), N, M, D, static_cast<T*>(out));
  });
}

}  // namespace perseid::kernels
