#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

struct ExpertChoiceGateOptions {
  ExpertChoiceGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(double, capacity_factor) = 2.0;  ///< experts per token, on average; above 0
  /// Tokens with consecutive global ids that experts choose from; 0: the tokens of each call. With
  /// another value each rank must hold whole groups.
  TORCH_ARG(int64_t, group_size) = 0;
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kNone;
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// Experts choose tokens (Zhou et al. 2022): with p = softmax(weight x) over the experts, each
/// expert takes, in each group of n valid tokens, the C tokens of largest p, C = capacity_factor *
/// n / E rounded (halves up), at most n; equal p by smaller token id, and a NaN only when nothing
/// else is left. A chosen pair has weight p, not renormalised. Every expert has the same load, so
/// there is no auxiliary loss; a token has 0 to E experts. The gradient is that of the whole
/// softmax and needs the chosen experts only.
///
/// Not causal: whether a token is chosen depends on later tokens of its group, in evaluation too,
/// so it suits encoders. With group_size = 0 a group is what one rank holds in one call: results
/// then depend on the number of ranks and on micro-batches. With a fixed group_size they do not.
///
/// Parameter: weight [E, D], Glorot uniform. Nominal top_k: capacity_factor rounded, in [1, E].
/// O(T E) beside the router's product; keeps the tokens as they are for the backward, which forms
/// the logits again. No second derivatives.
class ExpertChoiceGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit ExpertChoiceGate(const ExpertChoiceGateOptions& options);
  /// Throws ConfigError if group_size is not 0 and a group is not here as a whole.
  GateOutput forward(const GateInput& input) override;

  const ExpertChoiceGateOptions& options() const { return options_; }
  at::Tensor weight;  ///< [E, D]

 private:
  int64_t capacity(int64_t num_tokens) const;

  ExpertChoiceGateOptions options_;
};

}  // namespace perseid::gates
