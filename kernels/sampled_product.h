#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// The gradient of a weight [M, N] at some of its elements only: bit m * N + n of a set says that
// (m, n) is one, bit i being bit i % 64 of word i / 64. Nothing of the size of the weight is read
// or written but these bits. For the host: on kCuda it throws ConfigError.

namespace perseid::kernels {

/// values[i] += sum over d of delta[m, d] x[n, d] for the i-th element (m, n) of the set, counted
/// row by row. Sums are formed in the type of the values. Same bits for any thread count.
/// @param delta       [M, D] float32, float64, bfloat16 or float16
/// @param x           [N, D] of the same type
/// @param is_sampled  [M * N] bits, as words; bits behind the last element are not read
/// @param values      [elements of the set] float64 for float64, else float32; must not overlap
void sampled_product(const void* delta, const void* x, const uint64_t* is_sampled, int64_t M,
                     int64_t N, int64_t D, DType dtype, void* values, Stream stream = {});
void sampled_product_reference(const void* delta, const void* x, const uint64_t* is_sampled,
                               int64_t M, int64_t N, int64_t D, DType dtype, void* values);

}  // namespace perseid::kernels
