#pragma once
#include <ATen/core/Tensor.h>

#include "moe/mlp_core.h"

// Internal: the arithmetic of grouped experts on a GPU, with the arguments and results of the
// CPU's: one operation for all experts at a time, no host wait where moe/grouped_gemm.h needs none.

namespace perseid {

MlpOutput device_mlp_forward(const at::Tensor& rows, const at::Tensor& weights,
                             const MlpParameters& parameters, MlpKind kind, const LocalPlan& plan);
MlpGradients device_mlp_backward(const at::Tensor& grad_out, const at::Tensor& rows,
                                 const at::Tensor& weights, const MlpParameters& parameters,
                                 const at::Tensor& pre, MlpKind kind, const LocalPlan& plan,
                                 const MlpWanted& wanted);

/// W x + b of each assignment by sorted place, unweighted. [R, d_out]
at::Tensor device_linear_outputs(const at::Tensor& rows, const at::Tensor& matrix,
                                 const at::Tensor& bias, const LocalPlan& plan);

/// Gradients of the linear experts; undefined where not wanted.
struct LinearExpertGradients {
  at::Tensor rows, matrix, bias;
};
/// @param grad_y  [R, d_out] gradient of the outputs above
LinearExpertGradients device_linear_backward(const at::Tensor& grad_y, const at::Tensor& rows,
                                             const at::Tensor& matrix, const LocalPlan& plan,
                                             bool wants_rows, bool wants_matrix, bool wants_bias);

}  // namespace perseid
