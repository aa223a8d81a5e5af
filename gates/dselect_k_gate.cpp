#include "gates/dselect_k_gate.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include "gates/dselect_k_core.h"
#include "gates/fixed_gate.h"
#include "gates/linear_router.h"
#include "gates/smooth_step_gate.h"
#include "gates/tree_parts.h"

namespace perseid::gates {
namespace {

constexpr double kSelectorBound = 0.05;

/// [T, K*bits + K], or [1, ...] if not per token.
at::Tensor form_logits(const DSelectKGate& gate, const GateInput& input) {
  const at::Tensor bias = at::cat({gate.code_bias, gate.selector_bias});
  if (!gate.options().per_token()) return bias.to(router_compute_type(bias)).unsqueeze(0);
  const at::Tensor weight = at::cat({gate.code_weight, gate.selector_weight});
  return linear_logits(router_features(input, gate.options().input_norm(), weight), weight, bias,
                       input.valid.value_or(at::Tensor()));
}

/// Of a gate with more than one expert.
void require_device(const DSelectKGate& gate, const GateInput& input) {
  require(input.tokens.device() == gate.code_bias.device(), kDSelectKGate, "tokens.device",
          input.tokens.device(),
          "differs from code_bias.device=" + to_text(gate.code_bias.device()));
}

/// All losses of a gate, from the sums over tokens.
void add_losses(const DSelectKGateOptions& options, const at::Tensor& entropy_sum,
                const at::Tensor& penalty_sum, const GateInput& input, GateOutput& output) {
  const bool is_sum = options.entropy_reduction() == EntropyReduction::kSum;
  add_smooth_step_losses(options, entropy_sum, input, output, /*entropy_tokens=*/is_sum ? 1 : 0);
  const int64_t E = options.num_experts();
  const bool has_codes_without_expert = int64_t{1} << kernels::dselect_k_bits(E) != E;
  if (options.penalty_coeff() == 0 || !has_codes_without_expert) return;
  output.losses.push_back(mean_loss("penalty_loss", penalty_sum, options.penalty_coeff(),
                                    tokens_global_of(input, output.stats.num_tokens),
                                    output.routing.weights.scalar_type()));
}

}  // namespace

DSelectKGate::DSelectKGate(const DSelectKGateOptions& options)
    : TreeGate(kDSelectKGate, options.num_experts(), options.top_k()), options_(options) {
  validate_smooth_step(options, kDSelectKGate);
  require_coefficient(kDSelectKGate, "penalty_coeff", options.penalty_coeff());
  const int64_t K = options.top_k(), D = options.d_model();
  const int64_t num_switches = K * kernels::dselect_k_bits(options.num_experts());
  if (num_switches == 0) return;
  const kernels::RandomKey key = initial_key(options);
  const double code_bound = options.gamma() / 100;
  if (options.per_token()) {
    code_weight = register_parameter("code_weight",
                                     uniform_tensor({num_switches, D}, code_bound, key.with(0)));
    selector_weight =
        register_parameter("selector_weight", uniform_tensor({K, D}, kSelectorBound, key.with(1)));
  }
  code_bias =
      register_parameter("code_bias", uniform_tensor({num_switches}, code_bound, key.with(2)));
  selector_bias =
      register_parameter("selector_bias", uniform_tensor({K}, kSelectorBound, key.with(3)));
}

GateOutput DSelectKGate::forward_mapped(const GateInput& input, const at::Tensor& expert_map) {
  gates::validate(input, options_.d_model(), kDSelectKGate);
  const at::Tensor& tokens = input.tokens;
  const at::Tensor map = checked_expert_map(expert_map, *this, tokens.device(), kDSelectKGate);
  if (num_experts() == 1) {
    GateOutput output = one_expert_per_token(
        input, at::zeros({tokens.size(0)}, tokens.options().dtype(at::kInt)), 1);
    const at::Tensor zero = at::zeros({}, tokens.options().dtype(at::kDouble));
    add_losses(options_, zero, zero, input, output);
    return output;
  }
  require_device(*this, input);
  DSelectKCoreOptions core;
  core.kernel.gamma = options_.gamma();
  core.kernel.min_weight = options_.min_weight();
  core.kernel.hard_eval = options_.hard_eval() && !input.training;
  core.kernel.renormalize = options_.renormalize();
  core.num_experts = num_experts();
  core.num_selectors = top_k();
  core.num_tokens = tokens.size(0);
  core.num_valid = count_valid(input);
  core.per_token = options_.per_token();
  core.expert_map = map;

  SmoothStepCounts counts;
  const DSelectKResult result =
      dselect_k_core(form_logits(*this, input), input.valid.value_or(at::Tensor()), core, counts);
  GateOutput output =
      smooth_step_output(result.rows, counts, input, num_experts(), core.num_valid, kDSelectKGate);
  add_losses(options_, result.rows.entropy_sum, result.penalty_sum, input, output);
  return output;
}

at::Tensor DSelectKGate::tree_weights(const GateInput& input) {
  gates::validate(input, options_.d_model(), kDSelectKGate);
  if (num_experts() == 1) return one_expert_tree_weights(input);
  require_device(*this, input);
  return for_tokens(dselect_k_tree_weights(form_logits(*this, input), num_experts(), top_k(),
                                           options_.gamma(), options_.renormalize()),
                    input);
}

}  // namespace perseid::gates
