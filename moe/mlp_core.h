#pragma once
#include <ATen/core/Tensor.h>

#include "kernels/activation.h"
#include "moe/activation_sparsity.h"
#include "moe/routing_plan.h"

// Internal: two-layer experts, forward and backward without a graph. All tensors contiguous.

namespace perseid {

struct MlpKind {
  kernels::Activation activation = kernels::Activation::kSilu;
  bool gated = true;
  ActivationSparsity sparsity = {};  ///< on the CPU only
};

struct MlpParameters {
  at::Tensor up;         ///< [L, 2F, D], gate rows first; not gated: [L, F, D]
  at::Tensor up_bias;    ///< [L, 2F or F] or undefined
  at::Tensor down;       ///< [L, d_out, F]
  at::Tensor down_bias;  ///< [L, d_out] or undefined
};

struct MlpOutput {
  at::Tensor out;  ///< [N, G * d_out], see Experts::forward
  at::Tensor pre;  ///< [R, 2F or F] pre-activations by sorted place, for the backward
};

/// @param rows     [N, D]
/// @param weights  [R, G]
MlpOutput mlp_forward(const at::Tensor& rows, const at::Tensor& weights,
                      const MlpParameters& parameters, MlpKind kind, const LocalPlan& plan);

struct MlpWanted {
  bool rows = false, weights = false, up = false, up_bias = false, down = false, down_bias = false;
};

/// Of the arguments of the same names; undefined where not wanted.
struct MlpGradients {
  at::Tensor rows, weights, up, up_bias, down, down_bias;
};

/// With one gate the routing weight is applied to the activation, so its gradient needs no expert
/// output; with several the outputs are formed once more.
/// @param grad_out  [N, G * d_out]
MlpGradients mlp_backward(const at::Tensor& grad_out, const at::Tensor& rows,
                          const at::Tensor& weights, const MlpParameters& parameters,
                          const at::Tensor& pre, MlpKind kind, const LocalPlan& plan,
                          const MlpWanted& wanted);

/// Hidden values of each expert that are not 0: [L] int64. On the CPU.
at::Tensor mlp_active_hidden(const at::Tensor& rows, const MlpParameters& parameters, MlpKind kind,
                             const LocalPlan& plan);

}  // namespace perseid
