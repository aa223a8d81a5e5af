#include "gates/fixed_gate.h"

#include <ATen/ops/full.h>

namespace perseid::gates {

GateOutput one_expert_per_token(const GateInput& input, const at::Tensor& expert_idx,
                                int64_t num_experts) {
  return equal_experts_per_token(input, expert_idx.unsqueeze(1), num_experts);
}

GateOutput equal_experts_per_token(const GateInput& input, const at::Tensor& expert_idx,
                                   int64_t num_experts) {
  const int64_t T = input.tokens.size(0), K = expert_idx.size(1);
  const at::ScalarType type = input.tokens.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  GateOutput output;
  output.routing.num_tokens = T;
  output.routing.top_k = K;
  output.routing.expert_idx = expert_idx.reshape({-1});
  output.routing.weights =
      at::full({T * K}, 1 / static_cast<double>(K), input.tokens.options().dtype(type));
  int64_t num_valid = T;
  if (input.valid.has_value()) {
    output.routing = without_invalid(output.routing, *input.valid);
    num_valid = output.routing.num_assignments() / K;
  }
  output.stats = count_assignments(output.routing, num_experts, num_valid);
  return output;
}

}  // namespace perseid::gates
