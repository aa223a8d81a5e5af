#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

// Internal: kernels/doubly_stochastic.h with a gradient.

namespace perseid::gates {

/// [U, E, E] in the type of scores. Keeps scores and 16*U*iterations*E bytes for the backward; no
/// second derivatives.
/// @param scores  [U, E, E] float32 or float64
at::Tensor relaxed_permutation(const at::Tensor& scores, double temperature, int64_t iterations);

}  // namespace perseid::gates
