#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels/router.h"

// Internal: the differentiable core of the top-k gates.

namespace perseid::gates {

struct LinearRouterOptions {
  kernels::RouterOptions scores;
  int64_t top_k = 1;
  bool score_sum = false;       ///< form LinearRouterOutput::score_sum
  bool lse_square_sum = false;  ///< form LinearRouterOutput::lse_square_sum
};

struct LinearRouterOutput {
  at::Tensor weights;            ///< [T*K] differentiable, 0 where expert_idx is -1
  at::Tensor expert_idx;         ///< [T*K] int32, -1 for tokens that are not valid
  at::Tensor tokens_per_expert;  ///< [E] int64
  at::Tensor score_sum;          ///< [E] differentiable, undefined unless asked for
  at::Tensor lse_square_sum;     ///< scalar, differentiable, undefined unless asked for
  int64_t non_finite_tokens = 0;
};

/// Float64 if the weight is float64, else float32.
at::ScalarType router_compute_type(const at::Tensor& weight);

/// logits = features weight^T + bias in the compute type, then kernels::route: one node of the
/// graph. Saves the features in the type and storage they have, weight, bias, valid and expert_idx;
/// the backward forms the logits again. Same bits for any number of threads. No second derivatives.
/// @param features  [T, D] any floating type
/// @param weight    [E, D] any floating type
/// @param bias      [E] or undefined
/// @param valid     [T] bool or undefined: all are
LinearRouterOutput linear_router(const at::Tensor& features, const at::Tensor& weight,
                                 const at::Tensor& bias, const at::Tensor& valid,
                                 const LinearRouterOptions& options);

}  // namespace perseid::gates
