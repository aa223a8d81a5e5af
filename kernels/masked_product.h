#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Products of a weight [M, N] of which few elements are active: bit m * N + n of a mask says that
// (m, n) is, bit i being bit i % 64 of word i / 64. Inactive elements are not read. For the host:
// on kCuda all throw ConfigError. Same bits for any thread count.

namespace perseid::kernels {

/// out[m, :] = sum over active (m, n) of weight[m, n] x[n, :], in the order of n.
/// @param weight     [M, N] float32 or float64
/// @param is_active  the mask
/// @param x          [N, D]
/// @param out        [M, D] written whole, must not overlap
void masked_product(const void* weight, const uint64_t* is_active, const void* x, int64_t M,
                    int64_t N, int64_t D, DType dtype, void* out, Stream stream = {});
void masked_product_reference(const void* weight, const uint64_t* is_active, const void* x,
                              int64_t M, int64_t N, int64_t D, DType dtype, void* out);

/// grad_x[n, :] = sum over active (m, n) of weight[m, n] delta[m, :], in the order of m: the
/// gradient of x.
/// @param delta   [M, D]
/// @param grad_x  [N, D] written whole, must not overlap
void masked_transposed_product(const void* weight, const uint64_t* is_active, const void* delta,
                               int64_t M, int64_t N, int64_t D, DType dtype, void* grad_x,
                               Stream stream = {});
void masked_transposed_product_reference(const void* weight, const uint64_t* is_active,
                                         const void* delta, int64_t M, int64_t N, int64_t D,
                                         DType dtype, void* grad_x);

/// grad_weight[m, n] = sum over d of delta[m, d] x[n, d] where (m, n) is active, else 0: the
/// gradient of the weight.
/// @param grad_weight  [M, N] written whole, must not overlap
void masked_outer_product(const void* delta, const void* x, const uint64_t* is_active, int64_t M,
                          int64_t N, int64_t D, DType dtype, void* grad_weight, Stream stream = {});
void masked_outer_product_reference(const void* delta, const void* x, const uint64_t* is_active,
                                    int64_t M, int64_t N, int64_t D, DType dtype,
                                    void* grad_weight);

}  // namespace perseid::kernels
