#pragma once
#include <cstdint>
#include <vector>

namespace perseid::examples {

/// I(row; column) of a table of counts or masses, in nats.
/// @param table  [num_rows, num_columns] >= 0, any sum
double mutual_information(const std::vector<double>& table, int64_t num_rows);

/// Experts with less than a hundredth of the fair share.
int64_t num_dead_experts(const std::vector<int64_t>& tokens_per_expert);

/// Mean of some values and the standard error of this mean (0 for one value).
struct MeanAndError {
  double mean = 0;
  double standard_error = 0;
};
MeanAndError mean_and_error(const std::vector<double>& values);

}  // namespace perseid::examples
