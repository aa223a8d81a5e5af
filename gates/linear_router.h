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
  bool score_shares = false;    ///< form LinearRouterOutput::score_shares
};

struct LinearRouterOutput {
  at::Tensor weights;            ///< [T*K] differentiable, 0 where expert_idx is -1
  at::Tensor expert_idx;         ///< [T*K] int32, -1 for tokens that are not valid
  at::Tensor tokens_per_expert;  ///< [E] int64
  at::Tensor score_sum;          ///< [E] differentiable, undefined unless asked for
  at::Tensor lse_square_sum;     ///< scalar, differentiable, undefined unless asked for
  at::Tensor score_shares;       ///< [T, E] differentiable, undefined unless asked for
  at::Tensor non_finite_tokens;  ///< scalar int64
  at::Tensor entropy_sum;        ///< scalar float64
};

/// Float64 if the weight is float64, else float32.
at::ScalarType router_compute_type(const at::Tensor& weight);

/// logits = features weight^T + bias in the compute type, then kernels::route: one node of the
/// graph. Saves the features in the type and storage they have, weight, bias, valid and expert_idx;
/// the backward forms the logits again. Same bits for any number of threads. No second derivatives.
/// @param features     [T, D] any floating type
/// @param weight       [E, D] any floating type
/// @param bias         [E] or undefined
/// @param valid        [T] bool or undefined: all are
/// @param expert_bias  [E] float32 or undefined: added to the scores for the selection only
LinearRouterOutput linear_router(const at::Tensor& features, const at::Tensor& weight,
                                 const at::Tensor& bias, const at::Tensor& valid,
                                 const LinearRouterOptions& options,
                                 const at::Tensor& expert_bias = {});

/// The first half alone: features weight^T + bias in the compute type, [T, E]. Rows of tokens that
/// are not valid are 0 and pass no gradient.
at::Tensor linear_logits(const at::Tensor& features, const at::Tensor& weight,
                         const at::Tensor& bias, const at::Tensor& valid);

/// The second half alone, for gates that change the logits in between.
/// @param logits  [T, E] float32 or float64
LinearRouterOutput logit_router(const at::Tensor& logits, const at::Tensor& valid,
                                const LinearRouterOptions& options);

}  // namespace perseid::gates
