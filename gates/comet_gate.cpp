#include "gates/comet_gate.h"

#include <ATen/ops/zeros.h>

#include "gates/comet_core.h"
#include "gates/fixed_gate.h"
#include "gates/linear_router.h"
#include "gates/smooth_step_gate.h"

namespace perseid::gates {
namespace {

constexpr const char* kOperation = "comet_gate";
constexpr double kLeafBound = 0.05;

}  // namespace

CometGate::CometGate(const CometGateOptions& options)
    : Gate(kOperation, options.num_experts(), options.top_k()), options_(options) {
  validate_smooth_step(options, kOperation);
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

GateOutput CometGate::forward(const GateInput& input) {
  gates::validate(input, options_.d_model(), kOperation);
  const at::Tensor& tokens = input.tokens;
  if (num_experts() == 1) {
    GateOutput output = one_expert_per_token(
        input, at::zeros({tokens.size(0)}, tokens.options().dtype(at::kInt)), 1);
    add_smooth_step_losses(options_, at::zeros({}, tokens.options().dtype(at::kDouble)), input,
                           output);
    return output;
  }
  const int64_t E = num_experts(), K = top_k(), D = options_.d_model();
  if (options_.per_token()) {
    require_shape(split_weight, {K * (E - 1), D}, kOperation, "split_weight");
    require_shape(leaf_weight, {K * E, D}, kOperation, "leaf_weight");
  }
  require_shape(split_bias, {K * (E - 1)}, kOperation, "split_bias");
  require_shape(leaf_bias, {K * E}, kOperation, "leaf_bias");
  require(tokens.device() == leaf_bias.device(), kOperation, "tokens.device", tokens.device(),
          "differs from leaf_bias.device=" + to_text(leaf_bias.device()));
  CometCoreOptions core;
  core.kernel.gamma = options_.gamma();
  core.kernel.min_weight = options_.min_weight();
  core.kernel.hard_eval = options_.hard_eval() && !input.training;
  core.descent = options_.descent();
  core.num_experts = num_experts();
  core.num_trees = top_k();
  core.num_tokens = tokens.size(0);
  core.num_valid = count_valid(input);

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
      smooth_step_output(result, counts, input, num_experts(), core.num_valid, kOperation);
  add_smooth_step_losses(options_, result.entropy_sum, input, output);
  return output;
}

}  // namespace perseid::gates
