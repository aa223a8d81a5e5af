#include "gates/top_k_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <utility>

#include "gates/describe.h"
#include "gates/device.h"
#include "gates/draws.h"
#include "gates/gate_parts.h"
#include "gates/linear_router.h"
#include "gates/losses.h"
#include "gates/state_buffer.h"
#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid::gates {
namespace {

constexpr const char* kTopKGate = "top_k_gate";

void validate_groups(const TopKGateOptions& options) {
  const int64_t E = options.num_experts(), G = options.num_groups();
  const int64_t topk_groups = options.topk_groups();
  require(G >= 1 && E % G == 0, kTopKGate, "num_groups", G,
          "does not divide num_experts=" + to_text(E) + " into equal groups");
  require(topk_groups >= 1 && topk_groups <= G, kTopKGate, "topk_groups", topk_groups,
          "is outside [1, num_groups=" + to_text(G) + "]");
  require(options.top_k() <= topk_groups * (E / G), kTopKGate, "top_k", options.top_k(),
          "exceeds the " + to_text(topk_groups * (E / G)) +
              " experts of topk_groups=" + to_text(topk_groups) + " groups; use more groups");
  const bool is_max = options.score_function() == kernels::ScoreFunction::kSoftmax &&
                      options.bias_update_rate() == 0;
  require(G == 1 || is_max || E / G >= 2, kTopKGate, "num_groups", G,
          "leaves 1 expert in a group, but the two best rank it; choose at most " + to_text(E / 2));
}

void validate(const TopKGateOptions& options) {
  require_d_model(kTopKGate, options.d_model());
  require_product({options.num_experts(), options.d_model()}, kTopKGate, "num_experts*d_model");
  require(std::isfinite(options.route_scale()) && options.route_scale() > 0, kTopKGate,
          "route_scale", options.route_scale(),
          "is not a finite number above 0; choose 1 for weights that are not scaled");
  require_coefficient(kTopKGate, "aux_loss_coeff", options.aux_loss_coeff());
  require_coefficient(kTopKGate, "z_loss_coeff", options.z_loss_coeff());
  require_coefficient(kTopKGate, "balance_coeff", options.balance_coeff());
  require(std::isfinite(options.bias_update_rate()) && options.bias_update_rate() >= 0, kTopKGate,
          "bias_update_rate", options.bias_update_rate(),
          "is not a finite number from 0 on; choose 0 to route without expert_bias");
  require(options.jitter_eps() >= 0 && options.jitter_eps() < 1, kTopKGate, "jitter_eps",
          options.jitter_eps(), "is outside [0, 1); choose 0 to switch jitter off");
  validate_groups(options);
}

bool normalizes_selection(const TopKGateOptions& options) {
  if (options.normalization() == Normalization::kAuto) return options.top_k() >= 2;
  return options.normalization() == Normalization::kSelected;
}

}  // namespace

TopKGate::TopKGate(const TopKGateOptions& options)
    : Gate(kTopKGate, options.num_experts(), options.top_k()), options_(options) {
  validate(options);
  if (options.top_k() == 1 && options.num_experts() > 1 && normalizes_selection(options)) {
    TORCH_WARN_ONCE(
        "[top_k_gate] top_k=1 with normalization=selected gives every weight the "
        "constant route_scale: the router gets no gradient from the output; choose "
        "normalization=auto or all");
  }
  weight = register_parameter(
      "weight", router_weight(options.num_experts(), options.d_model(), options.seed(),
                              options.layer_id(), options.gate_id()));
  if (options.bias()) {
    bias = register_parameter("bias", at::zeros({options.num_experts()}, at::kFloat));
  }
  if (options.bias_update_rate() > 0) {
    expert_bias = register_buffer("expert_bias", at::zeros({options.num_experts()}, at::kFloat));
  }
}

void TopKGate::to(at::Device device, at::ScalarType dtype, bool non_blocking) {
  keep_types({expert_bias}, [&] { Gate::to(device, dtype, non_blocking); });
}
void TopKGate::to(at::ScalarType dtype, bool non_blocking) {
  keep_types({expert_bias}, [&] { Gate::to(dtype, non_blocking); });
}

void TopKGate::after_step(const GateStats& global_stats) {
  if (!expert_bias.defined()) return;
  const at::Tensor& counts = global_stats.tokens_per_expert;
  require(counts.defined() && counts.sizes() == expert_bias.sizes(), kTopKGate, "tokens_per_expert",
          describe(counts),
          "is not [num_experts=" + to_text(num_experts()) + "]; pass statistics of this gate");
  // mean - count in whole numbers: balanced counts leave the bias as it is.
  const at::Tensor lack = counts.sum().sub(counts.mul(num_experts())).sign();
  const at::NoGradGuard no_grad;
  expert_bias.add_(lack.to(expert_bias.device()).to(at::kFloat), options_.bias_update_rate());
}

at::Tensor TopKGate::features_of(const GateInput& input) const {
  const bool has_jitter = options_.jitter_eps() > 0 && input.training;
  // Without these the router reads the tokens as they are, and so keeps no second copy of them.
  if (!has_jitter && options_.input_norm() == InputNorm::kNone) return input.tokens;
  const at::ScalarType type = router_compute_type(weight);
  at::Tensor features = valid_tokens(input);
  if (has_jitter) {
    const at::Tensor factor = at::empty(features.sizes(), features.options().dtype(at::kFloat));
    const kernels::RandomKey key = draw_key(options_.seed(), input.step, options_.layer_id(),
                                            options_.gate_id(), Draw::kJitter);
    const int64_t first = input.first_token * options_.d_model();
    kernels::fill_uniform(factor.mutable_data_ptr(), factor.numel(), kernels::DType::kFloat32,
                          1 - options_.jitter_eps(), 1 + options_.jitter_eps(),
                          kernels::skip(key, static_cast<uint64_t>(first)),
                          stream_of(factor, kTopKGate));
    features = features.to(type).mul(factor);
  }
  return gate_features(features, options_.input_norm(), type);
}

GateOutput TopKGate::forward(const GateInput& input) {
  require_shape(weight, {num_experts(), options_.d_model()}, kTopKGate, "weight");
  if (bias.defined()) require_shape(bias, {num_experts()}, kTopKGate, "bias");
  if (expert_bias.defined()) require_shape(expert_bias, {num_experts()}, kTopKGate, "expert_bias");
  require_input(input, weight, kTopKGate);
  LinearRouterOptions router;
  router.scores.score_function = options_.score_function();
  router.scores.normalize = normalizes_selection(options_);
  router.scores.route_scale = options_.route_scale();
  router.scores.num_groups = options_.num_groups();
  router.scores.topk_groups = options_.topk_groups();
  router.top_k = options_.top_k();
  const bool by_sequence =
      options_.aux_loss_coeff() > 0 && options_.aux_scope() == AuxScope::kSequence;
  require(!by_sequence || input.sequence.has_value(), kTopKGate, "sequence", "none",
          "is needed with aux_scope=sequence; give the int64 sequence number of each token");
  router.score_shares = by_sequence;
  router.score_sum = options_.aux_loss_coeff() > 0 && !by_sequence;
  router.lse_square_sum = options_.z_loss_coeff() > 0;

  const at::Tensor valid = input.valid.value_or(at::Tensor());
  LinearRouterOutput routed =
      linear_router(features_of(input), weight, bias, valid, router, expert_bias);

  GateOutput output;
  output.stats.num_tokens = count_valid(input);
  output.stats.num_assignments = output.stats.num_tokens * top_k();
  output.stats.tokens_per_expert = routed.tokens_per_expert;
  output.stats.tokens_with_one_expert = top_k() == 1 ? output.stats.num_tokens : 0;
  output.stats.max_experts_per_token = output.stats.num_tokens > 0 ? top_k() : 0;
  if (is_on_device(input.tokens)) {
    output.stats.unread = at::stack({routed.non_finite_tokens.to(at::kDouble), routed.entropy_sum});
    if (!input.defer_counts) read_counts({&output.stats});
  } else {
    output.stats.non_finite_tokens = *routed.non_finite_tokens.const_data_ptr<int64_t>();
    output.stats.entropy_sum = *routed.entropy_sum.const_data_ptr<double>();
  }
  output.routing.num_tokens = input.tokens.size(0);
  output.routing.top_k = top_k();
  output.routing.expert_idx = routed.expert_idx;
  output.routing.weights = routed.weights;
  if (valid.defined()) output.routing = without_invalid(output.routing, valid);

  const int64_t tokens_global = tokens_global_of(input, output.stats.num_tokens);
  if (by_sequence) {
    output.routing.scores = routed.score_shares.detach();
    output.losses.push_back(sequence_balance_loss(
        routed.score_shares, routed.expert_idx.view({-1, top_k()}), *input.sequence,
        options_.aux_loss_coeff(), options_.normalize_by_k(), tokens_global));
  } else if (options_.aux_loss_coeff() > 0) {
    output.balance = {routed.score_sum, routed.tokens_per_expert, options_.aux_loss_coeff(),
                      top_k(), options_.normalize_by_k()};
  }
  if (options_.z_loss_coeff() > 0) {
    output.losses.push_back(z_loss(routed.lse_square_sum, options_.z_loss_coeff(), tokens_global));
  }
  if (options_.balance_coeff() > 0) {
    output.global_losses.push_back(balance_entropy_loss(
        weight_per_expert(output.routing, num_experts()), options_.balance_coeff()));
  }
  return output;
}

}  // namespace perseid::gates
