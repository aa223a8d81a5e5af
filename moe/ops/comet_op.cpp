#include "gates/comet_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

GateShape shape(const Arguments& arguments) {
  const int64_t E = arguments.integer("num_experts");
  return {arguments.tensor("tokens").sym_size(0), E, E,
          compute_type(arguments.tensor("leaf_bias"))};
}

gates::GateOutput run(const Arguments& arguments) {
  constexpr const char* kName = "comet_gate";
  const Tensor tokens = arguments.tensor("tokens");
  require(tokens.dim() == 2, kName, "tokens", tokens.sizes(), "is not [T, D]");
  const int64_t E = arguments.integer("num_experts"), K = arguments.integer("top_k");
  const int64_t D = tokens.size(1);
  const auto options = with_key(gates::CometGateOptions(D, E), arguments)
                           .top_k(K)
                           .gamma(arguments.real("gamma"))
                           .entropy_coeff(arguments.real("entropy_coeff"))
                           .balance_coeff(arguments.real("balance_coeff"))
                           .input_norm(input_norm(arguments))
                           .hard_eval(arguments.flag("hard_eval"))
                           .min_weight(arguments.real("min_weight"));
  gates::CometGate gate(options);
  gate.split_weight = arguments.tensor("split_weight");
  gate.split_bias = arguments.tensor("split_bias");
  gate.leaf_weight = arguments.tensor("leaf_weight");
  gate.leaf_bias = arguments.tensor("leaf_bias");
  require_sizes(kName, "split_weight", gate.split_weight, {K * (E - 1), D});
  require_sizes(kName, "split_bias", gate.split_bias, {K * (E - 1)});
  require_sizes(kName, "leaf_weight", gate.leaf_weight, {K * E, D});
  require_sizes(kName, "leaf_bias", gate.leaf_bias, {K * E});
  return gate.forward(gate_input(arguments, tokens));
}

}  // namespace

GateOp comet_op() {
  return {"comet_gate",
          "Tensor tokens, Tensor split_weight, Tensor split_bias, Tensor leaf_weight, Tensor "
          "leaf_bias, "
          "*, int num_experts, int top_k=2, float gamma=1.0, float entropy_coeff=0.1, "
          "float balance_coeff=0.0, bool layer_norm=True, bool hard_eval=False, float "
          "min_weight=0.0, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "split_weight", "split_bias", "leaf_weight", "leaf_bias"},
          {"entropy_loss", "balance_loss"},
          &shape,
          &run};
}

}  // namespace perseid::ops
