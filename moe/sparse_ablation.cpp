#include "moe/sparse_ablation.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "kernels/error.h"
#include "kernels/select_atoms.h"
#include "moe/sparse_budget.h"
#include "moe/sparse_update.h"

namespace perseid {
namespace {

constexpr const char* kAblation = "ablation";

int64_t first_threshold(double gamma, int64_t fan_in) {
  if (gamma >= 1) return static_cast<int64_t>(gamma);
  const Density share(gamma);  // exact: 0.29 of 100 is 29
  return std::max<int64_t>(1, fan_in * share.numerator() / share.denominator());
}

std::vector<int64_t> counts_of_rows(const PackedMask& mask) {
  std::vector<int64_t> counts(static_cast<size_t>(mask.rows()));
  kernels::count_atoms({mask.rows(), mask.cols()}, mask.data(), counts.data());
  return counts;
}

}  // namespace

void validate(const Ablation& ablation) {
  require(std::isfinite(ablation.gamma) && ablation.gamma >= 0, kAblation, "gamma", ablation.gamma,
          "is not a finite number of 0 or more");
  require(ablation.gamma < 1 || (ablation.gamma == std::floor(ablation.gamma) &&
                                 ablation.gamma <= static_cast<double>(INT32_MAX)),
          kAblation, "gamma", ablation.gamma,
          "is 1 or more, a number of weights, but not an integer below 2^31");
}

std::vector<int64_t> share_among_rows(const std::vector<bool>& is_left, int64_t count,
                                      bool loses_rest) {
  const auto rows = static_cast<int64_t>(std::count(is_left.begin(), is_left.end(), true));
  require(rows >= 1 && count >= rows, kAblation, "count", count,
          "is below the " + to_text(rows) + " rows that are left");
  int64_t rest = loses_rest ? 0 : count % rows;
  std::vector<int64_t> result(is_left.size(), 0);
  for (size_t row = 0; row < result.size(); ++row) {
    if (!is_left[row]) continue;
    result[row] = count / rows + (rest > 0 ? 1 : 0);
    --rest;
  }
  return result;
}

bool are_shared(const std::vector<int64_t>& counts, bool loses_rest) {
  std::vector<bool> is_left;
  for (const int64_t count : counts) is_left.push_back(count > 0);
  const int64_t sum = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  return sum > 0 && share_among_rows(is_left, sum, loses_rest) == counts;
}

RowsLeft ablate_rows(const Ablation& ablation, const AblationInput& input) {
  const PackedMask& active = *input.active;
  const int64_t out = active.rows(), in = active.cols(), count = active.count();
  require(count >= 1, kAblation, "active", count, "is below 1; a weight has at least one");
  const int64_t num_dropped = share_of(input.fraction, count);
  const kernels::AtomCells whole{1, out * in};
  RowsLeft result;
  PackedMask dropped(out, in), large_gradient(out, in), with_gradient(out, in);
  for (int64_t place = 0; place < out * in; ++place) {
    // NaN is not 0: it stays, so that it is counted.
    if (input.grow_scores[place] != 0.0f) with_gradient.set(place, true);
  }
  for (const kernels::AtomCounts& seen :
       {kernels::select_atoms(whole, kernels::AtomOrder::kSmallest, input.drop_scores,
                              active.data(), &num_dropped, input.drop_key, dropped.data()),
        kernels::select_atoms(whole, kernels::AtomOrder::kLargest, input.grow_scores,
                              with_gradient.data(), &num_dropped, input.grow_key,
                              large_gradient.data())}) {
    result.num_non_finite += seen.num_nan + seen.num_infinite;
  }
  result.salient = counts_of_rows(without(active, dropped) | large_gradient);

  const std::vector<int64_t> now = counts_of_rows(active);
  const auto rows_now = std::count_if(now.begin(), now.end(), [](int64_t n) { return n > 0; });
  std::vector<int64_t> falling = result.salient;
  std::sort(falling.begin(), falling.end(), std::greater<>());
  const int64_t least_rows = (count + in - 1) / in;
  result.threshold = std::min(first_threshold(ablation.gamma, count / rows_now),
                              falling[static_cast<size_t>(least_rows - 1)]);
  std::vector<bool> is_left;
  for (const int64_t salient : result.salient) is_left.push_back(salient >= result.threshold);
  // More rows than entries: only at threshold 0, where rows stay that have none.
  int64_t too_many = std::count(is_left.begin(), is_left.end(), true) - count;
  for (size_t row = is_left.size(); row-- > 0 && too_many > 0;) {
    if (!is_left[row] || result.salient[row] > 0) continue;
    is_left[row] = false;
    --too_many;
  }
  result.counts = share_among_rows(is_left, count, ablation.loses_rest);
  return result;
}

}  // namespace perseid
