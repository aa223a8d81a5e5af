#include "gates/smooth_step_gate.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <vector>

#include "gates/device.h"

namespace perseid::gates {

SmoothStepCounters::SmoothStepCounters(const at::Tensor& like)
    : removed_weight_(at::empty({1}, like.options().dtype(at::kDouble).requires_grad(false))),
      integers_(at::empty({3}, removed_weight_.options().dtype(at::kLong))) {}

SmoothStepCounts SmoothStepCounters::read(int64_t factor) const {
  const std::vector<at::Tensor> host = to_host({removed_weight_, integers_});
  const int64_t* integers = host[1].const_data_ptr<int64_t>();
  return {integers[0] * factor, integers[1] * factor, integers[2] * factor,
          *host[0].const_data_ptr<double>() * static_cast<double>(factor)};
}

using at::Tensor;

Tensor uniform_tensor(at::IntArrayRef sizes, double bound, kernels::RandomKey key) {
  Tensor values = at::empty(sizes, at::kFloat);
  kernels::fill_uniform(values.mutable_data_ptr(), values.numel(), kernels::DType::kFloat32, -bound,
                        bound, key);
  return values;
}

Tensor smooth_step_features(const GateInput& input, InputNorm norm, at::ScalarType type) {
  return gate_features(valid_tokens(input), norm, type);
}

NamedLoss mean_loss(const char* name, const Tensor& sum, double coeff, int64_t num_tokens,
                    at::ScalarType type) {
  const double scale = num_tokens > 0 ? 1.0 / static_cast<double>(num_tokens) : 0.0;
  return {name, sum.mul(coeff * scale).to(type), sum.detach().mul(scale).to(type)};
}

GateOutput smooth_step_output(const SmoothStepResult& result, const SmoothStepCounts& counts,
                              const GateInput& input, int64_t num_experts, int64_t num_valid,
                              const char* operation) {
  constexpr double kSaturatedMax = 0.99;
  GateOutput output;
  output.routing.num_tokens = input.tokens.size(0);
  output.routing.token_offsets = result.token_offsets;
  output.routing.expert_idx = result.expert_idx;
  output.routing.weights = result.weights;
  output.stats = count_assignments(output.routing, num_experts, num_valid);
  output.stats.num_nodes = counts.num_nodes;
  output.stats.saturated_nodes = counts.saturated_nodes;
  output.stats.non_finite_tokens = counts.non_finite_tokens;
  output.stats.removed_weight = counts.removed_weight;
  const auto limit = kSaturatedMax * static_cast<double>(counts.num_nodes);
  if (input.training && static_cast<double>(counts.saturated_nodes) > limit) {
    TORCH_WARN_ONCE("[", operation, "] saturated_nodes=", counts.saturated_nodes, " of ",
                    counts.num_nodes,
                    ": switches at exactly 0 or 1 pass no gradient and the gate hardly learns any "
                    "more; if this is early in training, use input_norm=layer_norm, a larger "
                    "gamma or a smaller learning rate of the gate");
  }
  return output;
}

}  // namespace perseid::gates
