#pragma once
#include <cmath>
#include <cstdint>
#include <string>

#include "gates/gate.h"
#include "gates/gate_parts.h"
#include "gates/losses.h"
#include "gates/schedule.h"
#include "kernels/error.h"
#include "kernels/random.h"

// Internal: what gates of smooth-step switches (COMET, DSelect-k) have in common.

namespace perseid::gates {

/// Throws ConfigError for the options that both kinds have.
template <typename Options>
void validate_smooth_step(const Options& options, const char* operation) {
  require_d_model(operation, options.d_model());
  require_product({options.top_k(), options.num_experts(), options.d_model()}, operation,
                  "top_k*num_experts*d_model");
  // Not a subnormal number in float32: the slope of a switch is divided by it.
  require(options.gamma() > 0 && std::isnormal(static_cast<float>(options.gamma())), operation,
          "gamma", options.gamma(),
          "is not a finite number above 0; choose the width of the switches, 1 by default");
  require_coefficient(operation, "entropy_coeff", options.entropy_coeff());
  require_coefficient(operation, "balance_coeff", options.balance_coeff());
  options.entropy_schedule().validate(operation);
  const double share = 1.0 / static_cast<double>(options.num_experts());
  require(options.min_weight() >= 0 && options.min_weight() < share, operation, "min_weight",
          options.min_weight(),
          "is outside [0, 1/num_experts=" + to_text(share) +
              "), the weight of an expert at equal shares; choose 0 for exact weights");
}

/// Key of the initial values of a gate.
template <typename Options>
kernels::RandomKey initial_key(const Options& options) {
  return kernels::random_key(options.seed())
      .with(static_cast<uint64_t>(options.layer_id()))
      .with(static_cast<uint64_t>(options.gate_id()));
}

/// A float32 tensor of values uniform in [-bound, bound), keyed by `key` and the position alone.
at::Tensor uniform_tensor(at::IntArrayRef sizes, double bound, kernels::RandomKey key);

/// gate_features of the valid tokens, zeros for the others.
at::Tensor smooth_step_features(const GateInput& input, InputNorm norm, at::ScalarType type);

/// What the differentiable core of such a gate returns.
struct SmoothStepResult {
  at::Tensor token_offsets;  ///< [T+1] int32
  at::Tensor expert_idx;     ///< [A] int32
  at::Tensor weights;        ///< [A] differentiable
  at::Tensor entropy_sum;    ///< scalar float64, differentiable: sum over valid tokens of the
                             ///< entropy of their trees or selectors
};

/// Values only; the fields of GateStats of the same names.
struct SmoothStepCounts {
  int64_t num_nodes = 0;
  int64_t saturated_nodes = 0;
  int64_t non_finite_tokens = 0;
  double removed_weight = 0;
};

/// Where a kernel writes these counts: next to the data it reads.
class SmoothStepCounters {
 public:
  /// @param like  a tensor of the kernel's input
  explicit SmoothStepCounters(const at::Tensor& like);
  double* removed_weight() const { return removed_weight_.mutable_data_ptr<double>(); }
  int64_t* num_nodes() const { return field(0); }
  int64_t* saturated_nodes() const { return field(1); }
  int64_t* non_finite_tokens() const { return field(2); }
  /// The counts, each times `factor`. Waits for the kernel.
  SmoothStepCounts read(int64_t factor) const;

 private:
  int64_t* field(int64_t i) const { return integers_.mutable_data_ptr<int64_t>() + i; }
  at::Tensor removed_weight_, integers_;
};

/// coeff * sum / num_tokens in `type`, 0 if num_tokens is 0.
NamedLoss mean_loss(const char* name, const at::Tensor& sum, double coeff, int64_t num_tokens,
                    at::ScalarType type);

/// Routing and statistics. In training it warns, once in the process, if more than 99 % of the
/// switches are saturated: these pass no gradient.
GateOutput smooth_step_output(const SmoothStepResult& result, const SmoothStepCounts& counts,
                              const GateInput& input, int64_t num_experts, int64_t num_valid,
                              const char* operation);

/// Adds "entropy_loss" and "balance_loss" as far as their coefficients are not 0.
/// @param entropy_tokens  divisor of entropy_sum; 0: the tokens of all ranks
template <typename Options>
void add_smooth_step_losses(const Options& options, const at::Tensor& entropy_sum,
                            const GateInput& input, GateOutput& output,
                            int64_t entropy_tokens = 0) {
  if (options.entropy_coeff() > 0) {
    if (entropy_tokens == 0) entropy_tokens = tokens_global_of(input, output.stats.num_tokens);
    output.losses.push_back(
        mean_loss("entropy_loss", entropy_sum,
                  options.entropy_coeff() * options.entropy_schedule().at(input.progress),
                  entropy_tokens, output.routing.weights.scalar_type()));
  }
  if (options.balance_coeff() > 0) {
    output.global_losses.push_back(balance_entropy_loss(
        weight_per_expert(output.routing, options.num_experts()), options.balance_coeff()));
  }
}

}  // namespace perseid::gates
