#include "gates/gshard_gate.h"

#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "gates/device.h"
#include "gates/draws.h"
#include "gates/gate_parts.h"
#include "gates/linear_router.h"
#include "gates/losses.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

using at::Tensor;

constexpr const char* kGShardGate = "gshard_gate";

/// Weights [T, 2] over their sum.
Tensor normalized(const Tensor& weights) {
  return weights / weights.sum(1, /*keepdim=*/true).add(1e-9);
}

/// E * sum_i f_i p_i with f of first choices: scores and counts travel in one vector, and counts
/// have no gradient.
GlobalLoss first_choice_loss(const Tensor& score_sum, const Tensor& first_choices, double coeff) {
  const int64_t E = score_sum.size(0);
  return {
      "aux_loss", coeff, at::cat({score_sum, first_choices.to(score_sum.scalar_type())}),
      [E](const Tensor& sums, int64_t tokens_global) -> Tensor {
        if (tokens_global == 0) return at::zeros({}, sums.options());
        const double tokens = static_cast<double>(tokens_global);
        const Tensor counts = sums.slice(0, E).detach();
        return sums.slice(0, 0, E).mul(counts).sum().mul(static_cast<double>(E) / tokens / tokens);
      }};
}

}  // namespace

GShardGate::GShardGate(const GShardGateOptions& options)
    : Gate(kGShardGate, options.num_experts(), std::min<int64_t>(2, options.num_experts())),
      options_(options) {
  require_d_model(kGShardGate, options.d_model());
  require_product({options.num_experts(), options.d_model()}, kGShardGate, "num_experts*d_model");
  require(options.second_threshold() >= 0 && options.second_threshold() <= 1, kGShardGate,
          "second_threshold", options.second_threshold(),
          "is outside [0, 1]; it is compared with p2 / (p1 + p2)");
  require_coefficient(kGShardGate, "aux_loss_coeff", options.aux_loss_coeff());
  require_coefficient(kGShardGate, "z_loss_coeff", options.z_loss_coeff());
  weight = register_parameter(
      "weight", router_weight(options.num_experts(), options.d_model(), options.seed(),
                              options.layer_id(), options.gate_id()));
}

/// [T] int64 second expert by Gumbel noise; where nothing is left to choose, that of the table.
Tensor GShardGate::sampled_second(const GateInput& input, const Tensor& scores,
                                  const Tensor& table) const {
  const Tensor uniform = at::empty(scores.sizes(), scores.options().dtype(at::kDouble));
  const auto first = static_cast<uint64_t>(input.first_token * num_experts());
  const kernels::RandomKey key = draw_key(options_.seed(), input.step, options_.layer_id(),
                                          options_.gate_id(), Draw::kSecondExpert);
  kernels::fill_uniform(uniform.mutable_data_ptr(), uniform.numel(), kernels::DType::kFloat64,
                        0x1p-60, 1, kernels::skip(key, first), stream_of(uniform, kGShardGate));
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const Tensor perturbed = scores.detach()
                               .to(at::kDouble)
                               .log()
                               .sub(uniform.log().neg().log())
                               .nan_to_num(-kInfinity, kInfinity, -kInfinity)
                               .scatter(1, table.narrow(1, 0, 1), -kInfinity);
  const auto [best, expert] = at::max(perturbed, /*dim=*/1);
  return at::where(best.eq(-kInfinity), table.select(1, 1), expert);
}

Tensor GShardGate::is_second_kept(const GateInput& input, const Tensor& second_share) const {
  switch (options_.second_policy()) {
    case SecondPolicy::kNone:
      return at::zeros(second_share.sizes(), second_share.options().dtype(at::kBool));
    case SecondPolicy::kThreshold:
      return second_share.gt(options_.second_threshold());
    case SecondPolicy::kRandom:
      if (input.training) {
        const Tensor uniform =
            at::empty(second_share.sizes(), second_share.options().dtype(at::kDouble));
        const kernels::RandomKey key = draw_key(options_.seed(), input.step, options_.layer_id(),
                                                options_.gate_id(), Draw::kSecondKept);
        kernels::fill_uniform(uniform.mutable_data_ptr(), uniform.numel(), kernels::DType::kFloat64,
                              0, 1, kernels::skip(key, static_cast<uint64_t>(input.first_token)),
                              stream_of(uniform, kGShardGate));
        return uniform.mul(options_.second_threshold()).lt(second_share.to(at::kDouble));
      }
      [[fallthrough]];
    case SecondPolicy::kAll:
      break;
  }
  return at::ones(second_share.sizes(), second_share.options().dtype(at::kBool));
}

GateOutput GShardGate::forward(const GateInput& input) {
  require_shape(weight, {num_experts(), options_.d_model()}, kGShardGate, "weight");
  require_input(input, weight, kGShardGate);
  const Tensor valid = input.valid.value_or(Tensor());
  const int64_t T = input.tokens.size(0);
  const bool has_second = top_k() == 2;
  const bool is_sampled = has_second && options_.gumbel_second() && input.training;
  LinearRouterOptions router;
  router.scores.normalize = false;
  router.top_k = top_k();
  router.score_sum = options_.aux_loss_coeff() > 0;
  router.lse_square_sum = options_.z_loss_coeff() > 0;
  router.score_shares = is_sampled;
  const LinearRouterOutput routed = linear_router(
      router_features(input, options_.input_norm(), weight), weight, {}, valid, router);

  const Tensor is_valid =
      valid.defined() ? valid : at::ones({T}, routed.expert_idx.options().dtype(at::kBool));
  Tensor table = routed.expert_idx.view({T, top_k()});
  const Tensor first_choices =
      at::bincount(table.select(1, 0).masked_select(is_valid), {}, num_experts());
  Tensor weights = routed.weights.view({T, top_k()});
  Tensor kept = is_valid.unsqueeze(1);
  if (is_sampled) {
    table = table.clamp_min(0).to(at::kLong);  // tokens that are not valid are left out below
    const Tensor second = sampled_second(input, routed.score_shares, table).unsqueeze(1);
    table = at::cat({table.narrow(1, 0, 1), second}, 1);
    weights = routed.score_shares.gather(1, table);
    table = table.to(at::kInt);
  }
  if (has_second) {
    const Tensor share = normalized(weights.detach()).select(1, 1);
    const Tensor is_kept = is_second_kept(input, share).logical_and(is_valid);
    kept = at::cat({kept, is_kept.unsqueeze(1)}, 1);
  }
  weights = normalized(options_.normalize_after_drop() ? weights.mul(kept) : weights);

  GateOutput output;
  output.routing = routing_from_kept(table, weights, kept);
  output.stats = count_assignments(output.routing, num_experts(), count_valid(input));
  output.stats.non_finite_tokens = routed.non_finite_tokens.item<int64_t>();
  if (options_.aux_loss_coeff() > 0) {
    output.global_losses.push_back(
        first_choice_loss(routed.score_sum, first_choices, options_.aux_loss_coeff()));
  }
  if (options_.z_loss_coeff() > 0) {
    output.losses.push_back(z_loss(routed.lse_square_sum, options_.z_loss_coeff(),
                                   tokens_global_of(input, output.stats.num_tokens)));
  }
  return output;
}

}  // namespace perseid::gates
