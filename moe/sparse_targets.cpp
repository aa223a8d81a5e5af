#include "moe/sparse_targets.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "kernels/error.h"

namespace perseid {
namespace {

constexpr const char* kSparseTargets = "sparse_targets";

int64_t ramp_begin(const Schedule& schedule) {
  const int64_t begin = schedule.density_ramp->begin;
  return begin >= 0 ? begin : schedule.begin;
}
int64_t ramp_end(const Schedule& schedule) {
  const int64_t end = schedule.density_ramp->end;
  return end >= 0 ? end : schedule.begin + last_window(schedule) * schedule.every;
}

/// What is left of the way from the first density to the last, in [0, 1].
double ramp_rest(const Schedule& schedule, int64_t window) {
  if (window < 0) return 1;
  const int64_t step = schedule.begin + window * schedule.every;
  const int64_t begin = ramp_begin(schedule), end = ramp_end(schedule);
  if (step >= end) return 0;
  if (step <= begin) return 1;
  const double x = static_cast<double>(step - begin) / static_cast<double>(end - begin);
  return std::pow(1 - x, schedule.density_ramp->power);
}

bool ramps_each(const Budget& budget) {
  return budget.distribution == Distribution::kEpsilon ||
         budget.distribution == Distribution::kCustom;
}

Allocation allocation_at(Budget budget, const Density& density,
                         const std::vector<BudgetUnit>& units) {
  budget.density = density;
  return allocate(budget, units);
}

}  // namespace

int64_t last_window(const Schedule& schedule) {
  const int64_t longest_offset = schedule.stagger ? schedule.every - 1 : 0;
  const int64_t span = schedule.end_step() - 1 - schedule.begin - longest_offset;
  return span < 0 ? -1 : span / schedule.every;
}

int64_t window_of(const Schedule& schedule, int64_t step) {
  if (step < schedule.begin) return -1;
  return std::min((step - schedule.begin) / schedule.every, last_window(schedule));
}

Density ramp_density(const Schedule& schedule, const Density& final, int64_t window) {
  if (!schedule.density_ramp.has_value()) return final;
  const Density& initial = schedule.density_ramp->initial;
  const double rest = ramp_rest(schedule, window);
  if (rest == 0) return final;
  if (rest == 1) return initial;
  const double low = final.value(), high = initial.value();
  return {std::clamp(low + (high - low) * rest, low, high)};
}

size_t ramp_frame(const Schedule& schedule, int64_t window) {
  if (window < 0) return 0;
  const auto span = static_cast<double>(schedule.end_step() - schedule.begin);
  const auto since = static_cast<double>(window * schedule.every);
  size_t frame = 0;
  for (size_t i = 1; i < schedule.nm_ramp->frames.size(); ++i) {
    // A share such as 1/3 may be a rounding error above the step that is meant.
    if (since >= schedule.nm_ramp->frames[i].from * span - 1e-6) frame = i;
  }
  return frame;
}

BudgetTargets::BudgetTargets(const Budget& budget, const Schedule& schedule,
                             std::vector<BudgetUnit> units)
    : budget_(budget), schedule_(schedule), units_(std::move(units)) {
  last_ = allocate(budget_, units_);
  first_ = last_.nnz;
  if (schedule_.density_ramp.has_value()) {
    const Density& initial = schedule_.density_ramp->initial;
    if (ramps_each(budget_)) {
      for (size_t u = 0; u < units_.size(); ++u) {
        const BudgetUnit& unit = units_[u];
        const int64_t size = unit.out * unit.in;
        const int64_t most = (unit.ceiling < 0 ? size : unit.ceiling) / unit.granule;
        const auto granules = static_cast<int64_t>(std::llround(
            initial.value() * static_cast<double>(size) / static_cast<double>(unit.granule)));
        first_[u] = std::max(last_.nnz[u], std::min(granules, most) * unit.granule);
      }
    } else {
      require(initial.value() >= budget_.density.value(), kSparseTargets, "initial",
              initial.value(),
              "is below the budget's density=" + to_text(budget_.density.value()) +
                  ", but a ramp falls");
      first_ = allocation_at(budget_, initial, units_).nnz;
      // Rounding may have given a unit one granule less than at the lower density.
      bool is_below = false;
      for (size_t u = 0; u < units_.size(); ++u) is_below |= first_[u] < last_.nnz[u];
      if (is_below) {
        for (size_t u = 0; u < units_.size(); ++u) units_[u].floor = last_.nnz[u];
        first_ = allocation_at(budget_, initial, units_).nnz;
      }
    }
  }
  current_ = first_;
}

BudgetTargets::BudgetTargets(Allocation fixed) : last_(std::move(fixed)), first_(last_.nnz) {}

/// @param before  those of the window before
std::vector<int64_t> BudgetTargets::between(const Density& density,
                                            const std::vector<int64_t>& before) const {
  // With granules of several sizes the window before may have a little less than is asked for now.
  const int64_t sum = std::accumulate(before.begin(), before.end(), int64_t{0});
  if (number_of_weights(density, units_) >= sum) return before;
  std::vector<BudgetUnit> units = units_;
  for (size_t u = 0; u < units.size(); ++u) {
    units[u].floor = last_.nnz[u];
    units[u].ceiling = before[u];
  }
  return allocation_at(budget_, density, units).nnz;
}

const std::vector<int64_t>& BudgetTargets::at(int64_t window) {
  if (!schedule_.density_ramp.has_value() || window < 0) return first_;
  window = std::min(window, last_window(schedule_));
  if (window < window_) {
    window_ = -1;
    current_ = first_;
  }
  while (window_ < window) {
    ++window_;
    const double rest = ramp_rest(schedule_, window_);
    if (rest == 1) continue;
    if (rest == 0) {
      current_ = last_.nnz;
    } else if (ramps_each(budget_)) {
      // Each unit on its own way.
      for (size_t u = 0; u < units_.size(); ++u) {
        const auto low = static_cast<double>(last_.nnz[u]), high = static_cast<double>(first_[u]);
        const auto granule = static_cast<double>(units_[u].granule);
        const auto granules =
            static_cast<int64_t>(std::llround((low + (high - low) * rest) / granule));
        current_[u] = std::clamp(granules * units_[u].granule, last_.nnz[u], current_[u]);
      }
    } else {
      current_ = between(ramp_density(schedule_, budget_.density, window_), current_);
    }
  }
  return current_;
}

}  // namespace perseid
