#pragma once
#include <cstdint>
#include <vector>

#include "moe/sparse_budget.h"
#include "moe/sparse_schedule.h"

// How many weights are active after the updates of a step: functions of the step.

namespace perseid {

/// Updates of step t are in window floor((t - begin) / every), -1 before the first; from the last
/// one on, which is complete for staggered units, too, it stays there.
int64_t window_of(const Schedule& schedule, int64_t step);
int64_t last_window(const Schedule& schedule);  ///< -1: there is none

/// Density of a window under schedule.density_ramp; without one, `final`. From the end of the ramp
/// on exactly `final`, before its begin exactly `initial`, never rising.
Density ramp_density(const Schedule& schedule, const Density& final, int64_t window);

/// Place in schedule.nm_ramp of the frame of a window; 0 before the first.
size_t ramp_frame(const Schedule& schedule, int64_t window);

/// Numbers of active weights of units under a density ramp. In each window they sum up to what
/// allocate makes of the ramp's density, up to its rest, and each is a multiple of its granule and
/// that allocation up to about two of the largest granules: none ever rises, as each window stays
/// between the one before it and the last, which is the budget's own allocation. Distributions
/// without a density of all units (kEpsilon, kCustom) ramp each unit by itself, to its own.
class BudgetTargets {
 public:
  BudgetTargets() = default;
  /// Throws ConfigError as allocate does, for the first and the last density, and for a ramp that
  /// rises.
  BudgetTargets(const Budget& budget, const Schedule& schedule, std::vector<BudgetUnit> units);

  /// Budgets that stay.
  explicit BudgetTargets(Allocation fixed);

  const Allocation& last() const { return last_; }
  const std::vector<int64_t>& first() const { return first_; }  ///< before the first update
  /// In any order of windows; rising ones are cheap.
  const std::vector<int64_t>& at(int64_t window);

 private:
  std::vector<int64_t> between(const Density& density, const std::vector<int64_t>& before) const;

  Budget budget_;
  Schedule schedule_;
  std::vector<BudgetUnit> units_;
  Allocation last_;
  std::vector<int64_t> first_;
  int64_t window_ = -1;  ///< of current_
  std::vector<int64_t> current_;
};

}  // namespace perseid
