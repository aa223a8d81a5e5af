#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

struct StatisticalTopKGateOptions {
  StatisticalTopKGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;              ///< K, experts per token on average; below E
  TORCH_ARG(bool, unbiased) = false;          ///< std of a sample, over E - 1; else over E
  TORCH_ARG(bool, detach_threshold) = false;  ///< the threshold is a constant for the gradient
  TORCH_ARG(int64_t, min_experts) = 1;        ///< 0: a token may stay without expert
  TORCH_ARG(int64_t, cap) = 0;                ///< most experts of a token; 0: no bound
  TORCH_ARG(double, balance_coeff) = 0.0;     ///< of balance_entropy_loss; 0 switches it off
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kNone;
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// Statistical top-k (You et al. 2025, "Spark Transformer") as a router: weights max(z - theta, 0)
/// of the logits z = weight x, with theta = mean(z) + Q std(z) over the experts and Q the point
/// that a normal variable exceeds with probability K/E. So K experts on average if the logits of a
/// token are roughly normal, in linear time; the weights are not normalised. A token with no logit
/// above its threshold goes to its largest one (min_experts). Exactly the experts with weight above
/// 0 run, and gradients need no others. One expert: weight 1. Formulas:
/// kernels/statistical_top_k.h.
///
/// Parameter: weight [E, D], Glorot uniform; none for one expert. Loss: "balance_loss" (global) if
/// balance_coeff is not 0. A token with a NaN or an infinity in its logits goes to experts 0 .. K-1
/// with NaN weights. Keeps features, logits and weights [T, E] for the backward; no second
/// derivatives.
class StatisticalTopKGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit StatisticalTopKGate(const StatisticalTopKGateOptions& options);
  GateOutput forward(const GateInput& input) override;

  const StatisticalTopKGateOptions& options() const { return options_; }
  at::Tensor weight;  ///< [E, D], undefined for one expert

 private:
  StatisticalTopKGateOptions options_;
};

}  // namespace perseid::gates
