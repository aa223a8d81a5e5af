// Budgets against closed forms.
//   DensityIsARatio   decimals and thirds are exact; refused: 0, above 1, NaN
//   Uniform           exact sum, within one granule of the share, ties in the order of the units
//   FanIn             1000x1000 at 1/2 .. 1/100 gives exactly 1000 d per row (at 0.1: 100, at 0.2:
//   200) Er, Erk           against the saturation loop of RigL, written out here; the sum is exact;
//   equal
//                     shapes are uniform; power 0 is uniform, and more power is further from it
//   Epsilon           the published 22 852, 25 665, 25 665, 7 310 of the tutorial's network
//   Bounds            floors and ceilings hold, the others share; impossible ones are named
//   Custom            patterns by name, one that fits nothing is refused
#include "moe/sparse_budget.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "tests/config_error.h"

namespace perseid {
namespace {

using testing::config_error;

std::vector<BudgetUnit> units_of(const std::vector<std::vector<int64_t>>& shapes) {
  std::vector<BudgetUnit> units;
  for (const auto& shape : shapes) {
    BudgetUnit unit;
    unit.name = "unit" + std::to_string(units.size());
    unit.out = shape[0];
    unit.in = shape[1];
    units.push_back(unit);
  }
  return units;
}
int64_t sum_of(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}
int64_t size_of(const std::vector<BudgetUnit>& units) {
  int64_t sum = 0;
  for (const BudgetUnit& unit : units) sum += unit.out * unit.in;
  return sum;
}
Budget budget_of(Distribution distribution, Density density) {
  Budget budget;
  budget.distribution = distribution;
  budget.density = density;
  return budget;
}

TEST(SparseBudget, DensityIsARatio) {
  EXPECT_EQ(Density(0.1), Density::ratio(1, 10));
  EXPECT_EQ(Density(0.029), Density::ratio(29, 1000));
  EXPECT_EQ(Density(1.0 / 3), Density::ratio(2, 6));
  EXPECT_EQ(Density(1.0), Density());
  EXPECT_EQ(Density(1e-7), Density::ratio(1, 10'000'000));
  EXPECT_EQ(Density(0.1).of(58'720'256), 5'872'026);
  EXPECT_EQ(Density::ratio(1, 3).of(int64_t{3} << 40), int64_t{1} << 40);
  EXPECT_EQ(Density(0.5).of(3), 2);
  for (const double d : {0.7, 0.123456789, 0.9999999, 3.14159e-3}) {
    EXPECT_EQ(Density(d).value(), d);
  }
  EXPECT_EQ(
      config_error([] { Density(0.0); }),
      "[sparse_budget] density=0 is outside (0, 1]; it is the share of active weights, not of "
      "zeros");
  EXPECT_NE(config_error([] { Density(1.5); }).find("density=1.5"), std::string::npos);
  EXPECT_NE(config_error([] { Density(std::nan("")); }).find("density=nan"), std::string::npos);
  EXPECT_NE(config_error([] { Density::ratio(3, 2); }).find("numerator=3"), std::string::npos);
}

TEST(SparseBudget, Uniform) {
  auto units = units_of({{30, 10}, {7, 11}, {100, 3}, {7, 11}});
  const Allocation found = allocate(budget_of(Distribution::kUniform, 0.37), units);
  EXPECT_EQ(sum_of(found.nnz), 279);  // 0.37 * 754 = 278.98
  EXPECT_EQ(found.rest, 0);
  // Shares 111.007, 28.491, 111.007, 28.491: one of the equal two gets the last, the first does.
  EXPECT_EQ(found.nnz, (std::vector<int64_t>{111, 29, 111, 28}));
  EXPECT_EQ(allocate(budget_of(Distribution::kUniform, 1.0), units).nnz,
            (std::vector<int64_t>{300, 77, 300, 77}));
  EXPECT_TRUE(allocate(budget_of(Distribution::kUniform, 0.5), {}).nnz.empty());

  // Granules of 4 and 6: what no granule fits in is reported.
  units = units_of({{8, 8}, {6, 6}});
  units[0].granule = 4;
  units[1].granule = 6;
  const Allocation mixed = allocate(budget_of(Distribution::kUniform, 0.53), units);
  EXPECT_EQ(mixed.nnz[0] % 4, 0);
  EXPECT_EQ(mixed.nnz[1] % 6, 0);
  EXPECT_EQ(sum_of(mixed.nnz) + mixed.rest, 53);
  EXPECT_LT(mixed.rest, 4);
  EXPECT_GE(mixed.rest, 0);
}

TEST(SparseBudget, FanIn) {
  for (const int64_t divisor : {2, 4, 5, 10, 20, 100}) {
    for (const auto& shape : std::vector<std::vector<int64_t>>{{1000, 1000}, {768, 3000}}) {
      auto units = units_of({shape, shape, shape});
      for (BudgetUnit& unit : units) unit.granule = unit.out;
      const Density density(1.0 / static_cast<double>(divisor));
      for (const int64_t nnz : allocate(budget_of(Distribution::kUniform, density), units).nnz) {
        EXPECT_EQ(nnz, shape[0] * (shape[1] / divisor)) << divisor;
      }
    }
  }
}

/// The loop of the field: whoever would be above 1 becomes dense, and the others share the rest.
std::vector<double> erk_targets(const std::vector<BudgetUnit>& units, double density,
                                double power) {
  std::vector<bool> is_dense(units.size(), false);
  std::vector<double> targets(units.size());
  while (true) {
    double left = density * static_cast<double>(size_of(units)), raw = 0;
    const auto probability = [&](size_t u) {
      const auto size = static_cast<double>(units[u].out * units[u].in);
      return std::pow(static_cast<double>(units[u].out + units[u].in) / size, power);
    };
    for (size_t u = 0; u < units.size(); ++u) {
      const auto size = static_cast<double>(units[u].out * units[u].in);
      if (is_dense[u]) {
        left -= size;
      } else {
        raw += probability(u) * size;
      }
    }
    double highest = 0;
    for (size_t u = 0; u < units.size(); ++u) {
      if (!is_dense[u]) highest = std::max(highest, probability(u));
    }
    const double scale = left / raw;
    for (size_t u = 0; u < units.size(); ++u) {
      const auto size = static_cast<double>(units[u].out * units[u].in);
      targets[u] = is_dense[u] ? size : scale * probability(u) * size;
    }
    if (scale * highest <= 1) return targets;
    for (size_t u = 0; u < units.size(); ++u) {
      if (!is_dense[u] && probability(u) == highest) is_dense[u] = true;
    }
  }
}

TEST(SparseBudget, Erk) {
  const auto units = units_of({{1000, 784}, {1000, 1000}, {10, 1000}, {16, 4}, {4096, 512}});
  for (const double density : {0.01, 0.1, 0.3, 0.6, 0.95}) {
    for (const double power : {0.3, 1.0, 1.7}) {
      Budget budget = budget_of(Distribution::kErk, density);
      budget.power = power;
      const Allocation found = allocate(budget, units);
      const auto expected = erk_targets(units, density, power);
      EXPECT_EQ(sum_of(found.nnz), Density(density).of(size_of(units)));
      for (size_t u = 0; u < units.size(); ++u) {
        EXPECT_NEAR(static_cast<double>(found.nnz[u]), expected[u], 1.0)
            << density << " " << power << " " << u;
      }
      if (power == 1.0) {
        EXPECT_EQ(allocate(budget_of(Distribution::kEr, density), units).nnz, found.nnz);
      }
    }
    Budget zero = budget_of(Distribution::kErk, density);
    zero.power = 0;
    EXPECT_EQ(allocate(zero, units).nnz,
              allocate(budget_of(Distribution::kUniform, density), units).nnz);
  }
  // The large weight's share falls with the power, while no unit is dense.
  const auto two = units_of({{64, 48}, {4096, 512}});
  int64_t last = size_of(two);
  for (const double power : {0.0, 0.25, 0.5, 1.0, 1.5}) {
    Budget budget = budget_of(Distribution::kErk, 0.01);
    budget.power = power;
    const int64_t nnz = allocate(budget, two).nnz[1];
    EXPECT_LT(nnz, last);
    last = nnz;
  }
  const auto equal = units_of({{64, 48}, {64, 48}, {64, 48}, {64, 48}});
  EXPECT_EQ(allocate(budget_of(Distribution::kErk, 0.3), equal).nnz,
            allocate(budget_of(Distribution::kUniform, 0.3), equal).nnz);
}

TEST(SparseBudget, Epsilon) {
  Budget budget;
  budget.distribution = Distribution::kEpsilon;
  budget.epsilon = 13;
  const auto units = units_of({{1000, 784}, {1000, 1000}, {1000, 1000}, {10, 1000}});
  EXPECT_EQ(allocate(budget, units).nnz, (std::vector<int64_t>{22852, 25665, 25665, 7310}));
  budget.epsilon = 0;
  EXPECT_EQ(config_error([&] { allocate(budget, units); }),
            "[sparse_budget] epsilon=0 is not a finite number above 0");
}

TEST(SparseBudget, Bounds) {
  auto units = units_of({{10, 10}, {10, 10}, {10, 10}, {10, 10}});
  units[0].floor = 40;
  units[3].ceiling = 5;
  EXPECT_EQ(allocate(budget_of(Distribution::kUniform, 0.2), units).nnz,
            (std::vector<int64_t>{40, 18, 17, 5}));
  // What the ceiling frees lifts the first above its floor: it takes an equal share.
  units[0].floor = 51;
  EXPECT_EQ(allocate(budget_of(Distribution::kUniform, 0.5), units).nnz,
            (std::vector<int64_t>{65, 65, 65, 5}));
  units[0].floor = 40;
  units[1].floor = 100;  // frozen dense
  EXPECT_EQ(
      config_error([&] { allocate(budget_of(Distribution::kUniform, 0.2), units); }),
      "[sparse_budget] density=0.2 allows 80 of 400 weights, but the floors need 140; choose a "
      "higher density or lower floors");
  EXPECT_EQ(config_error([&] { allocate(budget_of(Distribution::kUniform, 0.9), units); }),
            "[sparse_budget] density=0.9 asks for 360 of 400 weights, but the ceilings allow 305; "
            "choose a lower density or higher ceilings");
  units[2].granule = 30;
  units[2].floor = 95;
  EXPECT_EQ(config_error([&] { allocate(budget_of(Distribution::kUniform, 0.5), units); }),
            "[sparse_budget] floor of unit2=95 leaves no multiple of granule=30 up to ceiling=100");
}

TEST(SparseBudget, Custom) {
  Budget budget = budget_of(Distribution::kCustom, 0.5);
  auto units = units_of({{10, 10}, {10, 10}, {10, 10}});
  units[0].name = "experts.0.w1";
  units[1].name = "experts.0.w2";
  units[2].name = "head";
  budget.custom = {{"experts.*.w2", 0.2}, {"experts.*", 0.1}};
  EXPECT_EQ(allocate(budget, units).nnz, (std::vector<int64_t>{10, 20, 50}));
  budget.custom.push_back({"expert", 0.3});
  EXPECT_EQ(config_error([&] { allocate(budget, units); }),
            "[sparse_budget] custom=expert matches no unit; correct the pattern");
}

}  // namespace
}  // namespace perseid
