#include "gates/top_k_gate.h"

#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

gates::GateOutput run(const Arguments& arguments) {
  constexpr const char* kName = "top_k_gate";
  const Tensor weight = router_matrix(kName, arguments);
  const int64_t E = weight.size(0);
  auto options = with_key(gates::TopKGateOptions(weight.size(1), E), arguments)
                     .top_k(arguments.integer("top_k"))
                     .route_scale(arguments.real("route_scale"))
                     .aux_loss_coeff(arguments.real("aux_loss_coeff"))
                     .z_loss_coeff(arguments.real("z_loss_coeff"))
                     .balance_coeff(arguments.real("balance_coeff"))
                     .normalize_by_k(arguments.flag("normalize_by_k"))
                     .input_norm(input_norm(arguments))
                     .num_groups(arguments.integer("num_groups"))
                     .topk_groups(arguments.integer("topk_groups"))
                     .jitter_eps(arguments.real("jitter_eps"));
  options.score_function(
      choice<kernels::ScoreFunction>(kName, "score_function", arguments.text("score_function"),
                                     {{"softmax", kernels::ScoreFunction::kSoftmax},
                                      {"sigmoid", kernels::ScoreFunction::kSigmoid},
                                      {"sqrt_softplus", kernels::ScoreFunction::kSqrtSoftplus}}));
  options.normalization(choice<gates::Normalization>(kName, "normalization",
                                                     arguments.text("normalization"),
                                                     {{"auto", gates::Normalization::kAuto},
                                                      {"selected", gates::Normalization::kSelected},
                                                      {"all", gates::Normalization::kAll}}));
  if (arguments.has("expert_bias")) options.bias_update_rate(1);  // the caller moves it
  const Tensor bias = arguments.tensor("bias"), expert_bias = arguments.tensor("expert_bias");
  require_sizes(kName, "bias", bias, {E});
  require_sizes(kName, "expert_bias", expert_bias, {E});

  gates::TopKGate gate(options);
  gate.weight = weight;
  gate.bias = bias;
  gate.expert_bias = expert_bias.defined() ? expert_bias.to(at::kFloat) : expert_bias;
  return gate.forward(gate_input(arguments, arguments.tensor("tokens")));
}

}  // namespace

GateOp top_k_op() {
  return {
      "top_k_gate",
      "Tensor tokens, Tensor weight, Tensor? bias=None, Tensor? expert_bias=None, *, int top_k, "
      "str score_function='softmax', str normalization='auto', float route_scale=1.0, "
      "float aux_loss_coeff=0.01, float z_loss_coeff=0.0, float balance_coeff=0.0, "
      "bool normalize_by_k=True, bool layer_norm=False, int num_groups=1, int topk_groups=1, "
      "float jitter_eps=0.0, " PERSEID_COMMON_ARGUMENTS,
      {"tokens", "weight", "bias"},
      {"aux_loss", "z_loss", "balance_loss"},
      &linear_shape,
      &run};
}

}  // namespace perseid::ops
