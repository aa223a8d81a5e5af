#pragma once
#include <memory>
#include <vector>

#include "gates/expert_permutation.h"

// Internal: the orders of one layer, one for all its gates or one for each.

namespace perseid {

using Permutations = std::vector<std::shared_ptr<gates::ExpertPermutation>>;

/// Those that the options ask for, see MoELayer::permutations. Throws ConfigError for a gate
/// without trees with PermScope::kPerTree.
Permutations make_permutations(const std::vector<std::shared_ptr<gates::Gate>>& gates,
                               const gates::PermutationOptions& options, int layer_id);

/// The place in `permutations`, which is not empty, of the one of gate g.
inline size_t permutation_of(const Permutations& permutations, size_t g) {
  return permutations.size() == 1 ? 0 : g;
}

/// Pi of each, or empty outside of the soft stage, which ends for training inputs after it.
std::vector<at::Tensor> relax(const Permutations& permutations, const gates::GateInput& input);

/// One number for all maps; 0 without permutations.
int64_t hash_of(const Permutations& permutations);

/// Weights of a gate by the outputs of its units, before they meet experts. [T, U, E]
/// @param routing  of the gate, by expert
at::Tensor weights_by_output(const gates::ExpertPermutation& permutation, gates::Gate& gate,
                             const gates::GateInput& input, const gates::Routing& routing);

}  // namespace perseid
