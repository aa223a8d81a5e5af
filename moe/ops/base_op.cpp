#include "gates/base_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

/// Of the two parts of BASE the expert's weight alone: what is left to the token is 1 - weight.
gates::GateOutput run(const Arguments& arguments) {
  const Tensor weight = router_matrix("base_gate", arguments);
  gates::BaseGate gate(with_key(gates::BaseGateOptions(weight.size(1), weight.size(0)), arguments)
                           .group_size(arguments.integer("group_size")));
  gate.weight = weight;
  return gate.forward(gate_input(arguments, arguments.tensor("tokens")));
}

GateShape one_expert_shape(const Arguments& arguments) {
  const Tensor weight = arguments.tensor("weight");
  return {arguments.tensor("tokens").sym_size(0), weight.sym_size(0), 1, compute_type(weight)};
}

}  // namespace

GateOp base_op() {
  return {"base_gate",
          "Tensor tokens, Tensor weight, *, int group_size=0, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "weight"},
          {},
          &one_expert_shape,
          &run};
}

}  // namespace perseid::ops
