#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

namespace perseid::kernels {

/// out[m, n] = sum over d of a[m, d] b[n, d] where the bit m * N + n of `is_wanted` is set, else 0:
/// the gradient of a sparse weight. For the host: on kCuda it throws ConfigError.
/// @param a          [M, D] float32 or float64
/// @param b          [N, D]
/// @param is_wanted  bit i is bit i % 64 of word i / 64
/// @param out        [M, N] written whole, must not overlap
/// Reads two rows of D for each wanted element, writes M*N. Same bits for any thread count.
void masked_product(const void* a, const void* b, const uint64_t* is_wanted, int64_t M, int64_t N,
                    int64_t D, DType dtype, void* out, Stream stream = {});
void masked_product_reference(const void* a, const void* b, const uint64_t* is_wanted, int64_t M,
                              int64_t N, int64_t D, DType dtype, void* out);

}  // namespace perseid::kernels
