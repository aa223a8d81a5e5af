#include "gates/gshard_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

GateShape shape(const Arguments& arguments) {
  const Tensor weight = arguments.tensor("weight");
  return {arguments.tensor("tokens").sym_size(0), weight.sym_size(0), weight.sym_size(0).min(2),
          compute_type(weight)};
}

gates::GateOutput run(const Arguments& arguments) {
  constexpr const char* kName = "gshard_gate";
  const Tensor weight = router_matrix(kName, arguments);
  const auto policy =
      choice<gates::SecondPolicy>(kName, "second_policy", arguments.text("second_policy"),
                                  {{"all", gates::SecondPolicy::kAll},
                                   {"none", gates::SecondPolicy::kNone},
                                   {"threshold", gates::SecondPolicy::kThreshold},
                                   {"random", gates::SecondPolicy::kRandom}});
  const auto options = with_key(gates::GShardGateOptions(weight.size(1), weight.size(0)), arguments)
                           .second_policy(policy)
                           .second_threshold(arguments.real("second_threshold"))
                           .gumbel_second(arguments.flag("gumbel_second"))
                           .normalize_after_drop(arguments.flag("normalize_after_drop"))
                           .aux_loss_coeff(arguments.real("aux_loss_coeff"))
                           .z_loss_coeff(arguments.real("z_loss_coeff"))
                           .input_norm(input_norm(arguments));
  gates::GShardGate gate(options);
  gate.weight = weight;
  return gate.forward(gate_input(arguments, arguments.tensor("tokens")));
}

}  // namespace

GateOp gshard_op() {
  return {"gshard_gate",
          "Tensor tokens, Tensor weight, *, str second_policy='random', "
          "float second_threshold=0.2, bool gumbel_second=False, "
          "bool normalize_after_drop=False, float aux_loss_coeff=0.01, float z_loss_coeff=0.0, "
          "bool layer_norm=False, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "weight"},
          {"aux_loss", "z_loss"},
          &shape,
          &run};
}

}  // namespace perseid::ops
