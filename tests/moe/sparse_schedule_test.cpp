// Schedules against closed forms.
//   Times     begin + j every, before end; end = -1 is three quarters
//   Fraction  constant, cosine, poly, linear at the ends and in between; never below alpha_min
//   Stagger   each unit once per window, spread evenly, whatever the order of the keys; none after
//   end
//   Windows   of the token clock: floor((time - begin - offset) / every) from begin on, before end
#include "moe/sparse_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/config_error.h"

namespace perseid {
namespace {

using testing::config_error;

TEST(SparseSchedule, Times) {
  Schedule schedule;
  schedule.begin = 7;
  schedule.every = 10;
  schedule.total_steps = 101;
  EXPECT_EQ(schedule.end_step(), 75);
  std::vector<int64_t> steps;
  for (int64_t step = 0; step < 200; ++step) {
    if (is_update_step(schedule, step, 0)) steps.push_back(step);
  }
  EXPECT_EQ(steps, (std::vector<int64_t>{7, 17, 27, 37, 47, 57, 67}));
  schedule.end = 27;
  EXPECT_TRUE(is_update_step(schedule, 17, 0));
  EXPECT_FALSE(is_update_step(schedule, 27, 0));
  schedule.end = schedule.begin;
  for (int64_t step = 0; step < 200; ++step) EXPECT_FALSE(is_update_step(schedule, step, 0));
}

TEST(SparseSchedule, Fraction) {
  Schedule schedule;
  schedule.begin = 100;
  schedule.end = 300;
  schedule.alpha = 0.4;
  const auto at = [&](int64_t step) { return drop_fraction(schedule, step); };
  schedule.anneal = Anneal::kConstant;
  EXPECT_EQ(at(100), 0.4);
  EXPECT_EQ(at(299), 0.4);
  schedule.anneal = Anneal::kCosine;
  EXPECT_DOUBLE_EQ(at(100), 0.4);
  EXPECT_DOUBLE_EQ(at(200), 0.2);
  EXPECT_NEAR(at(150), 0.2 * (1 + std::sqrt(0.5)), 1e-15);
  EXPECT_NEAR(at(300), 0, 1e-15);
  schedule.anneal = Anneal::kPoly;
  schedule.power = 3;
  EXPECT_DOUBLE_EQ(at(100), 0.4);
  EXPECT_DOUBLE_EQ(at(200), 0.05);
  schedule.anneal = Anneal::kLinear;
  EXPECT_DOUBLE_EQ(at(150), 0.3);
  schedule.alpha_min = 0.1;
  EXPECT_EQ(at(299), 0.1);
}

TEST(SparseSchedule, Stagger) {
  Schedule schedule;
  schedule.begin = 5;
  schedule.end = 95;
  schedule.every = 12;
  schedule.stagger = true;
  std::vector<UnitKey> keys;
  for (int64_t layer = 0; layer < 2; ++layer) {
    for (int64_t expert = 0; expert < 3; ++expert) {
      for (const Matrix matrix : {Matrix::kW1, Matrix::kW2})
        keys.push_back({layer, expert, matrix});
    }
  }
  const std::vector<int64_t> offsets = update_offsets(schedule, keys);
  std::vector<int64_t> sorted = offsets;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t u = 0; u < 12; ++u) EXPECT_EQ(sorted[static_cast<size_t>(u)], u);
  for (const int64_t offset : offsets) {
    for (int64_t window = 5; window + 12 <= 95; window += 12) {
      int64_t updates = 0;
      for (int64_t step = window; step < window + 12; ++step) {
        updates += is_update_step(schedule, step, offset) ? 1 : 0;
      }
      EXPECT_EQ(updates, 1);
    }
    for (int64_t step = 95; step < 200; ++step) {
      EXPECT_FALSE(is_update_step(schedule, step, offset));
    }
  }
  std::vector<UnitKey> other(keys.rbegin(), keys.rend());
  std::vector<int64_t> of_other = update_offsets(schedule, other);
  std::reverse(of_other.begin(), of_other.end());
  EXPECT_EQ(of_other, offsets);
  // Experts 0, 2, 1, 3: neighbours in time are half the experts apart.
  const std::vector<UnitKey> experts = {{0, 0}, {0, 1}, {0, 2}, {0, 3}};
  EXPECT_EQ(update_offsets(schedule, experts), (std::vector<int64_t>{0, 6, 3, 9}));
  schedule.stagger = false;
  EXPECT_EQ(update_offsets(schedule, experts), std::vector<int64_t>(4, 0));
}

TEST(SparseSchedule, Windows) {
  Schedule schedule;
  schedule.begin = 7;
  schedule.every = 10;
  schedule.end = 40;
  const auto at = [&](double time) { return update_window(schedule, time, 2); };
  EXPECT_EQ(at(8.99), -1);
  EXPECT_EQ(at(9), 0);
  EXPECT_EQ(at(18.99), 0);
  EXPECT_EQ(at(19), 1);
  EXPECT_EQ(at(39.5), 3);
  EXPECT_EQ(at(40), -1);
  // At whole times the windows begin with the updates of the step clock.
  for (int64_t step = 1; step < 60; ++step) {
    const auto time = static_cast<double>(step);
    EXPECT_EQ(is_update_step(schedule, step, 2), at(time) > at(time - 1)) << step;
  }
}

TEST(SparseSchedule, Refused) {
  Schedule schedule;
  EXPECT_EQ(
      config_error([&] { validate(schedule); }),
      "[sparse_schedule] total_steps=0 is not above 0, but end=-1 is a share of it; set one of "
      "them");
  schedule.end = 10;
  schedule.every = 0;
  EXPECT_EQ(config_error([&] { validate(schedule); }), "[sparse_schedule] every=0 is below 1");
  schedule.every = 1;
  schedule.alpha = 1.5;
  EXPECT_EQ(config_error([&] { validate(schedule); }),
            "[sparse_schedule] alpha=1.5 is outside [0, 1]");
  schedule.alpha = 0.5;
  schedule.mean_rows = -1;
  EXPECT_EQ(config_error([&] { validate(schedule); }),
            "[sparse_schedule] mean_rows=-1 is not a finite number of 0 or more");
  schedule.mean_rows = 0;
  schedule.clock = Clock::kTokens;
  EXPECT_EQ(
      config_error([&] { validate(schedule); }),
      "[sparse_schedule] mean_rows=0 is to be measured before begin=0; set it, or begin later");
}

}  // namespace
}  // namespace perseid
