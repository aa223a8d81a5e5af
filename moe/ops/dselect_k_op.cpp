#include "gates/dselect_k_gate.h"

#include "kernels/dselect_k.h"
#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

GateShape shape(const Arguments& arguments) {
  const int64_t E = arguments.integer("num_experts");
  return {arguments.tensor("tokens").sym_size(0), E, E,
          compute_type(arguments.tensor("selector_bias"))};
}

gates::GateOutput run(const Arguments& arguments) {
  constexpr const char* kName = "dselect_k_gate";
  const Tensor tokens = arguments.tensor("tokens");
  require(tokens.dim() == 2, kName, "tokens", tokens.sizes(), "is not [T, D]");
  const int64_t E = arguments.integer("num_experts"), K = arguments.integer("top_k");
  const int64_t D = tokens.size(1);
  const auto options = with_key(gates::DSelectKGateOptions(D, E), arguments)
                           .top_k(K)
                           .gamma(arguments.real("gamma"))
                           .entropy_coeff(arguments.real("entropy_coeff"))
                           .penalty_coeff(arguments.real("penalty_coeff"))
                           .balance_coeff(arguments.real("balance_coeff"))
                           .renormalize(arguments.flag("renormalize"))
                           .input_norm(input_norm(arguments))
                           .hard_eval(arguments.flag("hard_eval"))
                           .min_weight(arguments.real("min_weight"));
  gates::DSelectKGate gate(options);
  gate.code_weight = arguments.tensor("code_weight");
  gate.code_bias = arguments.tensor("code_bias");
  gate.selector_weight = arguments.tensor("selector_weight");
  gate.selector_bias = arguments.tensor("selector_bias");
  const int64_t num_switches = K * kernels::dselect_k_bits(E);
  require_sizes(kName, "code_weight", gate.code_weight, {num_switches, D});
  require_sizes(kName, "code_bias", gate.code_bias, {num_switches});
  require_sizes(kName, "selector_weight", gate.selector_weight, {K, D});
  require_sizes(kName, "selector_bias", gate.selector_bias, {K});
  return gate.forward(gate_input(arguments, tokens));
}

}  // namespace

GateOp dselect_k_op() {
  return {"dselect_k_gate",
          "Tensor tokens, Tensor code_weight, Tensor code_bias, Tensor selector_weight, "
          "Tensor selector_bias, *, int num_experts, int top_k=2, float gamma=1.0, "
          "float entropy_coeff=0.1, float penalty_coeff=1.0, float balance_coeff=0.0, "
          "bool renormalize=False, bool layer_norm=True, bool hard_eval=False, "
          "float min_weight=0.0, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "code_weight", "code_bias", "selector_weight", "selector_bias"},
          {"entropy_loss", "penalty_loss", "balance_loss"},
          &shape,
          &run};
}

}  // namespace perseid::ops
