#include "gates/sinkhorn_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

gates::GateOutput run(const Arguments& arguments) {
  const Tensor weight = router_matrix("sinkhorn_gate", arguments);
  const auto options =
      with_key(gates::SinkhornGateOptions(weight.size(1), weight.size(0)), arguments)
          .top_k(arguments.integer("top_k"))
          .group_size(arguments.integer("group_size"))
          .max_iterations(arguments.integer("max_iterations"))
          .tolerance(arguments.real("tolerance"))
          .input_norm(input_norm(arguments));
  gates::SinkhornGate gate(options);
  gate.weight = weight;
  return gate.forward(gate_input(arguments, arguments.tensor("tokens")));
}

}  // namespace

GateOp sinkhorn_op() {
  return {"sinkhorn_gate",
          "Tensor tokens, Tensor weight, *, int top_k=1, int group_size=0, int max_iterations=50, "
          "float tolerance=1e-4, bool layer_norm=False, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "weight"},
          {},
          &linear_shape,
          &run};
}

}  // namespace perseid::ops
