#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "gates/routing.h"

// Internal: the routing that operations take as tensors.

namespace perseid::ops {

/// The routing in tables with room for more assignments (moe/ops/gate_op.h), cut to those that
/// there are; on the CPU, contiguous. Throws ConfigError unless shapes, types and ids are legal.
/// @param token_offsets  [T+1] int32
/// @param expert_idx     [C] int32
/// @param weights        [C], or undefined: all are 1
gates::Routing cut_routing(const at::Tensor& token_offsets, const at::Tensor& expert_idx,
                           const at::Tensor& weights, int64_t num_tokens, int64_t num_experts,
                           const char* operation);

/// Number of assignments A = token_offsets[T]. Throws ConfigError unless it is in [0, capacity].
int64_t num_assignments(const at::Tensor& token_offsets, int64_t num_tokens, int64_t capacity,
                        const char* operation);

}  // namespace perseid::ops
