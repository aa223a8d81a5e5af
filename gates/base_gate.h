#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

struct BaseGateOptions {
  BaseGateOptions(int64_t d_model, int64_t num_experts)
      : d_model_(d_model), num_experts_(num_experts) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, num_experts);
  /// Tokens with consecutive global ids that are shared out equally; 0: the tokens of each call.
  /// With another value each rank must hold whole groups.
  TORCH_ARG(int64_t, group_size) = 0;
  TORCH_ARG(double, init_gain) = 0.1;  ///< length of the expert vectors at the start; above 0
  TORCH_ARG(uint64_t, seed) = 0;
  TORCH_ARG(int64_t, layer_id) = 0;
  TORCH_ARG(int64_t, gate_id) = 0;
};

/// One expert per token by a balanced assignment (BASE layers, Lewis et al. 2021). In training the
/// n valid tokens of a group go to the experts so that the sum of the scores x . c_e is largest and
/// every expert has n / E tokens, rounded down or up (kernels::assign_balanced); outside of
/// training each token goes to its best expert, equal scores to the smaller id. With alpha =
/// sigmoid(x . c_e) of the token's expert the layer's output is alpha f(x) + (1 - alpha) x: alpha
/// is the weight, 1 - alpha GateOutput::residual_weight. The choice has no gradient, all of it goes
/// through alpha. So the experts need d_out = d_in.
///
/// In training a score that is not finite counts as the smallest finite one of the group; alpha
/// keeps the NaN. Not causal in training: the choice depends on all tokens of the group. With
/// group_size = 0 that is what one rank holds in one call, so results depend on the number of ranks
/// and on micro-batches; with a fixed group_size they do not.
///
/// Parameter: weight [E, D], rows orthogonal and of length init_gain (for E > D the columns are),
/// by seed, layer and gate equal on every rank. One expert: alpha as above, so the gradient stays.
/// Sequential in training, up to O(n^2 E) for a group of n: 2 to 30 ms for 1024 tokens and 32
/// experts, 70 to 560 ms for 4096 and 64. No losses; no second derivatives.
class BaseGate : public Gate {
 public:
  /// Throws ConfigError for options out of range, naming option, value and limit.
  explicit BaseGate(const BaseGateOptions& options);
  /// Throws ConfigError if group_size is not 0 and a group is not here as a whole.
  GateOutput forward(const GateInput& input) override;

  const BaseGateOptions& options() const { return options_; }
  at::Tensor weight;  ///< [E, D] the vectors c_e

 private:
  BaseGateOptions options_;
};

}  // namespace perseid::gates
