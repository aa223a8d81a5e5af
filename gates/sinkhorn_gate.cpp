#include "gates/sinkhorn_gate.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>

#include <cmath>

#include "gates/gate_parts.h"
#include "gates/kernel_types.h"
#include "gates/linear_router.h"
#include "gates/token_groups.h"
#include "kernels/error.h"
#include "kernels/sinkhorn.h"

namespace perseid::gates {
namespace {

using at::Tensor;

constexpr const char* kSinkhornGate = "sinkhorn_gate";

}  // namespace

SinkhornGate::SinkhornGate(const SinkhornGateOptions& options)
    : Gate(kSinkhornGate, options.num_experts(), options.top_k()), options_(options) {
  require_d_model(kSinkhornGate, options.d_model());
  require_group_size(kSinkhornGate, options.group_size());
  require(options.max_iterations() >= 1, kSinkhornGate, "max_iterations", options.max_iterations(),
          "is below 1; 50 is usual");
  require(std::isfinite(options.tolerance()) && options.tolerance() >= 0, kSinkhornGate,
          "tolerance", options.tolerance(), "is not a finite number from 0 on; 1e-4 is usual");
  weight = register_parameter(
      "weight", router_weight(options.num_experts(), options.d_model(), options.seed(),
                              options.layer_id(), options.gate_id()));
}

/// [T, E] z + log d1 of each token's group.
Tensor SinkhornGate::balanced_logits(const Tensor& logits,
                                     const std::vector<Tensor>& groups) const {
  const Tensor result = logits.clone();
  const Tensor is_finite = logits.isfinite().all(1);
  const Tensor log_d1 = at::empty({num_experts()}, logits.options().dtype(at::kDouble));
  for (const Tensor& group : groups) {
    const Tensor rows =
        logits.index_select(0, group.masked_select(is_finite.index_select(0, group)));
    kernels::sinkhorn({rows.size(0), num_experts()},
                      {options_.max_iterations(), options_.tolerance()},
                      kernel_type(rows.scalar_type()), rows.const_data_ptr(),
                      log_d1.mutable_data_ptr<double>(), stream_of(rows, kSinkhornGate));
    result.index_add_(0, group, log_d1.to(logits.scalar_type()).expand({group.size(0), -1}));
  }
  return result;
}

GateOutput SinkhornGate::forward(const GateInput& input) {
  require_input(input, weight, kSinkhornGate);
  const auto groups = token_groups(input, options_.group_size(), kSinkhornGate);
  const Tensor valid = input.valid.value_or(Tensor());
  const Tensor logits =
      linear_logits(router_features(input, options_.input_norm(), weight), weight, {}, valid);
  const Tensor scores = logits.detach();
  LinearRouterOptions selection;
  selection.top_k = top_k();
  Tensor experts =
      logit_router(input.training ? balanced_logits(scores, groups) : scores, valid, selection)
          .expert_idx.view({-1, top_k()});
  if (valid.defined()) {  // any legal row: without_invalid leaves it out
    experts = at::where(valid.unsqueeze(1), experts, at::arange(top_k(), experts.options()));
  }
  const Tensor ids = experts.to(at::kLong);
  LinearRouterOptions softmax;
  softmax.score_shares = true;
  const Tensor weights = top_k() == 1
                             ? logits.gather(1, ids).sigmoid()
                             : logit_router(logits, valid, softmax).score_shares.gather(1, ids);

  GateOutput output;
  output.routing = routing_from_table(experts, weights, num_experts());
  if (valid.defined()) output.routing = without_invalid(output.routing, valid);
  output.stats = count_assignments(output.routing, num_experts(), count_valid(input));
  output.stats.non_finite_tokens = scores.isfinite().all(1).logical_not().sum().item<int64_t>();
  return output;
}

}  // namespace perseid::gates
