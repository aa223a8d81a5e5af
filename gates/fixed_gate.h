#pragma once
#include "gates/gate.h"

// Internal: what the gates without parameters have in common.

namespace perseid::gates {

/// Each valid token to its expert with weight 1 (float64 for float64 tokens, else float32).
/// @param expert_idx  [T] int32; entries of tokens that are not valid are not looked at
GateOutput one_expert_per_token(const GateInput& input, const at::Tensor& expert_idx,
                                int64_t num_experts);

/// The same for K experts of weight 1/K each.
/// @param expert_idx  [T, K] int32, ascending and distinct in the rows of valid tokens
GateOutput equal_experts_per_token(const GateInput& input, const at::Tensor& expert_idx,
                                   int64_t num_experts);

}  // namespace perseid::gates
