#include "gates/expert_choice_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

gates::GateOutput run(const Arguments& arguments) {
  const Tensor weight = router_matrix("expert_choice_gate", arguments);
  const auto options =
      with_key(gates::ExpertChoiceGateOptions(weight.size(1), weight.size(0)), arguments)
          .capacity_factor(arguments.real("capacity_factor"))
          .group_size(arguments.integer("group_size"))
          .input_norm(input_norm(arguments));
  gates::ExpertChoiceGate gate(options);
  gate.weight = weight;
  return gate.forward(gate_input(arguments, arguments.tensor("tokens")));
}

}  // namespace

GateOp expert_choice_op() {
  return {"expert_choice_gate",
          "Tensor tokens, Tensor weight, *, float capacity_factor=2.0, int group_size=0, "
          "bool layer_norm=False, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "weight"},
          {},
          &ragged_shape,
          &run};
}

}  // namespace perseid::ops
