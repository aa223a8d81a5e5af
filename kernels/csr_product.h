#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Products of a weight [M, N] of which only the active elements exist, row by row, with the batch D
// side by side as the inner dimension. For the host: on kCuda all throw ConfigError. Same bits for
// any thread count.

namespace perseid::kernels {

/// Row m has the elements row_offsets[m] .. row_offsets[m + 1] - 1 of columns and values. Columns
/// are below N and rise within a row; what they are is not checked.
struct CsrWeight {
  int64_t M = 0;
  int64_t N = 0;
  const int32_t* row_offsets = nullptr;     ///< [M + 1]
  const int32_t* columns = nullptr;         ///< [nnz], or null and
  const uint16_t* short_columns = nullptr;  ///< [nnz] half as many bytes, for N <= 65536
  const void* values = nullptr;             ///< [nnz]; not read by csr_outer_product
};

/// out[m, :] = sum over elements (m, n) of values x[n, :], in the order of n.
/// @param x    [N, D] float32 or float64
/// @param out  [M, D] written whole, must not overlap
void csr_product(const CsrWeight& weight, const void* x, int64_t D, DType dtype, void* out,
                 Stream stream = {});
void csr_product_reference(const CsrWeight& weight, const void* x, int64_t D, DType dtype,
                           void* out);

/// grad_x[n, :] = sum over elements (m, n) of values delta[m, :], in the order of m: the gradient
/// of x.
/// @param delta   [M, D]
/// @param grad_x  [N, D] written whole, must not overlap
void csr_transposed_product(const CsrWeight& weight, const void* delta, int64_t D, DType dtype,
                            void* grad_x, Stream stream = {});
void csr_transposed_product_reference(const CsrWeight& weight, const void* delta, int64_t D,
                                      DType dtype, void* grad_x);

/// grad_values of element (m, n) = sum over d of delta[m, d] x[n, d]: the gradient of the values.
/// @param grad_values  [nnz] written whole, must not overlap
void csr_outer_product(const CsrWeight& weight, const void* delta, const void* x, int64_t D,
                       DType dtype, void* grad_values, Stream stream = {});
void csr_outer_product_reference(const CsrWeight& weight, const void* delta, const void* x,
                                 int64_t D, DType dtype, void* grad_values);

}  // namespace perseid::kernels
