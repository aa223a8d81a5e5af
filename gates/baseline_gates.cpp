#include "gates/baseline_gates.h"

#include <ATen/ops/full.h>

#include "gates/fixed_gate.h"
#include "gates/kernel_types.h"
#include "kernels/error.h"

namespace perseid::gates {

DenseGate::DenseGate(TopKGateOptions options)
    : Gate("dense_gate", options.num_experts(), options.num_experts()) {
  options.top_k(options.num_experts()).aux_loss_coeff(0);
  router_ = register_module("router", std::make_shared<TopKGate>(options));
}

GateOutput DenseGate::forward(const GateInput& input) { return router_->forward(input); }

SingleGate::SingleGate(int64_t num_experts, int64_t expert)
    : Gate("single_gate", num_experts, 1), expert_(expert) {
  require(expert >= 0 && expert < num_experts, "single_gate", "expert", expert,
          "is outside [0, num_experts=" + to_text(num_experts) + ")");
}

GateOutput SingleGate::forward(const GateInput& input) {
  validate(input, -1, "single_gate");
  stream_of(input.tokens, "single_gate");
  const at::Tensor expert_idx =
      at::full({input.tokens.size(0)}, expert_, input.tokens.options().dtype(at::kInt));
  return one_expert_per_token(input, expert_idx, num_experts());
}

}  // namespace perseid::gates
