#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

struct ReMoEGateOptions {
  ReMoEGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;             ///< experts per token that the L1 loss aims at
  TORCH_ARG(double, l1_coeff_start) = 1e-8;  ///< first value of l1_coeff, in [1e-12, 1e2]
  TORCH_ARG(double, l1_coeff_factor) = 1.2;  ///< above 1
  /// Each expert's part of the L1 loss is multiplied by its load over the mean load.
  TORCH_ARG(bool, l1_balance) = true;
  TORCH_ARG(InputNorm, input_norm) = InputNorm::kNone;
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// Weights relu(weight x), not normalised: any number of experts per token, also none (ReMoE, Wang
/// et al. 2025). A token without expert keeps its residual and shared path. An L1 loss whose
/// coefficient adapts holds the mean number near top_k: after each step it is multiplied by
/// l1_coeff_factor if tokens used more experts than that, else divided, within [1e-12, 1e2].
/// Loss: with l1_balance "aux_loss" by the balance terms, l1_coeff * E / (K T^2) * sum_i count_i *
/// sum_t relu(z_ti) with T and the counts of all ranks; else "l1_loss", l1_coeff / T * sum of relu.
/// Parameter: weight [E, D], Glorot uniform. Buffer: l1_coeff, a float64 scalar whose type casts of
/// the module leave.
class ReMoEGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit ReMoEGate(const ReMoEGateOptions& options);
  GateOutput forward(const GateInput& input) override;
  /// Reads num_tokens and num_assignments alone, so they may be summed over layers, as the paper
  /// does, to keep one coefficient in all of them.
  void after_step(const GateStats& global_stats) override;

  const ReMoEGateOptions& options() const { return options_; }
  at::Tensor weight;    ///< [E, D]
  at::Tensor l1_coeff;  ///< scalar float64

  using Gate::to;
  void to(at::Device device, at::ScalarType dtype, bool non_blocking = false) override;
  void to(at::ScalarType dtype, bool non_blocking = false) override;

 private:
  ReMoEGateOptions options_;
};

}  // namespace perseid::gates
