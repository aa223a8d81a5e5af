#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "gates/routing.h"

namespace perseid {

/// What runs for each token when 1..G gates share one set of experts: the union of their choices.
struct Selection {
  gates::Routing routing;  ///< the pairs that run, each once; its weights are undefined for G > 1
  at::Tensor
      weights;  ///< [A, G] weight of each pair for each gate, 0 where a gate did not choose it
  /// The integers of a routing that is on a GPU in host memory, where the layer needed them there.
  std::optional<gates::Routing> on_host = {};
};

/// With one gate the selection is its routing, no copy. With several, a token's pairs are ordered
/// by expert id. Differentiable with respect to the weights of each routing.
/// @param routings  [G >= 1] of the same tokens, else ConfigError; ids and offsets are not checked,
/// see gates::validate
Selection merge_routings(const std::vector<gates::Routing>& routings);

}  // namespace perseid
