#include "gates/noisy_top_k_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/erfc.h>
#include <ATen/ops/full.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <utility>

#include "gates/device.h"
#include "gates/draws.h"
#include "gates/gate_parts.h"
#include "gates/linear_router.h"
#include "gates/losses.h"
#include "gates/router_call.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

constexpr const char* kNoisyTopKGate = "noisy_top_k_gate";

void validate(const NoisyTopKGateOptions& options) {
  require_d_model(kNoisyTopKGate, options.d_model());
  require_product({options.num_experts(), options.d_model()}, kNoisyTopKGate,
                  "num_experts*d_model");
  require(std::isfinite(options.noise_epsilon()) && options.noise_epsilon() > 0, kNoisyTopKGate,
          "noise_epsilon", options.noise_epsilon(),
          "is not a finite number above 0; load divides by the noise, 1e-2 is usual");
  require(std::isfinite(options.noise_std()) && options.noise_std() > 0, kNoisyTopKGate,
          "noise_std", options.noise_std(),
          "is not a finite number above 0; load divides by the noise, 1 is usual");
  require_coefficient(kNoisyTopKGate, "importance_coeff", options.importance_coeff());
  require_coefficient(kNoisyTopKGate, "load_coeff", options.load_coeff());
}

at::Tensor normal_cdf(const at::Tensor& x) { return at::erfc(x.mul(-std::sqrt(0.5))).mul(0.5); }

}  // namespace

NoisyTopKGate::NoisyTopKGate(const NoisyTopKGateOptions& options)
    : Gate(kNoisyTopKGate, options.num_experts(), options.top_k()), options_(options) {
  validate(options);
  const auto zeros = [&] {
    return at::zeros({options.num_experts(), options.d_model()}, at::kFloat);
  };
  weight = register_parameter("weight", zeros());
  if (options.noise() == RouterNoise::kLearned) {
    noise_weight = register_parameter("noise_weight", zeros());
  }
}

NoisyTopKGate::Logits NoisyTopKGate::logits_of(const GateInput& input) const {
  const at::Tensor valid = input.valid.value_or(at::Tensor());
  const at::Tensor features = router_features(input, options_.input_norm(), weight);
  Logits logits;
  logits.clean = logits.noisy = linear_logits(features, weight, {}, valid);
  if (!input.training) return logits;

  const at::Tensor noise = at::empty_like(logits.clean);
  const kernels::RandomKey key =
      draw_key(options_.seed(), input.step, options_.layer_id(), options_.gate_id(), Draw::kNoise);
  const auto first = static_cast<uint64_t>(input.first_token * num_experts());
  kernels::fill_normal(
      noise.mutable_data_ptr(), noise.numel(),
      noise.scalar_type() == at::kDouble ? kernels::DType::kFloat64 : kernels::DType::kFloat32, key,
      first, stream_of(noise, kNoisyTopKGate));
  if (options_.noise() == RouterNoise::kLearned) {
    logits.sigma = at::softplus(linear_logits(features, noise_weight, {}, valid))
                       .add(options_.noise_epsilon());
  } else {
    logits.sigma = at::full({}, options_.noise_std() / static_cast<double>(num_experts()),
                            logits.clean.options());
  }
  logits.noisy = logits.clean + noise.mul(logits.sigma);
  return logits;
}

at::Tensor NoisyTopKGate::load_of(const Logits& logits, const GateInput& input) const {
  LinearRouterOptions one_more;
  one_more.top_k = top_k() + 1;
  const at::Tensor valid = input.valid.value_or(at::Tensor());
  const at::Tensor best = route_logits(logits.noisy.detach().contiguous(), valid, {}, one_more)
                              .expert_idx.view({-1, one_more.top_k})
                              .clamp_min(0)
                              .to(at::kLong);
  const auto threshold = [&](int64_t rank) {
    return logits.noisy.gather(1, best.narrow(1, rank, 1));
  };
  at::Tensor bound = threshold(top_k() - 1);
  if (options_.noise() == RouterNoise::kLearned) {
    // An expert of the selection falls out below the first one outside of it.
    const at::Tensor next = threshold(top_k());
    bound = at::where(logits.noisy.detach().gt(next.detach()), next, bound);
  }
  at::Tensor probability = normal_cdf((logits.clean - bound) / logits.sigma);
  if (valid.defined()) probability = probability.masked_fill(valid.logical_not().unsqueeze(1), 0);
  return probability.sum(0);
}

GateOutput NoisyTopKGate::forward(const GateInput& input) {
  require_shape(weight, {num_experts(), options_.d_model()}, kNoisyTopKGate, "weight");
  if (options_.noise() == RouterNoise::kLearned) {
    require_shape(noise_weight, weight.sizes(), kNoisyTopKGate, "noise_weight");
  }
  require_input(input, weight, kNoisyTopKGate);
  const at::Tensor valid = input.valid.value_or(at::Tensor());
  const Logits logits = logits_of(input);
  const bool is_fixed = options_.noise() == RouterNoise::kFixed;
  LinearRouterOptions router;
  router.top_k = top_k();
  router.scores.normalize = !is_fixed && top_k() > 1;
  LinearRouterOutput routed = logit_router(logits.noisy, valid, router);

  GateOutput output;
  output.routing.num_tokens = input.tokens.size(0);
  output.routing.top_k = top_k();
  output.routing.expert_idx = routed.expert_idx;
  output.routing.weights = routed.weights;
  if (valid.defined()) output.routing = without_invalid(output.routing, valid);
  output.stats = count_assignments(output.routing, num_experts(), count_valid(input));
  output.stats.non_finite_tokens = routed.non_finite_tokens.item<int64_t>();

  if (options_.importance_coeff() > 0) {
    at::Tensor importance;
    if (is_fixed) {
      router.score_sum = true;
      importance = logit_router(logits.clean, valid, router).score_sum;
    } else {
      importance = weight_per_expert(output.routing, num_experts());
    }
    output.global_losses.push_back(
        cv_squared_loss("importance_loss", importance, options_.importance_coeff()));
  }
  if (options_.load_coeff() > 0) {
    const bool has_noise = logits.sigma.defined() && top_k() < num_experts();
    const at::Tensor load = has_noise ? load_of(logits, input)
                                      : routed.tokens_per_expert.to(logits.clean.scalar_type());
    output.global_losses.push_back(cv_squared_loss("load_loss", load, options_.load_coeff()));
  }
  return output;
}

}  // namespace perseid::gates
