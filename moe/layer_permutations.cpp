#include "moe/layer_permutations.h"

#include <string>

#include "gates/tree_gate.h"
#include "kernels/error.h"
#include "kernels/random.h"
#include "moe/layer_checks.h"

namespace perseid {

Permutations make_permutations(const std::vector<std::shared_ptr<gates::Gate>>& gates,
                               const gates::PermutationOptions& options, int layer_id) {
  options.validate(kMoELayer);
  Permutations permutations;
  if (options.search() == gates::PermSearch::kNone) return permutations;
  const bool is_shared = options.scope() == gates::PermScope::kShared;
  const bool per_tree = options.scope() == gates::PermScope::kPerTree;
  for (size_t g = 0; g < (is_shared ? 1 : gates.size()); ++g) {
    const gates::Gate& gate = *gates[g];
    require(!per_tree || dynamic_cast<const gates::TreeGate*>(&gate) != nullptr, kMoELayer,
            "permutation.scope", "per_tree",
            "needs gates with trees or selectors, but " + gate.name() +
                " has none; choose shared or per_gate");
    permutations.push_back(
        std::make_shared<gates::ExpertPermutation>(per_tree ? gate.top_k() : 1, gate.num_experts(),
                                                   options, layer_id, static_cast<int64_t>(g)));
  }
  return permutations;
}

std::vector<at::Tensor> relax(const Permutations& permutations, const gates::GateInput& input) {
  std::vector<at::Tensor> relaxed;
  for (const auto& permutation : permutations) {
    if (permutation->is_soft(input)) {
      relaxed.push_back(permutation->relaxed_now(input.progress));
    } else if (input.training) {
      permutation->freeze();
    }
  }
  return relaxed;
}

int64_t hash_of(const Permutations& permutations) {
  if (permutations.empty()) return 0;
  kernels::RandomKey key = kernels::random_key(permutations.size());
  for (const auto& permutation : permutations) key = key.with(permutation->hash());
  return static_cast<int64_t>(key.value >> 1);
}

at::Tensor weights_by_output(const gates::ExpertPermutation& permutation, gates::Gate& gate,
                             const gates::GateInput& input, const gates::Routing& routing) {
  if (permutation.options().scope() == gates::PermScope::kPerTree) {
    return dynamic_cast<gates::TreeGate&>(gate).tree_weights(input).detach();
  }
  const at::Tensor by_expert = gates::dense_weights(routing, gate.num_experts()).detach();
  return by_expert.index_select(1, permutation.expert_map[0]).unsqueeze(1);
}

}  // namespace perseid
