#include "gates/fixed_gate.h"

#include <ATen/ops/ones.h>

namespace perseid::gates {

GateOutput one_expert_per_token(const GateInput& input, const at::Tensor& expert_idx,
                                int64_t num_experts) {
  const int64_t T = input.tokens.size(0);
  GateOutput output;
  output.routing.num_tokens = T;
  output.routing.top_k = 1;
  output.routing.expert_idx = expert_idx;
  output.routing.weights =
      at::ones({T}, input.tokens.options().dtype(
                        input.tokens.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  int64_t num_valid = T;
  if (input.valid.has_value()) {
    output.routing = without_invalid(output.routing, *input.valid);
    num_valid = output.routing.num_assignments();
  }
  output.stats = count_assignments(output.routing, num_experts, num_valid);
  return output;
}

}  // namespace perseid::gates
