#pragma once

namespace perseid::gates {

/// How the coefficient of a loss grows with the progress of the training.
struct CoefficientSchedule {
  /// Share of the training over which the coefficient rises linearly from 0 to its value, in
  /// [0, 1]; 0: constant from the start.
  double ramp_until = 0;

  /// Factor in [0, 1]; progress outside [0, 1] is clamped. Throws ConfigError for a NaN.
  double at(double progress) const;
  /// Throws ConfigError that names operation unless ramp_until is in [0, 1].
  void validate(const char* operation) const;
};

}  // namespace perseid::gates
