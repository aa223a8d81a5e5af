#include "moe/feature_strength.h"

#include <algorithm>

#include "kernels/error.h"

namespace perseid {

at::Tensor neuron_strength(const at::Tensor& weight) {
  require(weight.defined() && weight.dim() == 2, "neuron_strength", "weight",
          weight.defined() ? to_text(weight.sizes()) : "undefined", "is not [out, in]");
  return weight.detach().to(at::kDouble).abs().sum(0);
}

at::Tensor expert_input_strength(const GroupedMLP& experts, int64_t expert) {
  const std::vector<int64_t>& ids = experts.expert_ids();
  const auto place = std::find(ids.begin(), ids.end(), expert);
  require(place != ids.end(), "expert_input_strength", "expert", expert,
          "is not one of the " + to_text(ids.size()) + " experts here");
  return neuron_strength(experts.up_proj.detach().select(0, place - ids.begin()));
}

}  // namespace perseid
