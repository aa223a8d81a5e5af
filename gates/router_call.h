#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "gates/kernel_types.h"
#include "gates/linear_router.h"

// Internal: kernels::route on tensors, without a graph.

namespace perseid::gates {

// An autograd function takes no undefined tensor: what is absent travels as an empty one.
at::Tensor or_empty(const at::Tensor& tensor);
at::Tensor or_undefined(const at::Tensor& tensor);

/// Sum over rows [N, M], in their order, in double: what a bias [M] gets. No graph.
at::Tensor sum_of_rows(const at::Tensor& rows);

/// @param logits       [T, E] float32 or float64, contiguous
/// @param valid        [T] bool or undefined
/// @param expert_bias  [E] float32 or undefined
LinearRouterOutput route_logits(const at::Tensor& logits, const at::Tensor& valid,
                                const at::Tensor& expert_bias, const LinearRouterOptions& options);

/// The differentiable ones among the outputs, without those that were not asked for: what an
/// autograd function returns.
std::vector<at::Tensor*> differentiable(LinearRouterOutput& output);

/// d(loss)/d(logits) [T, E] from the gradients of the list above; undefined ones are 0.
at::Tensor route_logits_backward(const at::Tensor& logits, const at::Tensor& valid,
                                 const at::Tensor& expert_idx, const LinearRouterOptions& options,
                                 const std::vector<at::Tensor>& gradients);

}  // namespace perseid::gates
