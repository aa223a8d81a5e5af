// Forward: up to four vectors of a row of the result stay in registers while its elements are
// added. Transposed: rows of the result are read and written for each element; a thread owns a
// range of them, which is a range of each row of the weight as columns rise. Gradient of values:
// one product of two rows each. Reads columns, values and a row of D for each element.
#include "kernels/csr_product.h"

#include <algorithm>
#include <type_traits>

#include "kernels/checks.h"
#include "kernels/dense_row.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"
#include "kernels/vector64.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kValuesPerThread = int64_t{1} << 15;
constexpr int64_t kColumnsPerTask = 256;
constexpr const char* kOnCuda = "use LibTorch's dense products there, or give it CPU memory";

void check(const char* operation, const CsrWeight& weight, bool needs_values, const void* of_rows,
           const void* of_columns, int64_t D) {
  require_count(operation, "M", weight.M);
  require_count(operation, "N", weight.N);
  require_count(operation, "D", D);
  require_buffer(operation, "row_offsets", weight.row_offsets, weight.M + 1);
  const int64_t nnz = weight.row_offsets[weight.M];
  if (weight.short_columns == nullptr) {
    require_buffer(operation, "columns", weight.columns, nnz);
  } else {
    require(weight.N <= 65536, operation, "N", weight.N,
            "exceeds 65536, which columns of 16 bits reach; pass 32-bit columns");
  }
  if (needs_values) require_buffer(operation, "values", weight.values, nnz);
  require_buffer(operation, "rows of M", of_rows, weight.M * D);
  require_buffer(operation, "rows of N", of_columns, weight.N * D);
}

/// sums of kVectors vectors of row [begin, end) of the weight.
template <int kVectors, typename T, typename Column>
PERSEID_INLINE void row_vectors(const Column* columns, const T* values, int64_t begin, int64_t end,
                                const T* x, int64_t D, T* out) {
  constexpr int64_t kLanes = Vector64<T>::kLanes;
  typename Vector64<T>::Type sums[kVectors] = {};
  for (int64_t e = begin; e < end; ++e) {
    const T* const row = x + int64_t{columns[e]} * D;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      typename Vector64<T>::Type part;
      load_vector(row + v * kLanes, part);
      sums[v] += values[e] * part;
    }
  }
  for (int v = 0; v < kVectors; ++v) store_vector(sums[v], out + v * kLanes);
}

/// The same for a constant number of elements below a vector.
template <int kCount, typename T, typename Column>
PERSEID_INLINE void row_part(const Column* columns, const T* values, int64_t begin, int64_t end,
                             const T* x, int64_t D, T* out) {
  T sums[kCount] = {};
  for (int64_t e = begin; e < end; ++e) {
    const T* const row = x + int64_t{columns[e]} * D;
    for (int i = 0; i < kCount; ++i) sums[i] += values[e] * row[i];
  }
  std::copy_n(sums, kCount, out);
}

template <typename T, typename Column>
PERSEID_SIMD_CLONES void product_rows(const int32_t* offsets, const Column* columns,
                                      const T* values, const T* x, int64_t begin, int64_t end,
                                      int64_t D, T* out) {
  constexpr int64_t kLanes = Vector64<T>::kLanes;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t from = offsets[m], to = offsets[m + 1];
    T* const row = out + m * D;
    int64_t d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
      row_vectors<4>(columns, values, from, to, x + d, D, row + d);
    }
    if (d + 2 * kLanes <= D) {
      row_vectors<2>(columns, values, from, to, x + d, D, row + d);
      d += 2 * kLanes;
    }
    if (d + kLanes <= D) {
      row_vectors<1>(columns, values, from, to, x + d, D, row + d);
      d += kLanes;
    }
    if (d + kLanes / 2 <= D) {
      row_part<kLanes / 2>(columns, values, from, to, x + d, D, row + d);
      d += kLanes / 2;
    }
    for (; d < D; ++d) row_part<1>(columns, values, from, to, x + d, D, row + d);
  }
}

template <typename T, typename Column>
PERSEID_SIMD_CLONES void product_columns(const int32_t* offsets, const Column* columns,
                                         const T* values, const T* delta, int64_t M, int64_t begin,
                                         int64_t end, bool is_all, int64_t D, T* grad_x) {
  std::fill(grad_x + begin * D, grad_x + end * D, T{0});
  for (int64_t m = 0; m < M; ++m) {
    const Column *from = columns + offsets[m], *to = columns + offsets[m + 1];
    if (!is_all) from = std::lower_bound(from, to, static_cast<Column>(begin));
    for (; from != to && int64_t{*from} < end; ++from) {
      add_scaled(values[from - columns], delta + m * D, D, grad_x + int64_t{*from} * D);
    }
  }
}

template <typename T, typename Column>
PERSEID_SIMD_CLONES void outer_rows(const int32_t* offsets, const Column* columns, const T* delta,
                                    const T* x, int64_t begin, int64_t end, int64_t D,
                                    T* grad_values) {
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t e = offsets[m]; e < offsets[m + 1]; ++e) {
      grad_values[e] = dot(delta + m * D, x + int64_t{columns[e]} * D, D);
    }
  }
}

/// body(tag of T, columns)
template <typename Body>
void dispatch(const CsrWeight& weight, DType dtype, const char* operation, Body&& body) {
  dispatch_float_dtype(dtype, operation, [&](auto tag) {
    if (weight.short_columns != nullptr) {
      body(tag, weight.short_columns);
    } else {
      body(tag, weight.columns);
    }
  });
}

/// Rows of one range, so that a range has enough to do.
int64_t row_grain(const CsrWeight& weight, int64_t D) {
  const int64_t nnz = weight.row_offsets[weight.M];
  const int64_t per_row = ceil_div(nnz, std::max<int64_t>(weight.M, 1)) * std::max<int64_t>(D, 1);
  return ceil_div(kValuesPerThread, std::max<int64_t>(per_row, 1));
}

/// body(m, n, e) for each element.
template <typename Body>
void for_each_element(const CsrWeight& weight, Body&& body) {
  for (int64_t m = 0; m < weight.M; ++m) {
    for (int64_t e = weight.row_offsets[m]; e < weight.row_offsets[m + 1]; ++e) {
      const int64_t n = weight.short_columns != nullptr ? int64_t{weight.short_columns[e]}
                                                        : int64_t{weight.columns[e]};
      body(m, n, e);
    }
  }
}

/// target[to(m, n), :] = sum of values source[from(m, n), :] in double.
template <typename T, typename To, typename From>
void sum_elements(const CsrWeight& weight, const T* source, int64_t D, int64_t num_rows, To&& to,
                  From&& from, T* target) {
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0;
      for_each_element(weight, [&](int64_t m, int64_t n, int64_t e) {
        if (to(m, n) != row) return;
        sum += double{static_cast<const T*>(weight.values)[e]} * double{source[from(m, n) * D + d]};
      });
      target[row * D + d] = static_cast<T>(sum);
    }
  }
}

}  // namespace

void csr_product(const CsrWeight& weight, const void* x, int64_t D, DType dtype, void* out,
                 Stream stream) {
  constexpr const char* kOperation = "csr_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, weight, true, out, x, D);
  dispatch(weight, dtype, kOperation, [&](auto tag, const auto* columns) {
    using T = decltype(tag);
    parallel_for(0, weight.M, row_grain(weight, D), [&](int64_t begin, int64_t end) {
      product_rows(weight.row_offsets, columns, static_cast<const T*>(weight.values),
                   static_cast<const T*>(x), begin, end, D, static_cast<T*>(out));
    });
  });
}

void csr_transposed_product(const CsrWeight& weight, const void* delta, int64_t D, DType dtype,
                            void* grad_x, Stream stream) {
  constexpr const char* kOperation = "csr_transposed_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, weight, true, delta, grad_x, D);
  const int64_t num_tasks =
      std::min<int64_t>(std::max(num_threads(), 1), ceil_div(weight.N, kColumnsPerTask));
  dispatch(weight, dtype, kOperation, [&](auto tag, const auto* columns) {
    using T = decltype(tag);
    parallel_tasks(num_tasks, [&](int64_t task) {
      const int64_t begin = weight.N * task / num_tasks, end = weight.N * (task + 1) / num_tasks;
      product_columns(weight.row_offsets, columns, static_cast<const T*>(weight.values),
                      static_cast<const T*>(delta), weight.M, begin, end, num_tasks == 1, D,
                      static_cast<T*>(grad_x));
    });
  });
}

void csr_outer_product(const CsrWeight& weight, const void* delta, const void* x, int64_t D,
                       DType dtype, void* grad_values, Stream stream) {
  constexpr const char* kOperation = "csr_outer_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, weight, false, delta, x, D);
  require_buffer(kOperation, "grad_values", grad_values, weight.row_offsets[weight.M]);
  dispatch(weight, dtype, kOperation, [&](auto tag, const auto* columns) {
    using T = decltype(tag);
    parallel_for(0, weight.M, row_grain(weight, D), [&](int64_t begin, int64_t end) {
      outer_rows(weight.row_offsets, columns, static_cast<const T*>(delta),
                 static_cast<const T*>(x), begin, end, D, static_cast<T*>(grad_values));
    });
  });
}

void csr_product_reference(const CsrWeight& weight, const void* x, int64_t D, DType dtype,
                           void* out) {
  check("csr_product", weight, true, out, x, D);
  dispatch_float_dtype(dtype, "csr_product", [&](auto tag) {
    using T = decltype(tag);
    sum_elements(
        weight, static_cast<const T*>(x), D, weight.M, [](int64_t m, int64_t) { return m; },
        [](int64_t, int64_t n) { return n; }, static_cast<T*>(out));
  });
}

void csr_transposed_product_reference(const CsrWeight& weight, const void* delta, int64_t D,
                                      DType dtype, void* grad_x) {
  check("csr_transposed_product", weight, true, delta, grad_x, D);
  dispatch_float_dtype(dtype, "csr_transposed_product", [&](auto tag) {
    using T = decltype(tag);
    sum_elements(
        weight, static_cast<const T*>(delta), D, weight.N, [](int64_t, int64_t n) { return n; },
        [](int64_t m, int64_t) { return m; }, static_cast<T*>(grad_x));
  });
}

void csr_outer_product_reference(const CsrWeight& weight, const void* delta, const void* x,
                                 int64_t D, DType dtype, void* grad_values) {
  check("csr_outer_product", weight, false, delta, x, D);
  dispatch_float_dtype(dtype, "csr_outer_product", [&](auto tag) {
    using T = decltype(tag);
    for_each_element(weight, [&](int64_t m, int64_t n, int64_t e) {
      double sum = 0;
      for (int64_t d = 0; d < D; ++d) {
        sum += double{static_cast<const T*>(delta)[m * D + d]} *
               double{static_cast<const T*>(x)[n * D + d]};
      }
      static_cast<T*>(grad_values)[e] = static_cast<T>(sum);
    });
  });
}

}  // namespace perseid::kernels
