#pragma once
#include <torch/arg.h>

#include "gates/schedule.h"
#include "gates/tree_gate.h"

namespace perseid::gates {

/// How the entropy of the selectors becomes a loss.
enum class EntropyReduction : uint8_t {
  kMean,  ///< mean over tokens
  kSum,   ///< sum over tokens, as published: the coefficient has to shrink as the batch grows
};

struct DSelectKGateOptions {
  DSelectKGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;           ///< K, the number of selectors
  TORCH_ARG(double, gamma) = 1.0;          ///< width of the switches: |z| >= gamma/2 is 0 or 1
  TORCH_ARG(double, entropy_coeff) = 0.1;  ///< pulls selectors to one expert; 0 switches it off
  TORCH_ARG(CoefficientSchedule, entropy_schedule) = {};  ///< of entropy_coeff
  TORCH_ARG(EntropyReduction, entropy_reduction) = EntropyReduction::kMean;
  /// Pulls selectors away from codes without an expert, where E is not a power of two.
  TORCH_ARG(double, penalty_coeff) = 1.0;
  TORCH_ARG(double, balance_coeff) = 0.0;  ///< of balance_entropy_loss; 0 switches it off
  TORCH_ARG(bool, renormalize) = false;    ///< weights are divided by their sum
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kLayerNorm;
  TORCH_ARG(bool, hard_eval) = false;   ///< outside training each selector takes one expert: <= K
  TORCH_ARG(double, min_weight) = 0.0;  ///< smaller weights are left out; in [0, 1/E), 0: exact
  TORCH_ARG(bool, per_token) = true;    ///< false: one decision for all tokens of the batch
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// DSelect-k (Hazimeh et al. 2021, arXiv 2106.03760): K selectors; each is ceil(log2 E)
/// smooth-step switches, the bits of an expert's number, most significant first, and a softmax
/// mixes the selectors. All experts have weight at the start; when a token's switches are
/// saturated, at most K have. Experts with weight exactly 0 do not run and get no gradient, which
/// is exact, also that of the losses. Weights sum to 1 if E is a power of two; else the mass on
/// codes from E on is missing, and a token that has all of it there has no expert. With
/// renormalize they sum to 1 for every other token. Formulas: kernels/dselect_k.h.
///
/// Parameters, equal on every rank, keyed by seed, layer and gate: code_weight [K*bits, D] and
/// code_bias [K*bits], uniform in +-gamma/100; selector_weight [K, D] and selector_bias [K],
/// uniform in +-0.05. Not per_token: the biases only, which then are the logits. One expert: no
/// parameters and weight 1.
///
/// Losses: "entropy_loss" = entropy_coeff * schedule(progress) * the mean or sum over tokens of
/// sum over selectors and experts of -r log(r + 1e-6); "penalty_loss" = penalty_coeff * the mean
/// over tokens of sum over selectors of 1 / (1e-6 + sum over experts of r), unless E is a power of
/// two; "balance_loss" (global). Each only if its coefficient is not 0. A mean divides by
/// tokens_global. A token with a NaN in its logits goes to experts 0 .. K-1 with NaN weights. Keeps
/// features, logits [T, K*(bits+1)] and weights [T, E] for the backward; no second derivatives.
class DSelectKGate : public TreeGate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit DSelectKGate(const DSelectKGateOptions& options);
  GateOutput forward_mapped(const GateInput& input, const at::Tensor& expert_map) override;
  at::Tensor tree_weights(const GateInput& input) override;

  const DSelectKGateOptions& options() const { return options_; }
  at::Tensor code_weight, code_bias, selector_weight, selector_bias;  ///< undefined if not used

 private:
  DSelectKGateOptions options_;
};

}  // namespace perseid::gates
