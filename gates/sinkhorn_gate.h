#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

struct SinkhornGateOptions {
  SinkhornGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 1;
  /// Tokens with consecutive global ids that are balanced together; 0: the tokens of each call.
  /// With another value each rank must hold whole groups.
  TORCH_ARG(int64_t, group_size) = 0;
  TORCH_ARG(int64_t, max_iterations) = 50;  ///< see kernels::SinkhornOptions
  TORCH_ARG(double, tolerance) = 1e-4;      ///< see kernels::SinkhornOptions
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kNone;
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// Exactly K experts per token, in training from a balanced plan (S-BASE, Clark et al. 2022): with
/// z = weight x, the valid tokens of a group are balanced over the experts by Sinkhorn's iterations
/// on e^z (kernels::sinkhorn), and each token takes the K experts of its largest entries in the
/// plan, those of largest z + log d1; outside of training those of largest z. Equal ones by smaller
/// id. The selection has no gradient. Weights: K = 1 sigmoid(z), else softmax(z) over all experts,
/// on the selection and not renormalised. The loads are near balance, not exactly balanced.
///
/// A token with a NaN or an infinity in z takes no part in balancing and its weights follow the
/// formula; NaN acts as -infinity in its selection. Not causal in training: the choice depends on
/// all tokens of the group. With group_size = 0 that is what one rank holds in one call, so results
/// depend on the number of ranks and on micro-batches; with a fixed group_size they do not.
///
/// Parameter: weight [E, D], Glorot uniform. One expert: K = 1, so sigmoid(z). No losses; no second
/// derivatives. Keeps the tokens as they are and z [T, E] for the backward.
class SinkhornGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit SinkhornGate(const SinkhornGateOptions& options);
  /// Throws ConfigError if group_size is not 0 and a group is not here as a whole.
  GateOutput forward(const GateInput& input) override;

  const SinkhornGateOptions& options() const { return options_; }
  at::Tensor weight;  ///< [E, D]

 private:
  at::Tensor balanced_logits(const at::Tensor& logits, const std::vector<at::Tensor>& groups) const;

  SinkhornGateOptions options_;
};

}  // namespace perseid::gates
