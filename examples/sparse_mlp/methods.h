#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "moe/sparsifier.h"

namespace perseid::examples {

inline constexpr int64_t kHidden = 1000;  ///< the tutorial's

/// One way to choose the active weights, as a row of the table.
struct Method {
  std::string name;
  int64_t hidden = kHidden;  ///< width of the hidden layers
  bool is_sparse = true;
};

/// All, in the order of the table: those with the tutorial's number of weights first, then 1 of 8,
/// then dense networks.
const std::vector<Method>& all_methods();
const Method& method_of(const std::string& name);

/// @param epochs  of steps_per_epoch steps
SparsifierConfig method_config(const Method& method, int64_t epochs, int64_t steps_per_epoch,
                               uint64_t seed);

}  // namespace perseid::examples
