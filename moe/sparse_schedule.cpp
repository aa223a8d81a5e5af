#include "moe/sparse_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <tuple>

#include "kernels/error.h"

namespace perseid {
namespace {

constexpr const char* kSparseSchedule = "sparse_schedule";

uint64_t reversed_bits(uint64_t x) {
  uint64_t result = 0;
  for (int bit = 0; bit < 64; ++bit) result |= (x >> bit & 1) << (63 - bit);
  return result;
}

}  // namespace

int64_t Schedule::end_step() const { return end >= 0 ? end : total_steps * 3 / 4; }

void validate(const Schedule& schedule) {
  require(schedule.begin >= 0, kSparseSchedule, "begin", schedule.begin, "is negative");
  require(schedule.every >= 1, kSparseSchedule, "every", schedule.every, "is below 1");
  require(schedule.end >= -1, kSparseSchedule, "end", schedule.end,
          "is below -1; choose -1 for three quarters of total_steps");
  require(schedule.end >= 0 || schedule.total_steps > 0, kSparseSchedule, "total_steps",
          schedule.total_steps, "is not above 0, but end=-1 is a share of it; set one of them");
  require(schedule.alpha >= 0 && schedule.alpha <= 1, kSparseSchedule, "alpha", schedule.alpha,
          "is outside [0, 1]");
  require(schedule.alpha_min >= 0 && schedule.alpha_min <= schedule.alpha, kSparseSchedule,
          "alpha_min", schedule.alpha_min, "is outside [0, alpha=" + to_text(schedule.alpha) + "]");
  require(std::isfinite(schedule.power) && schedule.power > 0, kSparseSchedule, "power",
          schedule.power, "is not a finite number above 0");
  require(std::isfinite(schedule.mean_rows) && schedule.mean_rows >= 0, kSparseSchedule,
          "mean_rows", schedule.mean_rows, "is not a finite number of 0 or more");
  require(schedule.clock == Clock::kStep || schedule.mean_rows > 0 || schedule.begin > 0,
          kSparseSchedule, "mean_rows", schedule.mean_rows,
          "is to be measured before begin=0; set it, or begin later");
}

std::vector<int64_t> update_offsets(const Schedule& schedule, const std::vector<UnitKey>& keys) {
  std::vector<int64_t> offsets(keys.size(), 0);
  if (!schedule.stagger) return offsets;
  std::vector<size_t> order(keys.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto rank = [&](size_t u) {
    return std::tuple(keys[u].layer, keys[u].matrix,
                      reversed_bits(static_cast<uint64_t>(keys[u].expert)));
  };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return rank(a) < rank(b); });
  const auto count = static_cast<int64_t>(keys.size());
  for (int64_t ordinal = 0; ordinal < count; ++ordinal) {
    offsets[order[static_cast<size_t>(ordinal)]] = schedule.every * ordinal / count;
  }
  return offsets;
}

bool is_update_step(const Schedule& schedule, int64_t step, int64_t offset) {
  const int64_t since = step - schedule.begin - offset;
  return since >= 0 && step < schedule.end_step() && since % schedule.every == 0;
}

int64_t update_window(const Schedule& schedule, double time, int64_t offset) {
  const double since = time - static_cast<double>(schedule.begin + offset);
  if (since < 0 || time >= static_cast<double>(schedule.end_step())) return -1;
  return static_cast<int64_t>(since / static_cast<double>(schedule.every));
}

double drop_fraction(const Schedule& schedule, double time) {
  const auto span = static_cast<double>(std::max<int64_t>(1, schedule.end_step() - schedule.begin));
  const double x = std::clamp((time - static_cast<double>(schedule.begin)) / span, 0.0, 1.0);
  double fraction = schedule.alpha;
  switch (schedule.anneal) {
    case Anneal::kConstant:
      break;
    case Anneal::kCosine:
      fraction = schedule.alpha / 2 * (1 + std::cos(std::numbers::pi * x));
      break;
    case Anneal::kPoly:
      fraction = schedule.alpha * std::pow(1 - x, schedule.power);
      break;
    case Anneal::kLinear:
      fraction = schedule.alpha * (1 - x);
      break;
  }
  return std::clamp(fraction, schedule.alpha_min, schedule.alpha);
}

}  // namespace perseid
