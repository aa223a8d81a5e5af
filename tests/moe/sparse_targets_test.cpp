// What falling budgets are at each step.
//   Density        the cubic, the linear and the default ramp against closed forms, exact at both
//                  ends
//   Exact          of units of all shapes: exact sums in each window, multiples of granules, never
//                  rising, near the budget's own allocation, exactly it at the end; in any order
//   EachByItself   epsilon and custom: closed form of each unit
//   Stages         of the drop fraction, and frames of N:M, at their first step
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/random.h"
#include "moe/sparse_structure.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_ramp_fixture.h"

namespace perseid::testing {
namespace {

TEST(SparseTargets, Density) {
  Schedule schedule = ramp_schedule();
  EXPECT_EQ(last_window(schedule), 10);
  EXPECT_EQ(window_of(schedule, 9), -1);
  EXPECT_EQ(window_of(schedule, 10), 0);
  EXPECT_EQ(window_of(schedule, 29), 1);
  EXPECT_EQ(window_of(schedule, 10'000), 10);
  const Density tenth = Density::ratio(1, 10);
  EXPECT_EQ(ramp_density(schedule, tenth, -1), Density());
  EXPECT_EQ(ramp_density(schedule, tenth, 0), Density());
  EXPECT_EQ(ramp_density(schedule, tenth, 10), tenth);
  for (int64_t window = 0; window <= 10; ++window) {
    const double x = static_cast<double>(window) / 10;
    EXPECT_NEAR(ramp_density(schedule, tenth, window).value(), 0.1 + 0.9 * std::pow(1 - x, 3),
                1e-15);
  }
  EXPECT_NEAR(ramp_density(schedule, tenth, 5).value(), 0.2125, 1e-15);  // .1 + .9 / 8
  schedule.density_ramp = DensityRamp{0.5, 30, 50, 1};
  EXPECT_EQ(ramp_density(schedule, tenth, 2), Density::ratio(1, 2));
  EXPECT_NEAR(ramp_density(schedule, tenth, 3).value(), 0.3, 1e-15);
  EXPECT_EQ(ramp_density(schedule, tenth, 4), tenth);
  EXPECT_EQ(ramp_density(schedule, tenth, 7), tenth);
  // Staggered units end with the last window that is complete.
  schedule = ramp_schedule();
  schedule.stagger = true;
  EXPECT_EQ(last_window(schedule), 9);
  schedule.end = 110;
  EXPECT_EQ(last_window(schedule), 9);
  schedule.end = 109;
  EXPECT_EQ(last_window(schedule), 8);
  schedule.density_ramp.reset();
  EXPECT_EQ(ramp_density(schedule, tenth, 0), tenth);
}

TEST(SparseTargets, Exact) {
  const std::vector<std::pair<int64_t, int64_t>> shapes = {{31, 17}, {64, 20}, {5, 100}, {31, 17},
                                                           {7, 9},   {40, 3},  {1, 77}};
  for (const Distribution distribution :
       {Distribution::kUniform, Distribution::kEr, Distribution::kErk, Distribution::kGlobal,
        Distribution::kLoad}) {
    for (const int64_t granule : {1, 4, 0}) {  // 0: the number of rows
      for (const double power : {3.0, 1.0, 0.5}) {
        std::vector<BudgetUnit> units;
        int64_t size = 0;
        for (const auto& [out, in] : shapes) {
          units.push_back(budget_unit(out, in, granule == 0 ? out : granule,
                                      static_cast<int64_t>(units.size())));
          size += out * in;
        }
        Budget budget;
        budget.distribution = distribution;
        budget.density = Density::ratio(3, 10);
        Schedule schedule = ramp_schedule(24);
        schedule.density_ramp->power = power;
        schedule.density_ramp->initial = Density::ratio(9, 10);
        BudgetTargets targets(budget, schedule, units);
        const Allocation last = allocate(budget, units);
        EXPECT_EQ(targets.last().nnz, last.nnz);
        std::vector<std::vector<int64_t>> all;
        std::vector<int64_t> before = targets.first();
        for (int64_t window = 0; window <= 23; ++window) {
          const std::vector<int64_t> now = targets.at(window);
          const double x = static_cast<double>(window) / 23;
          const double density = window == 23 ? 0.3 : 0.3 + 0.6 * std::pow(1 - x, power);
          const int64_t sum = std::accumulate(now.begin(), now.end(), int64_t{0});
          const double wanted = density * static_cast<double>(size);
          if (granule > 0) {
            const auto q = static_cast<double>(granule);
            EXPECT_EQ(sum, granule * static_cast<int64_t>(std::floor(wanted / q + 0.5)));
          } else {
            EXPECT_NEAR(static_cast<double>(sum), wanted, 64);
          }
          const int64_t largest = granule == 0 ? 64 : granule;
          Budget own = budget;
          own.density = Density(density);
          const Allocation plain = allocate(own, units);
          for (size_t u = 0; u < units.size(); ++u) {
            EXPECT_EQ(now[u] % units[u].granule, 0);
            EXPECT_LE(now[u], before[u]) << window;
            EXPECT_GE(now[u], last.nnz[u]) << window;
            EXPECT_LE(std::abs(now[u] - plain.nnz[u]), 2 * largest) << window << " " << granule;
          }
          before = now;
          all.push_back(now);
        }
        EXPECT_EQ(before, last.nnz);
        EXPECT_EQ(targets.at(1'000), last.nnz);
        for (const int64_t window : {5, 3, 22, 0, 23, -1, 7}) {
          EXPECT_EQ(targets.at(window),
                    window < 0 ? targets.first() : all[static_cast<size_t>(window)]);
        }
        EXPECT_NE(targets.first(), last.nnz);
      }
    }
  }
}

TEST(SparseTargets, EachByItself) {
  const std::vector<BudgetUnit> units = {budget_unit(50, 40, 1, 0), budget_unit(30, 40, 10, 1)};
  Budget budget;
  budget.distribution = Distribution::kCustom;
  budget.density = Density::ratio(1, 10);
  budget.custom = {{"u1", Density::ratio(1, 4)}};
  Schedule schedule = ramp_schedule();
  schedule.density_ramp->initial = 0.5;
  BudgetTargets targets(budget, schedule, units);
  EXPECT_EQ(targets.first(), (std::vector<int64_t>{1000, 600}));
  // (1 - x)^3 = 1/8: 200 + 800 / 8 and 300 + 300 / 8 = 337.5, which is 340 in tens.
  EXPECT_EQ(targets.at(5), (std::vector<int64_t>{300, 340}));
  EXPECT_EQ(targets.at(10), (std::vector<int64_t>{200, 300}));
  budget = {};
  budget.distribution = Distribution::kEpsilon;
  budget.epsilon = 4;
  BudgetTargets epsilon(budget, schedule, units);
  for (size_t u = 0; u < 2; ++u) {
    const int64_t last = epsilon.last().nnz[u], first = u == 0 ? 1000 : 600;
    EXPECT_EQ(epsilon.first()[u], first);
    EXPECT_NEAR(static_cast<double>(epsilon.at(5)[u]),
                static_cast<double>(last) + static_cast<double>(first - last) / 8, 5.001);
    EXPECT_EQ(epsilon.at(10)[u], last);
  }
}

TEST(SparseTargets, Stages) {
  Schedule schedule;
  schedule.begin = 100;
  schedule.end = 400;
  schedule.alpha = 0.4;
  schedule.anneal = Anneal::kStages;
  schedule.stages = {{0, 1}, {1.0 / 3, 0.5}, {2.0 / 3, 0.25}};
  validate(schedule);
  EXPECT_EQ(drop_fraction(schedule, 100), 0.4);
  EXPECT_EQ(drop_fraction(schedule, 199), 0.4);
  EXPECT_EQ(drop_fraction(schedule, 200), 0.2);
  EXPECT_EQ(drop_fraction(schedule, 299), 0.2);
  EXPECT_EQ(drop_fraction(schedule, 300), 0.1);
  EXPECT_EQ(drop_fraction(schedule, 399), 0.1);
  schedule.every = 10;
  schedule.nm_ramp = NmRamp{{{0, 7, 8}, {1.0 / 3, 4, 8}, {2.0 / 3, 1, 4}}};
  validate(schedule);
  const auto frame = [&](int64_t step) { return ramp_frame(schedule, window_of(schedule, step)); };
  EXPECT_EQ(frame(0), 0u);
  EXPECT_EQ(frame(199), 0u);
  EXPECT_EQ(frame(200), 1u);
  EXPECT_EQ(frame(299), 1u);
  EXPECT_EQ(frame(300), 2u);
  EXPECT_EQ(frame(4'000), 2u);
}

}  // namespace
}  // namespace perseid::testing
