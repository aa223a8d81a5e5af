#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "gates/gate.h"

// Internal: what the gates of trees and selectors need beside their kernels, see gates/tree_gate.h.

namespace perseid::gates {

/// The map, contiguous; undefined if it is. Throws ConfigError unless it is [K, E] int32 on the
/// device of the parameters. Reads no data.
at::Tensor checked_expert_map(const at::Tensor& expert_map, const Gate& gate, c10::Device device,
                              const char* operation);

/// TreeGate::tree_weights of a gate with one expert: 1 for valid tokens, [T, 1, 1], in the type of
/// its forward.
at::Tensor one_expert_tree_weights(const GateInput& input);

/// w [N, K, E] of COMET: kernels/comet.h in LibTorch operations, also in its convention for
/// infinite and NaN logits. Gradients are finite, and exactly 0 where switches are saturated.
/// @param splits  [N, K*(E-1)] z, float32 or float64
/// @param leaves  [N, K*E] a in the same type
at::Tensor comet_tree_weights(const at::Tensor& splits, const at::Tensor& leaves, int64_t num_trees,
                              double gamma);

/// The same for DSelect-k, alpha_i r_ij of kernels/dselect_k.h.
/// @param logits       [N, K*bits + K]
/// @param renormalize  divide by the sum over selectors and codes, where that is not 0
at::Tensor dselect_k_tree_weights(const at::Tensor& logits, int64_t num_experts,
                                  int64_t num_selectors, double gamma, bool renormalize);

/// Weights [N, K, E] for all tokens of the input: N is T, or 1 if one decision stands for all.
/// Tokens that are not valid get zeros.
at::Tensor for_tokens(const at::Tensor& weights, const GateInput& input);

}  // namespace perseid::gates
