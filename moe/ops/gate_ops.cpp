// The gates as operations: what each takes, how large its outputs are, and the call of the gate.
#include <ATen/ops/zeros.h>

#include "gates/comet_gate.h"
#include "gates/hash_gate.h"
#include "gates/top_k_gate.h"
#include "moe/ops/gate_op.h"

namespace perseid::ops {
namespace {

using at::Tensor;

// Arguments of every gate.
#define PERSEID_COMMON_ARGUMENTS                                                                  \
  "Tensor? valid=None, bool training=False, int tokens_global=0, int first_token=0, int step=0, " \
  "int seed=0, int layer_id=0, int gate_id=0"

gates::GateInput gate_input(const Arguments& arguments, const Tensor& tokens) {
  gates::GateInput input;
  input.tokens = tokens;
  if (arguments.has("valid")) input.valid = arguments.tensor("valid");
  input.training = arguments.flag("training");
  input.tokens_global = arguments.integer("tokens_global");
  input.first_token = arguments.integer("first_token");
  input.step = arguments.integer("step");
  return input;
}

template <typename Options>
Options with_key(Options options, const Arguments& arguments) {
  return options.seed(static_cast<uint64_t>(arguments.integer("seed")))
      .layer_id(arguments.integer("layer_id"))
      .gate_id(arguments.integer("gate_id"));
}

at::ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

gates::InputNorm input_norm(const Arguments& arguments) {
  return arguments.flag("layer_norm") ? gates::InputNorm::kLayerNorm : gates::InputNorm::kNone;
}

/// Shape of a gate with a linear router: `weight` [E, D] and `top_k`.
GateShape linear_shape(const Arguments& arguments) {
  const Tensor weight = arguments.tensor("weight");
  return {arguments.tensor("tokens").sym_size(0), weight.sym_size(0), arguments.integer("top_k"),
          compute_type(weight)};
}

/// The weight of a linear router, which decides E and D.
Tensor router_matrix(const char* operation, const Arguments& arguments) {
  const Tensor weight = arguments.tensor("weight");
  require(weight.dim() == 2 && weight.is_floating_point(), operation, "weight", weight.sizes(),
          "is not a floating [E, D] matrix");
  return weight;
}

// ---- top_k_gate
// ----------------------------------------------------------------------------------
gates::GateOutput run_top_k(const Arguments& arguments) {
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
      &run_top_k};
}

// ---- comet_gate
// ----------------------------------------------------------------------------------
GateShape comet_shape(const Arguments& arguments) {
  const int64_t E = arguments.integer("num_experts");
  return {arguments.tensor("tokens").sym_size(0), E, E,
          compute_type(arguments.tensor("leaf_bias"))};
}

gates::GateOutput run_comet(const Arguments& arguments) {
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

GateOp comet_op() {
  return {"comet_gate",
          "Tensor tokens, Tensor split_weight, Tensor split_bias, Tensor leaf_weight, Tensor "
          "leaf_bias, "
          "*, int num_experts, int top_k=2, float gamma=1.0, float entropy_coeff=0.1, "
          "float balance_coeff=0.0, bool layer_norm=True, bool hard_eval=False, float "
          "min_weight=0.0, " PERSEID_COMMON_ARGUMENTS,
          {"tokens", "split_weight", "split_bias", "leaf_weight", "leaf_bias"},
          {"entropy_loss", "balance_loss"},
          &comet_shape,
          &run_comet};
}

// ---- hash_gate
// -----------------------------------------------------------------------------------
GateShape hash_shape(const Arguments& arguments) {
  return {arguments.tensor("keys").sym_size(0), arguments.integer("num_experts"), 1, at::kFloat};
}

gates::GateOutput run_hash(const Arguments& arguments) {
  const Tensor keys = arguments.tensor("keys");
  require(keys.dim() == 1, "hash_gate", "keys", keys.sizes(), "is not [T]");
  auto options = gates::HashGateOptions(arguments.integer("num_experts"))
                     .seed(static_cast<uint64_t>(arguments.integer("seed")));
  if (arguments.has("table")) {
    options.mode(gates::HashMode::kTable).table(arguments.tensor("table"));
  }
  gates::GateInput input = gate_input(arguments, at::zeros({keys.size(0), 0}, at::kFloat));
  input.keys = keys;
  return gates::HashGate(options).forward(input);
}

GateOp hash_op() {
  return {
      "hash_gate", "Tensor keys, Tensor? table=None, *, int num_experts, " PERSEID_COMMON_ARGUMENTS,
      {},          {},
      &hash_shape, &run_hash};
}

}  // namespace

const std::vector<GateOp>& gate_ops() {
  static const std::vector<GateOp> ops = {top_k_op(), comet_op(), hash_op()};
  return ops;
}

}  // namespace perseid::ops
