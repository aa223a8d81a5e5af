#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "moe/sparse_neurons.h"
#include "tests/moe/sparse_ranks_fixture.h"

// What tests of coupled neurons share.

namespace perseid::testing {

using Places = std::vector<int64_t>;

inline Places listed(const PackedMask& mask) {
  Places places;
  for (int64_t place = 0; place < mask.num_places(); ++place) {
    if (mask.test(place)) places.push_back(place);
  }
  return places;
}
inline bool has(const Places& places, int64_t place) {
  return std::find(places.begin(), places.end(), place) != places.end();
}

inline SparsifierConfig coupled(GrowCriterion grow = GrowCriterion::kGrad,
                                UpdateOrder order = UpdateOrder::kBeforeStep) {
  SparsifierConfig config = config_of(grow, order);
  config.budget.distribution = Distribution::kUniform;
  config.budget.density = 0.4;
  config.structure = Structure::coupled_neurons();
  config.schedule.alpha = 0.5;
  config.neurons.candidates = 2;
  return config;
}

}  // namespace perseid::testing
