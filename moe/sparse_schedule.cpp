#include "moe/sparse_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <tuple>

#include "kernels/error.h"
#include "moe/sparse_targets.h"

namespace perseid {
namespace {

constexpr const char* kSparseSchedule = "sparse_schedule";

uint64_t reversed_bits(uint64_t x) {
  uint64_t result = 0;
  for (int bit = 0; bit < 64; ++bit) result |= (x >> bit & 1) << (63 - bit);
  return result;
}

/// Where a stage or a frame begins.
void require_share(const char* argument, double from, double before, bool is_first) {
  require(is_first ? from == 0 : from > before && from < 1, kSparseSchedule, argument, from,
          is_first ? "is where the first begins; that is 0"
                   : "is where one begins after " + to_text(before) + "; it must rise, below 1");
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
  require((schedule.anneal == Anneal::kStages) == !schedule.stages.empty(), kSparseSchedule,
          "stages", schedule.stages.size(),
          schedule.stages.empty() ? "is none; stages need at least one"
                                  : "are given, but the fraction does not go by stages");
  for (size_t i = 0; i < schedule.stages.size(); ++i) {
    const DropStage& stage = schedule.stages[i];
    require_share("stages", stage.from, i == 0 ? 0 : schedule.stages[i - 1].from, i == 0);
    require(stage.share >= 0 && stage.share <= 1, kSparseSchedule, "share", stage.share,
            "of a stage is outside [0, 1]");
  }
  const bool ramps = schedule.density_ramp.has_value() || schedule.nm_ramp.has_value();
  require(!ramps || schedule.clock == Clock::kStep, kSparseSchedule, "clock", "tokens",
          "does not go with a ramp, which is a function of the step");
  require(!schedule.grow_first || schedule.clock == Clock::kStep, kSparseSchedule, "clock",
          "tokens", "does not go with grow_first, whose last update must come");
  const int64_t last = last_window(schedule);
  const int64_t last_step = schedule.begin + last * schedule.every;
  require(last >= 0 || (!ramps && !schedule.grow_first), kSparseSchedule, "end",
          schedule.end_step(), "leaves no update for a ramp or for grow_first to end");
  if (schedule.density_ramp.has_value()) {
    const DensityRamp& ramp = *schedule.density_ramp;
    require(!schedule.nm_ramp.has_value(), kSparseSchedule, "density_ramp", "given",
            "does not go with nm_ramp, which has densities of its own");
    require(ramp.begin >= -1, kSparseSchedule, "ramp begin", ramp.begin,
            "is below -1; choose -1 for that of the updates");
    require(ramp.end >= -1 && ramp.end <= last_step, kSparseSchedule, "ramp end", ramp.end,
            "is outside [-1, " + to_text(last_step) +
                "], the first step of the last window of updates, which ends the ramp");
    const int64_t begin = ramp.begin < 0 ? schedule.begin : ramp.begin;
    const int64_t end = ramp.end < 0 ? last_step : ramp.end;
    require(begin <= end, kSparseSchedule, "ramp begin", begin, "is above its end=" + to_text(end));
    require(std::isfinite(ramp.power) && ramp.power > 0, kSparseSchedule, "ramp power", ramp.power,
            "is not a finite number above 0");
  }
  if (schedule.nm_ramp.has_value()) {
    const std::vector<NmRampFrame>& frames = schedule.nm_ramp->frames;
    require(!frames.empty(), kSparseSchedule, "nm_ramp", "empty", "has no frame; list one");
    for (size_t i = 0; i < frames.size(); ++i) {
      const NmRampFrame& frame = frames[i];
      const std::string text = to_text(frame.n) + ":" + to_text(frame.m);
      require_share("nm_ramp", frame.from, i == 0 ? 0 : frames[i - 1].from, i == 0);
      require(frame.m >= 1 && frame.n >= 1 && frame.n <= frame.m, kSparseSchedule, "frame", text,
              "is not 1 <= N <= M");
      require(i == 0 || frame.n * frames[i - 1].m <= frames[i - 1].n * frame.m, kSparseSchedule,
              "frame", text, "is denser than the one before it");
    }
    require(ramp_frame(schedule, last) + 1 == frames.size(), kSparseSchedule, "frame from",
            frames.back().from,
            "is after the last update at step " + to_text(last_step) + "; begin it earlier");
  }
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
    case Anneal::kStages:
      for (const DropStage& stage : schedule.stages) {
        // A share such as 1/3 may be a rounding error above the step that is meant.
        if (x >= stage.from - 1e-9) fraction = schedule.alpha * stage.share;
      }
      break;
  }
  return std::clamp(fraction, schedule.alpha_min, schedule.alpha);
}

}  // namespace perseid
