#include "gates/statistical_top_k_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

gates::GateOutput run(const Arguments& arguments) {
  const Tensor weight = router_matrix("statistical_top_k_gate", arguments);
  const auto options =
      with_key(gates::StatisticalTopKGateOptions(weight.size(1), weight.size(0)), arguments)
          .top_k(arguments.integer("top_k"))
          .unbiased(arguments.flag("unbiased"))
          .detach_threshold(arguments.flag("detach_threshold"))
          .min_experts(arguments.integer("min_experts"))
          .cap(arguments.integer("cap"))
          .balance_coeff(arguments.real("balance_coeff"))
          .input_norm(input_norm(arguments));
  gates::StatisticalTopKGate gate(options);
  gate.weight = weight;
  return gate.forward(gate_input(arguments, arguments.tensor("tokens")));
}

}  // namespace

GateOp statistical_top_k_op() {
  return {"statistical_top_k_gate",
          "Tensor tokens, Tensor weight, *, int top_k=2, bool unbiased=False, "
          "bool detach_threshold=False, int min_experts=1, int cap=0, float balance_coeff=0.0, "
          "bool layer_norm=False, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "weight"},
          {"balance_loss"},
          &ragged_shape,
          &run};
}

}  // namespace perseid::ops
