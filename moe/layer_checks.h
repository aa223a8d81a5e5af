#pragma once
#include <cstdint>
#include <vector>

#include "moe/moe_layer.h"

// Internal: what a layer is given by its caller, its gates and its experts, checked before anything
// of it is exchanged. A check throws ConfigError that names the argument, its value and its limit;
// none communicates.

namespace perseid {

inline constexpr const char* kMoELayer = "moe_layer";  ///< in errors

/// Every field of the input of a layer with these gates and experts.
void check_layer_input(const MoEInput& input, const Experts& experts, int64_t num_experts,
                       size_t num_gates);

/// What gate `name` returned for `num_tokens` tokens.
void check_gate_output(const gates::GateOutput& output, int64_t num_tokens, const Experts& experts,
                       int64_t num_experts, const char* name);

/// Warns, once in the process, if a capacity meets a gate that selects more experts per token than
/// its nominal top_k, which the capacity goes by: most of its assignments are then dropped.
void warn_of_capacity(const gates::Gate& gate, const gates::GateStats& stats,
                      const CapacityOptions& capacity);

/// [rows, width] in the type of the tokens: what experts returned.
void check_expert_output(const at::Tensor& output, int64_t num_rows, int64_t width,
                         const at::Tensor& tokens, const char* argument);

/// Statistics that are added to, or passed to, those of a layer.
/// @param argument  "earlier", "stats"
void check_stats(const MoEStats& stats, int64_t num_experts, size_t num_gates,
                 const char* argument);

}  // namespace perseid
