#pragma once
#include <torch/arg.h>

#include "gates/gate.h"
#include "kernels/router.h"

namespace perseid::gates {

/// How the weights of the K selected experts are formed.
enum class Normalization : uint8_t {
  kAuto,      ///< kSelected for K >= 2, kAll for K = 1 (where kSelected has no gradient)
  kSelected,  ///< over the selection: weights sum to route_scale (Shazeer, Megatron, Mixtral)
  kAll,       ///< over all experts, not renormalised (Switch); sigmoid scores as they are
};

/// Over which tokens the load-balance loss compares experts.
enum class AuxScope : uint8_t {
  kStep,  ///< all tokens of all ranks; with MoEInput::earlier also those of earlier micro-batches
  kSequence,  ///< each sequence of GateInput::sequence by itself, see sequence_balance_loss
};

struct TopKGateOptions {
  TopKGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;
  TORCH_ARG(kernels::ScoreFunction, score_function) = kernels::ScoreFunction::kSoftmax;
  TORCH_ARG(Normalization, normalization) = Normalization::kAuto;
  TORCH_ARG(double, route_scale) = 1.0;
  TORCH_ARG(double, aux_loss_coeff) = 1e-2;  ///< load-balance loss; 0 switches it off
  TORCH_ARG(AuxScope, aux_scope) = AuxScope::kStep;
  TORCH_ARG(double, z_loss_coeff) = 0.0;
  TORCH_ARG(double, balance_coeff) = 0.0;  ///< of balance_entropy_loss, on the weights
  TORCH_ARG(bool, normalize_by_k) = true;  ///< aux loss is 1 * coeff at balance; false: K * coeff
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kNone;
  TORCH_ARG(bool, bias) = false;  ///< a bias per expert in the logits, starts at 0
  /// Balancing without a loss (DeepSeek-V3, arXiv 2408.15664): the step of expert_bias, 1e-3 in the
  /// paper. 0: there is no such buffer.
  TORCH_ARG(double, bias_update_rate) = 0.0;
  /// Group-limited routing, see kernels::RouterOptions: with 8 and 4 a token uses experts of the
  /// best 4 of 8 groups.
  TORCH_ARG(int64_t, num_groups) = 1;
  TORCH_ARG(int64_t, topk_groups) = 1;
  /// In training each feature is multiplied by a number from U(1 - eps, 1 + eps), before the norm
  /// (Switch: 1e-2). The tokens that the experts read stay as they are.
  TORCH_ARG(double, jitter_eps) = 0.0;
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// Exactly K experts per token by a linear router with softmax, sigmoid or sqrt-softplus scores.
/// Parameters: weight [E, D] (Glorot uniform, keyed by seed, layer and gate; equal on every rank)
/// and bias [E] if asked for. Buffer: expert_bias [E] float32 if bias_update_rate is not 0; it is
/// added to the scores for the selection only, and after_step adds bias_update_rate * sign(mean
/// count - count) to it. Casts of the module leave its type. Formulas: kernels/router.h. Losses:
/// "z_loss" and "balance_loss" if their coefficients are not 0; if aux_loss_coeff is not 0 the
/// balance terms, or a finished "aux_loss" with AuxScope::kSequence, where GateInput::sequence is
/// needed. Saves the tokens as they are and 4*K bytes
/// per token (8*K with input.valid) for the backward, which forms the logits again; jitter and norm
/// keep features in the type of the arithmetic. No second derivatives.
class TopKGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit; warns once if the
  /// explicit normalisation leaves the router without a gradient (K = 1, kSelected).
  explicit TopKGate(const TopKGateOptions& options);
  GateOutput forward(const GateInput& input) override;
  void after_step(const GateStats& global_stats) override;

  const TopKGateOptions& options() const { return options_; }
  at::Tensor weight;       ///< [E, D]
  at::Tensor bias;         ///< [E] or undefined
  at::Tensor expert_bias;  ///< [E] float32 or undefined

  using Gate::to;
  void to(at::Device device, at::ScalarType dtype, bool non_blocking = false) override;
  void to(at::ScalarType dtype, bool non_blocking = false) override;

 private:
  at::Tensor features_of(const GateInput& input) const;

  TopKGateOptions options_;
};

}  // namespace perseid::gates
