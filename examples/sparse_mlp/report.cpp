#include "examples/sparse_mlp/report.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "examples/common/console.h"
#include "examples/common/text.h"

namespace perseid::examples {
namespace {

std::string percent(double share) {
  return std::isnan(share) ? "-" : format_text("%.2f", 100 * share);
}

/// To four digits behind the point: a picture needs no more.
std::vector<double> rounded(std::vector<double> values) {
  for (double& value : values) value = std::round(1e4 * value) / 1e4;
  return values;
}

std::vector<double> of_updates(const MlpResult& result, std::vector<double> MaskPoint::*values) {
  std::vector<double> all;
  for (const MaskPoint& point : result.updates) {
    all.insert(all.end(), (point.*values).begin(), (point.*values).end());
  }
  return rounded(all);
}

}  // namespace

std::string mlp_table(const std::vector<MlpResult>& results) {
  std::vector<std::vector<std::string>> rows;
  for (const MlpResult& result : results) {
    rows.push_back({result.method, with_commas(result.num_weights), percent(result.last),
                    percent(result.last_after()), percent(result.best()), percent(result.last_all),
                    format_text("%.3f", result.itop_rate), format_text("%.0f", result.seconds)});
  }
  return results_table({"--dst", "weights", "accuracy %", "after update", "best epoch",
                        "all test images", "ever active", "s"},
                       rows);
}

std::string random_search_text(const std::vector<MlpResult>& runs) {
  double sum = 0, squares = 0, seconds = 0;
  const MlpResult* chosen = &runs.front();
  for (const MlpResult& run : runs) {
    sum += run.last;
    seconds += run.seconds;
    if (run.last_validation > chosen->last_validation) chosen = &run;
  }
  const auto count = static_cast<double>(runs.size());
  const double mean = sum / count;
  for (const MlpResult& run : runs) squares += (run.last - mean) * (run.last - mean);
  return format_text(
      "random search: %zu static masks in %.0f s; accuracy %.2f %% on average, standard deviation "
      "%.2f; seed %llu is the best on the validation images (%.2f %%): %.2f %%",
      runs.size(), seconds, 100 * mean, count > 1 ? 100 * std::sqrt(squares / (count - 1)) : 0.0,
      static_cast<unsigned long long>(chosen->seed), 100 * chosen->last_validation,
      100 * chosen->last);
}

JsonObject mlp_json(const MlpResult& result, int64_t epochs, int64_t train_images) {
  std::vector<double> before, after;
  std::vector<int64_t> steps;
  for (const MaskPoint& point : result.updates) {
    steps.push_back(point.step);
    before.push_back(point.before);
    after.push_back(point.after);
  }
  return {{"dst", result.method},
          {"seed", static_cast<int64_t>(result.seed)},
          {"epochs", epochs},
          {"train_images", train_images},
          {"weights", result.num_weights},
          {"last", result.last},
          {"last_all", result.last_all},
          {"last_validation", result.last_validation},
          {"last_after", result.last_after()},
          {"best", result.best()},
          {"itop_rate", result.itop_rate},
          {"seconds", std::round(10 * result.seconds) / 10},
          {"density", rounded(result.density)},
          {"accuracy", rounded(result.accuracy)},
          {"steps", steps},
          {"before", rounded(before)},
          {"after", rounded(after)},
          {"churn", of_updates(result, &MaskPoint::churn)},
          {"overlap", of_updates(result, &MaskPoint::overlap)},
          {"fired", of_updates(result, &MaskPoint::fired)}};
}

}  // namespace perseid::examples
