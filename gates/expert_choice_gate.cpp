#include "gates/expert_choice_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "gates/gate_parts.h"
#include "gates/kernel_types.h"
#include "gates/linear_router.h"
#include "gates/token_groups.h"
#include "kernels/error.h"
#include "kernels/parallel.h"
#include "kernels/select.h"

namespace perseid::gates {
namespace {

using at::Tensor;

constexpr const char* kExpertChoiceGate = "expert_choice_gate";

int64_t nominal_top_k(const ExpertChoiceGateOptions& options) {
  const double factor = options.capacity_factor();
  require(std::isfinite(factor) && factor > 0, kExpertChoiceGate, "capacity_factor", factor,
          "is not a finite number above 0; 2 is usual");
  const auto E = static_cast<double>(std::max<int64_t>(options.num_experts(), 1));
  return static_cast<int64_t>(std::clamp(std::round(factor), 1.0, E));
}

/// [n, E] bool: each expert's `capacity` tokens of largest share. @param shares  [n, E]
Tensor choose_tokens(const Tensor& shares, int64_t capacity) {
  const int64_t n = shares.size(0), E = shares.size(1);
  const Tensor by_expert = shares.t().contiguous();
  const Tensor is_chosen = at::empty({E, n}, shares.options().dtype(at::kByte));
  const auto* const values = static_cast<const char*>(by_expert.const_data_ptr());
  auto* const chosen = is_chosen.mutable_data_ptr<uint8_t>();
  const int64_t row_bytes = n * static_cast<int64_t>(by_expert.element_size());
  const kernels::Stream stream = stream_of(shares, kExpertChoiceGate);
  const auto choose = [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      kernels::select_k(values + e * row_bytes, n, capacity, kernel_type(shares.scalar_type()),
                        chosen + e * n, stream);
    }
  };
  if (is_on_device(shares)) {
    choose(0, E);
  } else {
    kernels::parallel_for(0, E, 1, choose);
  }
  return is_chosen.t().to(at::kBool);
}

}  // namespace

ExpertChoiceGate::ExpertChoiceGate(const ExpertChoiceGateOptions& options)
    : Gate(kExpertChoiceGate, options.num_experts(), nominal_top_k(options)), options_(options) {
  require_d_model(kExpertChoiceGate, options.d_model());
  require_group_size(kExpertChoiceGate, options.group_size());
  weight = register_parameter(
      "weight", router_weight(options.num_experts(), options.d_model(), options.seed(),
                              options.layer_id(), options.gate_id()));
}

int64_t ExpertChoiceGate::capacity(int64_t num_tokens) const {
  const auto n = static_cast<double>(num_tokens);
  const double share = options_.capacity_factor() * n / static_cast<double>(num_experts());
  return static_cast<int64_t>(std::min(std::round(share), n));
}

GateOutput ExpertChoiceGate::forward(const GateInput& input) {
  require_input(input, weight, kExpertChoiceGate);
  const auto groups = token_groups(input, options_.group_size(), kExpertChoiceGate);
  LinearRouterOptions router;
  router.score_shares = true;  // softmax over all experts; the router's own selection is not used
  const LinearRouterOutput routed =
      linear_router(router_features(input, options_.input_norm(), weight), weight, {},
                    input.valid.value_or(Tensor()), router);

  const Tensor& shares = routed.score_shares;
  Tensor is_chosen = at::zeros(shares.sizes(), shares.options().dtype(at::kBool));
  for (const Tensor& group : groups) {
    const Tensor chosen =
        choose_tokens(shares.detach().index_select(0, group), capacity(group.size(0)));
    is_chosen.index_copy_(0, group, chosen);
  }
  GateOutput output;
  output.routing = routing_from_mask(shares, is_chosen);
  output.stats = count_assignments(output.routing, num_experts(), count_valid(input));
  output.stats.non_finite_tokens = routed.non_finite_tokens.item<int64_t>();
  return output;
}

}  // namespace perseid::gates
