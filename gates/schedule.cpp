#include "gates/schedule.h"

#include <algorithm>
#include <cmath>

#include "kernels/error.h"

namespace perseid::gates {

double CoefficientSchedule::at(double progress) const {
  require(!std::isnan(progress), "coefficient_schedule", "progress", progress,
          "is not a number; give the finished share of the training, in [0, 1]");
  const double share = std::clamp(progress, 0.0, 1.0);
  return share >= ramp_until ? 1.0 : share / ramp_until;
}

void CoefficientSchedule::validate(const char* operation) const {
  require(ramp_until >= 0 && ramp_until <= 1, operation, "schedule.ramp_until", ramp_until,
          "is outside [0, 1]; it is a share of the training, 0 for a constant coefficient");
}

}  // namespace perseid::gates
