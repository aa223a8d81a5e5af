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

/// Places in the list that route_logits returns; what is not asked for is an empty tensor.
enum RouterSlot : uint8_t {
  kWeights,          ///< [T*K]
  kExpertIdx,        ///< [T*K] int32
  kTokensPerExpert,  ///< [E] int64
  kNonFinite,        ///< scalar int64
  kEntropySum,       ///< scalar float64
  kScoreSum,         ///< [E] if options.score_sum
  kLseSquareSum,     ///< scalar if options.lse_square_sum
  kScoreShares,      ///< [T, E] if options.score_shares
};

/// @param logits       [T, E] float32 or float64, contiguous
/// @param valid        [T] bool or undefined
/// @param expert_bias  [E] float32 or undefined
std::vector<at::Tensor> route_logits(const at::Tensor& logits, const at::Tensor& valid,
                                     const at::Tensor& expert_bias,
                                     const LinearRouterOptions& options);

/// d(loss)/d(logits) [T, E] from the gradients of the list above; undefined ones are 0.
at::Tensor route_logits_backward(const at::Tensor& logits, const at::Tensor& valid,
                                 const at::Tensor& expert_idx, const LinearRouterOptions& options,
                                 const std::vector<at::Tensor>& gradients);

LinearRouterOutput router_output(const std::vector<at::Tensor>& list,
                                 const LinearRouterOptions& options);

}  // namespace perseid::gates
