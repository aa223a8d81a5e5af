#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

/// When a token uses its second expert, by g2 = p2 / (p1 + p2).
enum class SecondPolicy : uint8_t {
  kAll,        ///< always
  kNone,       ///< never: one expert per token
  kThreshold,  ///< g2 > second_threshold
  kRandom,     ///< with probability min(1, g2 / second_threshold) in training, always else
};

struct GShardGateOptions {
  GShardGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(SecondPolicy, second_policy) = SecondPolicy::kRandom;
  TORCH_ARG(double, second_threshold) = 0.2;
  /// In training the second expert is the best of logits plus Gumbel noise (DeepSpeed), so a sample
  /// of the softmax without the first.
  TORCH_ARG(bool, gumbel_second) = false;
  /// Weights are divided by the sum of those that are left, so that one expert alone has weight 1.
  /// false (mesh-tensorflow): by p1 + p2, what a token loses stays lost.
  TORCH_ARG(bool, normalize_after_drop) = false;
  TORCH_ARG(double, aux_loss_coeff) = 1e-2;
  TORCH_ARG(double, z_loss_coeff) = 0.0;
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kNone;
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// The best expert and, by a policy, the second one of each token (GShard, Lepikhin et al. 2020).
/// Weights are p1 and p2 of p = softmax(weight x), divided by p1 + p2 + 1e-9; rows have one or two
/// experts. Parameter: weight [E, D], Glorot uniform. Loss "aux_loss": coeff * E * sum_i f_i p_i, f
/// the share of first choices (GShard's E^2 * mean), a loss of global sums; "z_loss" if asked for.
/// Nominal top_k: min(2, E).
class GShardGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit GShardGate(const GShardGateOptions& options);
  GateOutput forward(const GateInput& input) override;

  const GShardGateOptions& options() const { return options_; }
  at::Tensor weight;  ///< [E, D]

 private:
  at::Tensor sampled_second(const GateInput& input, const at::Tensor& scores,
                            const at::Tensor& table) const;
  at::Tensor is_second_kept(const GateInput& input, const at::Tensor& second_share) const;

  GShardGateOptions options_;
};

}  // namespace perseid::gates
