#include "gates/comet_gate.h"

#include <ATen/ops/zeros.h>

#include "gates/comet_core.h"
#include "gates/fixed_gate.h"
#include "gates/linear_router.h"
#include "gates/smooth_step_gate.h"
#include "gates/tree_parts.h"

namespace perseid::gates {
namespace {

constexpr double kLeafBound = 0.05;

/// Of a gate with more than one expert.
void require_parameters(const CometGate& gate, const GateInput& input) {
  const int64_t E = gate.num_experts(), K = gate.top_k(), D = gate.options().d_model();
  if (gate.options().per_token()) {
    require_shape(gate.split_weight, {K * (E - 1), D}, kCometGate, "split_weight");
    require_shape(gate.leaf_weight, {K * E, D}, kCometGate, "leaf_weight");
  }
  require_shape(gate.split_bias, {K * (E - 1)}, kCometGate, "split_bias");
  require_shape(gate.leaf_bias, {K * E}, kCometGate, "leaf_bias");
  require(input.tokens.device() == gate.leaf_bias.device(), kCometGate, "tokens.device",
          input.tokens.device(),
          "differs from leaf_bias.device=" + to_text(gate.leaf_bias.device()));
}

}  // namespace

CometGate::CometGate(const CometGateOptions& options)
    : TreeGate(kCometGate, options.num_experts(), options.top_k()), options_(options) {
  validate_smooth_step(options, kCometGate);
  const int64_t E = options.num_experts(), K = options.top_k(), D = options.d_model();
  if (E == 1) return;
  const kernels::RandomKey key = initial_key(options);
  const double split_bound = options.gamma() / 100;
  if (options.per_token()) {
    split_weight = register_parameter("split_weight",
                                      uniform_tensor({K * (E - 1), D}, split_bound, key.with(0)));
    leaf_weight =
        register_parameter("leaf_weight", uniform_tensor({K * E, D}, kLeafBound, key.with(1)));
  }
  split_bias =
      register_parameter("split_bias", uniform_tensor({K * (E - 1)}, split_bound, key.with(2)));
  leaf_bias = register_parameter("leaf_bias", uniform_tensor({K * E}, kLeafBound, key.with(3)));
}

GateOutput CometGate::forward_mapped(const GateInput& input, const at::Tensor& expert_map) {
  gates::validate(input, options_.d_model(), kCometGate);
  const at::Tensor& tokens = input.tokens;
  const at::Tensor map = checked_expert_map(expert_map, *this, tokens.device(), kCometGate);
  if (num_experts() == 1) {
    GateOutput output = one_expert_per_token(
        input, at::zeros({tokens.size(0)}, tokens.options().dtype(at::kInt)), 1);
    add_smooth_step_losses(options_, at::zeros({}, tokens.options().dtype(at::kDouble)), input,
                           output);
    return output;
  }
  require_parameters(*this, input);
  CometCoreOptions core;
  core.kernel.gamma = options_.gamma();
  core.kernel.min_weight = options_.min_weight();
  core.kernel.hard_eval = options_.hard_eval() && !input.training;
  core.descent = options_.descent();
  core.num_experts = num_experts();
  core.num_trees = top_k();
  core.num_tokens = tokens.size(0);
  core.num_valid = count_valid(input);
  core.expert_map = map;

  const at::Tensor features =
      options_.per_token()
          ? smooth_step_features(input, options_.input_norm(), router_compute_type(leaf_bias))
                .contiguous()
          : at::Tensor();
  SmoothStepCounts counts;
  const SmoothStepResult result =
      comet_core(features, {split_weight, split_bias, leaf_weight, leaf_bias},
                 input.valid.value_or(at::Tensor()), core, counts);
  GateOutput output =
      smooth_step_output(result, counts, input, num_experts(), core.num_valid, kCometGate);
  add_smooth_step_losses(options_, result.entropy_sum, input, output);
  return output;
}

at::Tensor CometGate::tree_weights(const GateInput& input) {
  gates::validate(input, options_.d_model(), kCometGate);
  if (num_experts() == 1) return one_expert_tree_weights(input);
  require_parameters(*this, input);
  const auto logits_of = [&](const at::Tensor& weight, const at::Tensor& bias) {
    if (!options_.per_token()) return bias.to(router_compute_type(bias)).unsqueeze(0);
    return linear_logits(router_features(input, options_.input_norm(), weight), weight, bias,
                         input.valid.value_or(at::Tensor()));
  };
  return for_tokens(
      comet_tree_weights(logits_of(split_weight, split_bias), logits_of(leaf_weight, leaf_bias),
                         top_k(), options_.gamma()),
      input);
}

}  // namespace perseid::gates
