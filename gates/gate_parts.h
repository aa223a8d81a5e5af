#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "gates/gate.h"

// Internal: what the gates with a linear router have in common.

namespace perseid::gates {

/// [E, D] float32, Glorot uniform, keyed: equal on every rank.
at::Tensor router_weight(int64_t num_experts, int64_t d_model, uint64_t seed, int64_t layer_id,
                         int64_t gate_id);

/// Throws ConfigError unless value is finite and >= 0, as the coefficient of a loss.
void require_coefficient(const char* operation, const char* argument, double value);
void require_d_model(const char* operation, int64_t d_model);

/// Throws ConfigError unless the input fits the router: width and device.
void require_input(const GateInput& input, const at::Tensor& weight, const char* operation);

/// The tokens, zeros for those that are not valid: these may hold anything, and a NaN in them would
/// reach gradients, as 0 * NaN is not 0.
at::Tensor valid_tokens(const GateInput& input);

/// What the router reads: the tokens as they are, or the valid ones normalised in the type of the
/// arithmetic.
at::Tensor router_features(const GateInput& input, InputNorm norm, const at::Tensor& weight);

/// Valid tokens of this call, and the divisor of means over tokens.
int64_t count_valid(const GateInput& input);
int64_t tokens_global_of(const GateInput& input, int64_t num_valid);

/// The kept pairs of a table whose rows are in the order of choices; rows without a gap are a
/// routing of fixed width.
/// @param expert_idx  [T, K] int32, any number where nothing is kept
/// @param weights     [T, K] differentiable
/// @param kept        [T, K] bool
Routing routing_from_kept(const at::Tensor& expert_idx, const at::Tensor& weights,
                          const at::Tensor& kept);

}  // namespace perseid::gates
