#include "examples/train_fashion/metrics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace perseid::examples {

double mutual_information(const std::vector<double>& table, int64_t num_rows) {
  const auto rows = static_cast<size_t>(num_rows);
  const size_t columns = table.size() / rows;
  const double total = std::accumulate(table.begin(), table.end(), 0.0);
  if (!(total > 0)) return 0;
  std::vector<double> row_mass(rows, 0);
  std::vector<double> column_mass(columns, 0);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < columns; ++c) {
      row_mass[r] += table[r * columns + c] / total;
      column_mass[c] += table[r * columns + c] / total;
    }
  }
  double information = 0;
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < columns; ++c) {
      const double mass = table[r * columns + c] / total;
      if (mass > 0) information += mass * std::log(mass / (row_mass[r] * column_mass[c]));
    }
  }
  return std::max(information, 0.0);
}

int64_t num_dead_experts(const std::vector<int64_t>& tokens_per_expert) {
  const auto total =
      std::accumulate(tokens_per_expert.begin(), tokens_per_expert.end(), int64_t{0});
  const auto num_experts = static_cast<int64_t>(tokens_per_expert.size());
  return std::count_if(tokens_per_expert.begin(), tokens_per_expert.end(),
                       [&](int64_t tokens) { return tokens * num_experts * 100 < total; });
}

MeanAndError mean_and_error(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {mean, values.size() > 1 ? std::sqrt(squares / (n - 1) / n) : 0.0};
}

}  // namespace perseid::examples
