#include "gates/top_k_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <utility>

#include "gates/linear_router.h"
#include "gates/losses.h"
#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid::gates {
namespace {

constexpr const char* kOperation = "top_k_gate";

void validate(const TopKGateOptions& options) {
  require(options.d_model() >= 1, kOperation, "d_model", options.d_model(),
          "is below 1; give the width of the tokens");
  require(std::isfinite(options.route_scale()) && options.route_scale() > 0, kOperation,
          "route_scale", options.route_scale(),
          "is not a finite number above 0; choose 1 for weights that are not scaled");
  const auto require_coefficient = [](const char* argument, double value) {
    require(std::isfinite(value) && value >= 0, kOperation, argument, value,
            "is not a finite number from 0 on; choose 0 to switch the loss off");
  };
  require_coefficient("aux_loss_coeff", options.aux_loss_coeff());
  require_coefficient("z_loss_coeff", options.z_loss_coeff());
}

bool normalizes_selection(const TopKGateOptions& options) {
  if (options.normalization() == Normalization::kAuto) return options.top_k() >= 2;
  return options.normalization() == Normalization::kSelected;
}

}  // namespace

TopKGate::TopKGate(const TopKGateOptions& options)
    : Gate(kOperation, options.num_experts(), options.top_k()), options_(options) {
  validate(options);
  if (options.top_k() == 1 && options.num_experts() > 1 && normalizes_selection(options)) {
    TORCH_WARN_ONCE(
        "[top_k_gate] top_k=1 with normalization=selected gives every weight the "
        "constant route_scale: the router gets no gradient from the output; choose "
        "normalization=auto or all");
  }
  weight = register_parameter("weight",
                              at::empty({options.num_experts(), options.d_model()}, at::kFloat));
  const double bound = std::sqrt(6.0 / static_cast<double>(weight.size(0) + weight.size(1)));
  const kernels::RandomKey key = kernels::random_key(options.seed())
                                     .with(static_cast<uint64_t>(options.layer_id()))
                                     .with(static_cast<uint64_t>(options.gate_id()));
  kernels::fill_uniform(weight.mutable_data_ptr(), weight.numel(), kernels::DType::kFloat32, -bound,
                        bound, key);
  if (options.bias()) {
    bias = register_parameter("bias", at::zeros({options.num_experts()}, at::kFloat));
  }
}

GateOutput TopKGate::forward(const GateInput& input) {
  gates::validate(input, options_.d_model(), kOperation);
  require(input.tokens.device() == weight.device(), kOperation, "tokens.device",
          input.tokens.device(), "differs from weight.device=" + to_text(weight.device()));
  LinearRouterOptions router;
  router.scores.score_function = options_.score_function();
  router.scores.normalize = normalizes_selection(options_);
  router.scores.route_scale = options_.route_scale();
  router.top_k = options_.top_k();
  router.score_sum = options_.aux_loss_coeff() > 0;
  router.lse_square_sum = options_.z_loss_coeff() > 0;

  // Without a norm the router reads the tokens as they are, and so keeps no second copy of them.
  const at::Tensor features =
      options_.input_norm() == InputNorm::kNone
          ? input.tokens
          : gate_features(input.tokens, options_.input_norm(), router_compute_type(weight));
  const at::Tensor valid = input.valid.value_or(at::Tensor());
  LinearRouterOutput routed = linear_router(features, weight, bias, valid, router);

  GateOutput output;
  output.stats.num_tokens = valid.defined() ? valid.sum().item<int64_t>() : input.tokens.size(0);
  output.stats.num_assignments = output.stats.num_tokens * top_k();
  output.stats.tokens_per_expert = routed.tokens_per_expert;
  output.stats.non_finite_tokens = routed.non_finite_tokens;
  output.routing.num_tokens = input.tokens.size(0);
  output.routing.top_k = top_k();
  output.routing.expert_idx = routed.expert_idx;
  output.routing.weights = routed.weights;
  if (valid.defined()) output.routing = without_invalid(output.routing, valid);

  if (options_.aux_loss_coeff() > 0) {
    output.balance = {routed.score_sum, routed.tokens_per_expert, options_.aux_loss_coeff(),
                      top_k(), options_.normalize_by_k()};
  }
  if (options_.z_loss_coeff() > 0) {
    const int64_t tokens_global =
        input.tokens_global > 0 ? input.tokens_global : output.stats.num_tokens;
    output.losses.push_back(z_loss(routed.lse_square_sum, options_.z_loss_coeff(), tokens_global));
  }
  return output;
}

}  // namespace perseid::gates
