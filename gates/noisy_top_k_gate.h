#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

enum class RouterNoise : uint8_t {
  /// Shazeer et al. 2017: the standard deviation softplus(noise_weight x) + noise_epsilon is
  /// learnt;
  /// weights are the softmax over the selection, importance is the sum of weights, and load of an
  /// expert is the probability that new noise of it alone would select it.
  kLearned,
  /// V-MoE (Riquelme et al. 2021): standard deviation noise_std / E; weights are the softmax over
  /// all experts, importance is the sum of that softmax without noise, and load compares with the
  /// K-th logit.
  kFixed,
};

struct NoisyTopKGateOptions {
  NoisyTopKGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;
  TORCH_ARG(RouterNoise, noise) = RouterNoise::kLearned;
  TORCH_ARG(double, noise_epsilon) = 1e-2;    ///< kLearned: the smallest standard deviation
  TORCH_ARG(double, noise_std) = 1.0;         ///< kFixed: times 1/E
  TORCH_ARG(double, importance_coeff) = 0.1;  ///< V-MoE: 0.005
  TORCH_ARG(double, load_coeff) = 0.1;        ///< V-MoE: 0.005
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kNone;
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// Exactly K experts per token by logits weight x + noise, in training; without noise else.
/// Parameters, both 0 at the start: weight [E, D] and, for kLearned, noise_weight [E, D]. The noise
/// of a token is keyed by its global id. With K = 1 weights are the softmax over all experts, as
/// that over the selection has no gradient.
/// Losses of global sums, both squared coefficients of variation: "importance_loss" and
/// "load_loss". Load is differentiable through the normal distribution; without noise and for
/// K = E it is the count of tokens, without gradient.
class NoisyTopKGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit NoisyTopKGate(const NoisyTopKGateOptions& options);
  GateOutput forward(const GateInput& input) override;

  const NoisyTopKGateOptions& options() const { return options_; }
  at::Tensor weight;        ///< [E, D]
  at::Tensor noise_weight;  ///< [E, D] or undefined

 private:
  /// Logits of one call. sigma and noise are undefined without noise.
  struct Logits {
    at::Tensor clean;  ///< [T, E]
    at::Tensor noisy;  ///< [T, E]
    at::Tensor sigma;  ///< [T, E] or a scalar
  };
  Logits logits_of(const GateInput& input) const;
  at::Tensor load_of(const Logits& logits, const GateInput& input) const;

  NoisyTopKGateOptions options_;
};

}  // namespace perseid::gates
