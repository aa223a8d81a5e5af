#include "gates/remoe_gate.h"

#include <ATen/ops/full.h>
#include <ATen/ops/relu.h>

#include <algorithm>
#include <cmath>

#include "gates/gate_parts.h"
#include "gates/linear_router.h"
#include "gates/state_buffer.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

constexpr const char* kReMoEGate = "remoe_gate";
constexpr double kCoeffMin = 1e-12, kCoeffMax = 1e2;

}  // namespace

ReMoEGate::ReMoEGate(const ReMoEGateOptions& options)
    : Gate(kReMoEGate, options.num_experts(), options.top_k()), options_(options) {
  require_d_model(kReMoEGate, options.d_model());
  require_product({options.num_experts(), options.d_model()}, kReMoEGate, "num_experts*d_model");
  require(options.l1_coeff_start() >= kCoeffMin && options.l1_coeff_start() <= kCoeffMax,
          kReMoEGate, "l1_coeff_start", options.l1_coeff_start(),
          "is outside [1e-12, 100], the range of the coefficient");
  require(std::isfinite(options.l1_coeff_factor()) && options.l1_coeff_factor() > 1, kReMoEGate,
          "l1_coeff_factor", options.l1_coeff_factor(),
          "is not a finite number above 1; 1.2 is usual");
  weight = register_parameter(
      "weight", router_weight(options.num_experts(), options.d_model(), options.seed(),
                              options.layer_id(), options.gate_id()));
  l1_coeff = register_buffer("l1_coeff", at::full({}, options.l1_coeff_start(), at::kDouble));
}

void ReMoEGate::to(at::Device device, at::ScalarType dtype, bool non_blocking) {
  keep_types({l1_coeff}, [&] { Gate::to(device, dtype, non_blocking); });
}
void ReMoEGate::to(at::ScalarType dtype, bool non_blocking) {
  keep_types({l1_coeff}, [&] { Gate::to(dtype, non_blocking); });
}

void ReMoEGate::after_step(const GateStats& global_stats) {
  if (global_stats.num_tokens == 0) return;
  require(global_stats.num_tokens > 0 && global_stats.num_assignments >= 0, kReMoEGate,
          "num_assignments", global_stats.num_assignments,
          "of num_tokens=" + to_text(global_stats.num_tokens) +
              " tokens is no statistic; pass those of a forward");
  const bool is_dense = global_stats.num_assignments > top_k() * global_stats.num_tokens;
  const double factor = is_dense ? options_.l1_coeff_factor() : 1 / options_.l1_coeff_factor();
  l1_coeff.fill_(std::clamp(l1_coeff.item<double>() * factor, kCoeffMin, kCoeffMax));
}

GateOutput ReMoEGate::forward(const GateInput& input) {
  require_shape(weight, {num_experts(), options_.d_model()}, kReMoEGate, "weight");
  require_input(input, weight, kReMoEGate);
  const at::Tensor features = router_features(input, options_.input_norm(), weight);
  const at::Tensor logits = linear_logits(features, weight, {}, input.valid.value_or(at::Tensor()));
  const at::Tensor weights = at::relu(logits);  // rows that are not valid are 0: no pair

  GateOutput output;
  output.routing = routing_from_dense(weights);
  output.stats = count_assignments(output.routing, num_experts(), count_valid(input));
  output.stats.non_finite_tokens =
      logits.detach().isfinite().all(1).logical_not().sum().item<int64_t>();
  const double coeff = l1_coeff.item<double>();
  if (options_.l1_balance()) {
    output.balance = {weights.sum(0), output.stats.tokens_per_expert, coeff, top_k(),
                      /*normalize_by_k=*/true};
  } else {
    const int64_t tokens_global = tokens_global_of(input, output.stats.num_tokens);
    const double scale = tokens_global > 0 ? 1 / static_cast<double>(tokens_global) : 0.0;
    const at::Tensor raw = weights.sum(0).sum().mul(scale);
    output.losses.push_back({"l1_loss", raw.mul(coeff), raw.detach()});
  }
  return output;
}

}  // namespace perseid::gates
