#pragma once
#include <cstdint>
#include <vector>

#include "moe/sparse_budget.h"

namespace perseid {

/// The density falls from `initial` to that of the budget:
///   d(x) = final + (initial - final) (1 - x)^power,  x = (step - begin) / (end - begin) in [0, 1]
/// (Zhu and Gupta 2017, GraNet: power 3). It takes effect with the updates: one in window j, the
/// steps from schedule.begin + j * every on, has the density of the first step of its window.
struct DensityRamp {
  Density initial;     ///< at least the budget's; the first masks have it
  int64_t begin = -1;  ///< -1: schedule.begin
  int64_t end = -1;    ///< from here on the budget's own; -1: first step of the last window
  double power = 3;
};

/// N of M neighbours, from a share of the time between schedule.begin and schedule.end on.
struct NmRampFrame {
  double from = 0;
  int64_t n = 1;
  int64_t m = 1;
};
/// Hard N:M masks that become sparser. As DensityRamp it takes effect with the updates.
struct NmRamp {
  /// Ascending, the first from 0; N/M never rises, and the last frame is that of the structure.
  /// Where M changes, cells that lack atoms grow them.
  std::vector<NmRampFrame> frames;
};

/// Of Anneal::kStages: from a share of the time between begin and end on, this share of alpha.
struct DropStage {
  double from = 0;
  double share = 1;
};

}  // namespace perseid
