#include "gates/remoe_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

gates::GateOutput run(const Arguments& arguments) {
  constexpr const char* kName = "remoe_gate";
  const Tensor weight = router_matrix(kName, arguments);
  const Tensor l1_coeff = arguments.tensor("l1_coeff");
  require(l1_coeff.numel() == 1 && l1_coeff.is_floating_point(), kName, "l1_coeff",
          l1_coeff.sizes(), "is not one floating number");
  const auto options = with_key(gates::ReMoEGateOptions(weight.size(1), weight.size(0)), arguments)
                           .top_k(arguments.integer("top_k"))
                           .l1_balance(arguments.flag("l1_balance"))
                           .input_norm(input_norm(arguments));
  gates::ReMoEGate gate(options);
  gate.weight = weight;
  gate.l1_coeff = l1_coeff;
  return gate.forward(gate_input(arguments, arguments.tensor("tokens")));
}

}  // namespace

// The caller moves l1_coeff after each step, see gates/remoe_gate.h.
GateOp remoe_op() {
  return {"remoe_gate",
          "Tensor tokens, Tensor weight, Tensor l1_coeff, *, int top_k=2, bool l1_balance=True, "
          "bool layer_norm=False, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "weight"},
          {"aux_loss", "l1_loss"},
          &ragged_shape,
          &run};
}

}  // namespace perseid::ops
