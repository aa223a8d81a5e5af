#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "moe/sparse_targets.h"

// What tests of falling budgets share.

namespace perseid::testing {

inline Schedule ramp_schedule(int64_t num_windows = 11) {
  Schedule schedule;
  schedule.begin = 10;
  schedule.every = 10;
  schedule.end = 10 * num_windows + 1;  // windows begin at 10, 20, ..., 10 num_windows
  schedule.density_ramp.emplace();
  return schedule;
}

inline BudgetUnit budget_unit(int64_t out, int64_t in, int64_t granule, int64_t number) {
  BudgetUnit unit;
  unit.name = "u" + std::to_string(number);
  unit.out = out;
  unit.in = in;
  unit.granule = granule;
  unit.floor = std::max(out, granule);
  return unit;
}

}  // namespace perseid::testing
