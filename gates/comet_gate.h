#pragma once
#include <torch/arg.h>

#include "gates/schedule.h"
#include "gates/tree_gate.h"

namespace perseid::gates {

/// Which logits of a tree are formed. Those that a token does not reach have no influence, so both
/// ways give the same up to rounding.
enum class Descent : uint8_t {
  kAuto,   ///< lazy in large gates whose tokens reach few nodes, by a sample of tokens
  kDense,  ///< all, in one matrix product
  kLazy,   ///< only those along paths with a weight above 0
};

struct CometGateOptions {
  CometGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;           ///< K, the number of trees
  TORCH_ARG(double, gamma) = 1.0;          ///< width of the switches: |z| >= gamma/2 is 0 or 1
  TORCH_ARG(double, entropy_coeff) = 0.1;  ///< pulls trees to one leaf; 0 switches it off
  TORCH_ARG(CoefficientSchedule, entropy_schedule) = {};  ///< of entropy_coeff
  TORCH_ARG(double, balance_coeff) = 0.0;  ///< of balance_entropy_loss; 0 switches it off
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kLayerNorm;
  TORCH_ARG(bool, hard_eval) = false;   ///< outside training each tree takes its largest leaf: <= K
  TORCH_ARG(double, min_weight) = 0.0;  ///< smaller weights are left out; in [0, 1/E), 0: exact
  TORCH_ARG(bool, per_token) = true;    ///< false: one decision for all tokens of the batch
  TORCH_ARG(Descent, descent) = Descent::kAuto;
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// COMET (Ibrahim et al. 2023, arXiv 2306.02824): K binary trees of smooth-step switches with a
/// leaf for every expert; the leaf logits of all trees share one softmax, weighted by the trees'
/// reach. Weights sum to 1. All experts have weight at the start; when a token's switches are
/// saturated, at most K have. Experts with weight exactly 0 do not run and get no gradient, which
/// is exact, also that of the entropy and balance losses. Formulas: kernels/comet.h.
///
/// Parameters, equal on every rank, keyed by seed, layer and gate: split_weight [K*(E-1), D] and
/// split_bias [K*(E-1)], uniform in +-gamma/100; leaf_weight [K*E, D] and leaf_bias [K*E], uniform
/// in +-0.05. Rows by tree, then split nodes in heap order (children of q: 2q+1, 2q+2), leaves in
/// left-first depth-first order. Not per_token: the biases only, which then are the logits. One
/// expert: no parameters and weight 1.
///
/// Losses: "entropy_loss" = entropy_coeff * schedule(progress) * (1 / tokens_global) * sum over
/// tokens, trees, leaves of -v log(v + 1e-6); "balance_loss" (global) if balance_coeff is not 0.
/// A token with a NaN in its logits goes to experts 0 .. K-1 with NaN weights. Keeps features, both
/// logits [T, K*(2E-1)] and weights [T, E] for the backward; no second derivatives.
class CometGate : public TreeGate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit CometGate(const CometGateOptions& options);
  GateOutput forward_mapped(const GateInput& input, const at::Tensor& expert_map) override;
  at::Tensor tree_weights(const GateInput& input) override;

  const CometGateOptions& options() const { return options_; }
  at::Tensor split_weight, split_bias, leaf_weight, leaf_bias;  ///< undefined where not used

 private:
  CometGateOptions options_;
};

}  // namespace perseid::gates
