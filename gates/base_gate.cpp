#include "gates/base_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "gates/gate_parts.h"
#include "gates/kernel_types.h"
#include "gates/linear_router.h"
#include "gates/token_groups.h"
#include "kernels/assignment.h"
#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid::gates {
namespace {

using at::Tensor;

constexpr const char* kBaseGate = "base_gate";

/// Rows of length 1 at right angles, the first `count` vectors of `width` >= count numbers: normal
/// draws by Gram and Schmidt, twice, which leaves errors of rounding alone.
Tensor orthonormal_rows(int64_t count, int64_t width, kernels::RandomKey key) {
  Tensor rows = at::empty({count, width}, at::kDouble);
  auto* const values = rows.mutable_data_ptr<double>();
  kernels::fill_normal(values, count * width, kernels::DType::kFloat64, key);
  for (int64_t i = 0; i < count; ++i) {
    double* const row = values + i * width;
    for (int64_t j = 0; j < 2 * i; ++j) {
      const double* const other = values + (j % i) * width;
      const double overlap = std::inner_product(row, row + width, other, 0.0);
      for (int64_t d = 0; d < width; ++d) row[d] -= overlap * other[d];
    }
    const double length = std::sqrt(std::inner_product(row, row + width, row, 0.0));
    for (int64_t d = 0; d < width; ++d) row[d] /= length;
  }
  return rows;
}

Tensor initial_weight(const BaseGateOptions& options) {
  const int64_t E = options.num_experts(), D = options.d_model();
  const kernels::RandomKey key = kernels::random_key(options.seed())
                                     .with(static_cast<uint64_t>(options.layer_id()))
                                     .with(static_cast<uint64_t>(options.gate_id()));
  const Tensor rows = orthonormal_rows(std::min(E, D), std::max(E, D), key);
  return (E <= D ? rows : rows.t()).mul(options.init_gain()).to(at::kFloat).contiguous();
}

/// [T] int32: the balanced expert of each valid token, 0 for others.
Tensor balanced_experts(const Tensor& logits, const std::vector<Tensor>& groups) {
  const Tensor experts = at::zeros({logits.size(0)}, logits.options().dtype(at::kInt));
  for (const Tensor& group : groups) {
    const Tensor scores = logits.index_select(0, group);
    const Tensor chosen = at::empty({group.size(0)}, experts.options());
    kernels::assign_balanced({scores.size(0), scores.size(1)}, kernel_type(scores.scalar_type()),
                             scores.const_data_ptr(), chosen.mutable_data_ptr<int32_t>(),
                             stream_of(scores, kBaseGate));
    experts.index_copy_(0, group, chosen);
  }
  return experts;
}

/// [T] int32: the best expert of each valid token, 0 for others.
Tensor best_experts(const Tensor& logits, const Tensor& valid) {
  LinearRouterOptions router;
  router.top_k = 1;
  return logit_router(logits, valid, router).expert_idx.clamp_min(0);
}

}  // namespace

BaseGate::BaseGate(const BaseGateOptions& options)
    : Gate(kBaseGate, options.num_experts(), 1), options_(options) {
  require_d_model(kBaseGate, options.d_model());
  require_group_size(kBaseGate, options.group_size());
  require(std::isfinite(options.init_gain()) && options.init_gain() > 0, kBaseGate, "init_gain",
          options.init_gain(), "is not a finite number above 0; 0.1 is usual");
  weight = register_parameter("weight", initial_weight(options));
}

GateOutput BaseGate::forward(const GateInput& input) {
  require_input(input, weight, kBaseGate);
  const auto groups = token_groups(input, options_.group_size(), kBaseGate);
  const Tensor valid = input.valid.value_or(Tensor());
  const Tensor logits = linear_logits(input.tokens, weight, {}, valid);
  const Tensor scores = logits.detach();
  const Tensor experts =
      input.training ? balanced_experts(scores, groups) : best_experts(scores, valid);
  const Tensor score = logits.gather(1, experts.to(at::kLong).unsqueeze(1)).squeeze(1);

  GateOutput output;
  output.routing.num_tokens = input.tokens.size(0);
  output.routing.top_k = 1;
  output.routing.expert_idx = experts;
  output.routing.weights = score.sigmoid();
  output.residual_weight = score.neg().sigmoid();
  if (valid.defined()) {
    output.routing = without_invalid(output.routing, valid);
    output.residual_weight = output.residual_weight.masked_fill(valid.logical_not(), 0);
  }
  output.stats = count_assignments(output.routing, num_experts(), count_valid(input));
  output.stats.non_finite_tokens = scores.isfinite().all(1).logical_not().sum().item<int64_t>();
  return output;
}

}  // namespace perseid::gates
