#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "moe/sparse_ramp.h"
#include "moe/sparse_unit.h"

// When masks change and by how much: pure functions of the clock, with no counters.

namespace perseid {

/// How the drop fraction falls over x = (step - begin) / (end - begin).
enum class Anneal : uint8_t {
  kConstant,  ///< alpha
  kCosine,    ///< alpha / 2 * (1 + cos(pi x))
  kPoly,      ///< alpha * (1 - x)^power
  kLinear,    ///< alpha * (1 - x)
  kStages,    ///< alpha * share of the last of `stages` that has begun at x
};

/// What the updates of a unit go by.
enum class Clock : uint8_t {
  kStep,  ///< the global step
  /// Of experts' weights: the rows that the expert had so far / mean rows of an expert in a step.
  /// It runs like the step for a mean load, stands still without rows and never goes back. Weights
  /// that every token meets keep the step.
  kTokens,
};

struct Schedule {
  int64_t begin = 0;  ///< first step with an update
  /// No update in this step and later; begin: never one; -1: three quarters of total_steps.
  int64_t end = -1;
  int64_t total_steps = 0;  ///< needed for end = -1 only
  int64_t every = 100;      ///< steps between two updates of a unit
  double alpha = 0.3;       ///< drop fraction at `begin`, in [0, 1]
  Anneal anneal = Anneal::kCosine;
  double power = 3;      ///< kPoly
  double alpha_min = 0;  ///< the fraction never falls below it
  /// Units take turns inside `every` steps, so that not all need a dense gradient in one step.
  bool stagger = false;
  Clock clock = Clock::kStep;
  /// kTokens: mean rows of an expert in a step, over all ranks; 0: measured in the steps before
  /// `begin`, then fixed.
  double mean_rows = 0;
  std::vector<DropStage> stages;  ///< kStages: ascending, the first from 0
  /// Sparser while it is trained; see moe/sparse_targets.h. Both need Clock::kStep, and an update
  /// that is skipped for want of rows or gradients loses what the ramp takes all the same.
  std::optional<DensityRamp> density_ramp;
  std::optional<NmRamp> nm_ramp;
  /// Grow first, prune later (MEST's soft bound): the drop fraction of the budget is grown beyond
  /// it by each update, and the next one goes back to the budget before it grows again. The last
  /// one only goes back.
  bool grow_first = false;

  int64_t end_step() const;  ///< `end` with its default resolved
};

/// Throws ConfigError that names the field, also for a ramp that the last update does not end.
void validate(const Schedule& schedule);

/// Offset of each unit inside `every`: floor(every * ordinal / number), where units are ordered by
/// (layer, matrix, bit-reversed expert id), which spreads those of one step over the ranks.
/// Without stagger all are 0.
/// @param keys  of all units of all ranks, in any order
std::vector<int64_t> update_offsets(const Schedule& schedule, const std::vector<UnitKey>& keys);

/// Whether the unit with this offset updates in this step.
bool is_update_step(const Schedule& schedule, int64_t step, int64_t offset);

/// Windows of `every` that have begun at `time` of the token clock: 0, 1, ...; -1 before the first
/// and from `end` on. A unit updates once in each that it sees begin, also where one is left out.
int64_t update_window(const Schedule& schedule, double time, int64_t offset);

/// Share of the active atoms that an update changes.
/// @param time  of the unit's clock
double drop_fraction(const Schedule& schedule, double time);

}  // namespace perseid
