#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Products of a dense table that is mostly zeros, which are skipped: gradients of logits of gates
// whose tokens reach few of them. A NaN opposite to a zero has no influence. For the host: on kCuda
// all throw ConfigError, as dense products are faster there.

namespace perseid::kernels {

/// Elements that are not zero; NaN counts.
int64_t count_nonzero(const void* values, int64_t count, DType dtype, Stream stream = {});

/// out[m, :] = sum over n of a[m, n] b[n, :], in the order of n.
/// @param a    [M, N] float32 or float64
/// @param b    [N, D]
/// @param out  [M, D] written whole, must not overlap
/// Reads M*N values and a row of D for each that is not zero. Same bits for any thread count.
void sparse_product(const void* a, const void* b, int64_t M, int64_t N, int64_t D, DType dtype,
                    void* out, Stream stream = {});
void sparse_product_reference(const void* a, const void* b, int64_t M, int64_t N, int64_t D,
                              DType dtype, void* out);

/// out[n, :] = sum over m of a[m, n] b[m, :], in the order of m.
/// @param b    [M, D]
/// @param out  [N, D]
void sparse_transposed_product(const void* a, const void* b, int64_t M, int64_t N, int64_t D,
                               DType dtype, void* out, Stream stream = {});
void sparse_transposed_product_reference(const void* a, const void* b, int64_t M, int64_t N,
                                         int64_t D, DType dtype, void* out);

}  // namespace perseid::kernels
