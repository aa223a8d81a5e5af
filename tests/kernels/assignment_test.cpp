// Linear assignment, square, with capacities and balanced.
//   EqualsBruteForce   n = 0 .. 7 and R < C: the assignment, with ties the cost; capacities
//   DualsProveIt       larger problems: no pair costs less than its duals, assigned pairs exactly
//                      that, only full columns have a dual; the sums are equal
//   NotAllowed         +infinity is never taken; no assignment is an error
//   BalancedBruteForce R up to 8: the assignment, with ties the sum of scores; sizes
//   BalancedSizes      rounded down or up, with R % C of the latter
//   BalancedIsOptimal  larger, C does not divide R: no exchange of two rows and no single move that
//                      keeps the balance is better
//   NonFinite          a score that is not finite counts as the smallest finite one
//   SameBits           equal input, equal output; float32 as its values in float64
#include "kernels/assignment.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

using Columns = std::vector<int32_t>;
using Costs = std::vector<double>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Normal values; with ties few whole ones.
Costs random_costs(int64_t count, uint32_t seed, bool has_ties) {
  Costs costs = normal_values<double>(count, seed);
  for (double& cost : costs) cost = has_ties ? std::round(cost) : cost;
  return costs;
}

Columns assigned(const AssignmentShape& shape, const Costs& cost,
                 const std::vector<int64_t>& capacity = {}, bool is_reference = false) {
  Columns columns(static_cast<size_t>(shape.num_rows), -7);
  const int64_t* room = capacity.empty() ? nullptr : capacity.data();
  is_reference ? assign_reference(shape, cost.data(), room, columns.data())
               : assign(shape, cost.data(), room, columns.data());
  return columns;
}

template <typename T>
Columns balanced(const AssignmentShape& shape, const std::vector<T>& scores,
                 bool is_reference = false) {
  Columns columns(static_cast<size_t>(shape.num_rows), -7);
  const DType dtype = DTypeOf<T>::value;
  is_reference ? assign_balanced_reference(shape, dtype, scores.data(), columns.data())
               : assign_balanced(shape, dtype, scores.data(), columns.data());
  return columns;
}

double sum_of(const AssignmentShape& shape, const Costs& cost, const Columns& columns) {
  double sum = 0;
  for (size_t r = 0; r < columns.size(); ++r) {
    sum += cost.at(r * static_cast<size_t>(shape.num_columns) + static_cast<size_t>(columns[r]));
  }
  return sum;
}

std::vector<int64_t> loads_of(const Columns& columns, int64_t num_columns) {
  std::vector<int64_t> loads(static_cast<size_t>(num_columns), 0);
  for (const int32_t c : columns) ++loads.at(static_cast<size_t>(c));
  return loads;
}

void expect_brute_force(const AssignmentShape& shape, const std::vector<int64_t>& capacity) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    for (const bool has_ties : {false, true}) {
      const Costs cost = random_costs(shape.num_rows * shape.num_columns, seed, has_ties);
      const Columns found = assigned(shape, cost, capacity);
      const Columns expected = assigned(shape, cost, capacity, true);
      if (!has_ties) {
        EXPECT_EQ(found, expected) << shape.num_rows << " x " << shape.num_columns;
      }
      EXPECT_NEAR(sum_of(shape, cost, found), sum_of(shape, cost, expected), 1e-12);
      const auto loads = loads_of(found, shape.num_columns);
      for (size_t c = 0; c < loads.size(); ++c) {
        EXPECT_LE(loads[c], capacity.empty() ? 1 : capacity[c]);
      }
    }
  }
}

TEST(Assignment, EqualsBruteForce) {
  for (int64_t n = 0; n <= 6; ++n) expect_brute_force({n, n}, {});
  for (const auto& shape : {AssignmentShape{0, 3}, {1, 5}, {3, 5}, {4, 7}}) {
    expect_brute_force(shape, {});
  }
  expect_brute_force({6, 3}, {2, 2, 2});
  expect_brute_force({5, 3}, {4, 0, 2});
  expect_brute_force({7, 2}, {5, 100});
  const AssignmentShape seven{7, 7};
  const Costs cost = random_costs(49, 3, false);
  EXPECT_EQ(assigned(seven, cost), assigned(seven, cost, {}, true));
}

void expect_optimal(const AssignmentShape& shape, const Costs& cost,
                    const std::vector<int64_t>& capacity) {
  Columns columns(static_cast<size_t>(shape.num_rows));
  std::vector<double> row = nans<double>(shape.num_rows), column = nans<double>(shape.num_columns);
  assign(shape, cost.data(), capacity.data(), columns.data(), {row.data(), column.data()});
  const double tolerance = 1e-11;
  double dual_sum = std::accumulate(row.begin(), row.end(), 0.0);
  const auto loads = loads_of(columns, shape.num_columns);
  for (size_t c = 0; c < column.size(); ++c) {
    ASSERT_LE(loads[c], capacity[c]);
    ASSERT_LE(column[c], 0);
    if (loads[c] < capacity[c]) {
      ASSERT_EQ(column[c], 0);
    }
    dual_sum += static_cast<double>(loads[c]) * column[c];
    for (size_t r = 0; r < row.size(); ++r) {
      const double slack = cost[r * column.size() + c] - row[r] - column[c];
      ASSERT_GE(slack, -tolerance) << r << " " << c;
      if (columns[r] == static_cast<int32_t>(c)) {
        ASSERT_LE(slack, tolerance) << r << " " << c;
      }
    }
  }
  EXPECT_NEAR(sum_of(shape, cost, columns), dual_sum, 1e-9);
}

TEST(Assignment, DualsProveIt) {
  for (const bool has_ties : {false, true}) {
    expect_optimal({150, 150}, random_costs(150 * 150, 1, has_ties), std::vector<int64_t>(150, 1));
    expect_optimal({100, 130}, random_costs(100 * 130, 2, has_ties), std::vector<int64_t>(130, 1));
    expect_optimal({256, 16}, random_costs(256 * 16, 3, has_ties), std::vector<int64_t>(16, 16));
    expect_optimal({250, 5}, random_costs(250 * 5, 4, has_ties), {10, 0, 200, 60, 60});
  }
  // All rows want the same columns.
  Costs cost = random_costs(200 * 8, 5, false);
  for (size_t i = 0; i < cost.size(); ++i) cost[i] += 10 * static_cast<double>(i % 8);
  expect_optimal({200, 8}, cost, std::vector<int64_t>(8, 25));
}

TEST(Assignment, NotAllowed) {
  EXPECT_EQ(assigned({3, 3}, {1, kInfinity, kInfinity, 0, 5, kInfinity, 0, 0, 9}),
            (Columns{0, 1, 2}));
  const Costs none = {1, kInfinity, 2, kInfinity};
  EXPECT_EQ(config_error([&] {
              assigned({2, 2}, none);
            }),
            "[assign] cost=+infinity in too many places: row 1 and those before it do not fit");
  EXPECT_EQ(config_error([&] {
              assigned({2, 2}, none, {}, true);
            }),
            "[assign] cost=+infinity in too many places: the rows do not fit");
}

TEST(Assignment, BalancedBruteForce) {
  for (int64_t R = 0; R <= 8; ++R) {
    for (int64_t C = 1; C <= 3; ++C) {
      for (uint32_t seed = 0; seed < 10; ++seed) {
        for (const bool has_ties : {false, true}) {
          const AssignmentShape shape{R, C};
          const Costs scores = random_costs(R * C, seed, has_ties);
          const Columns found = balanced(shape, scores), expected = balanced(shape, scores, true);
          if (!has_ties) {
            EXPECT_EQ(found, expected) << R << " " << C;
          }
          EXPECT_NEAR(sum_of(shape, scores, found), sum_of(shape, scores, expected), 1e-12);
        }
      }
    }
  }
  const Costs scores = random_costs(4 * 6, 1, false);  // more columns than rows
  EXPECT_EQ(balanced({4, 6}, scores), balanced({4, 6}, scores, true));
}

TEST(Assignment, BalancedSizes) {
  for (const int64_t R : {0, 1, 7, 64, 65, 127, 200}) {
    for (const int64_t C : {1, 2, 8, 64, 100}) {
      Costs scores = random_costs(R * C, 1, R % 2 == 0);
      for (size_t i = 0; i < scores.size(); i += static_cast<size_t>(C)) scores[i] += 100;
      const auto loads = loads_of(balanced({R, C}, scores), C);
      EXPECT_EQ(std::count(loads.begin(), loads.end(), R / C), C - R % C) << R << " " << C;
      EXPECT_EQ(std::count(loads.begin(), loads.end(), R / C + 1), R % C) << R << " " << C;
    }
  }
}

TEST(Assignment, BalancedIsOptimal) {
  const AssignmentShape shape{103, 8};
  const Costs scores = random_costs(103 * 8, 9, false);
  const Columns columns = balanced(shape, scores);
  const auto score = [&](size_t r, int32_t c) { return scores[r * 8 + static_cast<size_t>(c)]; };
  const auto loads = loads_of(columns, 8);
  for (size_t a = 0; a < columns.size(); ++a) {
    for (size_t b = 0; b < a; ++b) {
      EXPECT_LE(score(a, columns[b]) + score(b, columns[a]),
                score(a, columns[a]) + score(b, columns[b]) + 1e-12);
    }
    for (int32_t c = 0; c < 8; ++c) {
      if (loads[static_cast<size_t>(columns[a])] > loads[static_cast<size_t>(c)]) {
        EXPECT_LE(score(a, c), score(a, columns[a]));
      }
    }
  }
}

TEST(Assignment, NonFinite) {
  const Costs scores = {5, kNan, 0, 1, kInfinity, 4, 3, 2, -kInfinity, -kInfinity, 1, 0};
  const Costs clean = {5, 0, 0, 1, 0, 4, 3, 2, 0, 0, 1, 0};  // the smallest finite one is 0
  EXPECT_EQ(balanced({6, 2}, scores), balanced({6, 2}, clean));
  EXPECT_EQ(balanced({4, 2}, Costs(8, kNan)), balanced({4, 2}, Costs(8, 0.0)));
  const Costs negative = {-5, kNan, -6, -8, -7, kInfinity};
  EXPECT_EQ(balanced({3, 2}, negative), balanced({3, 2}, Costs{-5, -8, -6, -8, -7, -8}));
}

TEST(Assignment, SameBits) {
  const AssignmentShape shape{64, 8};
  const auto narrow = normal_values<float>(64 * 8, 4);
  const Columns first = balanced(shape, narrow);
  EXPECT_EQ(balanced(shape, narrow), first);
  EXPECT_EQ(balanced(shape, to_doubles(narrow)), first);
  // Equal scores: rows in order.
  EXPECT_EQ(balanced({4, 2}, Costs(8, 1.0)), (Columns{0, 0, 1, 1}));
}

TEST(Assignment, WrongArguments) {
  const Costs cost(4, 1.0);
  Columns columns(2);
  const auto text = [&](const std::function<void()>& call) { return config_error(call); };
  EXPECT_EQ(text([&] {
              assign({-1, 2}, cost.data(), nullptr, columns.data());
            }),
            "[assign] num_rows=-1 is negative; choose 0 or more");
  EXPECT_EQ(text([&] {
              assign({1, -1}, cost.data(), nullptr, columns.data());
            }),
            "[assign] num_columns=-1 is outside [0, 2147483647]");
  EXPECT_EQ(text([&] {
              assign({2, 2}, nullptr, nullptr, columns.data());
            }),
            "[assign] cost=null but 4 elements are needed; pass a buffer");
  EXPECT_EQ(text([&] {
              assign({2, 2}, cost.data(), nullptr, nullptr);
            }),
            "[assign] column_of_row=null but 2 elements are needed; pass a buffer");
  EXPECT_EQ(text([&] {
              assigned({2, 1}, cost);
            }),
            "[assign] capacity=1 in all is below num_rows=2; give the columns more room");
  EXPECT_EQ(text([&] {
              assigned({2, 2}, cost, {3, -1});
            }),
            "[assign] capacity=-1 is negative; choose 0 or more");
  EXPECT_EQ(text([&] {
              assigned({2, 2}, {1, 1, kNan, 1});
            }),
            "[assign] cost[1, 0]=nan is neither finite nor +infinity");
  EXPECT_EQ(text([&] {
              assigned({2, 2}, {1, -kInfinity, 1, 1});
            }),
            "[assign] cost[0, 1]=-inf is neither finite nor +infinity");
  EXPECT_EQ(text([&] { balanced({2, 0}, cost); }), "[assign_balanced] num_columns=0 is below 1");
  EXPECT_EQ(text([&] {
              assign_balanced({2, 2}, DType::kInt32, cost.data(), columns.data());
            }),
            "[assign_balanced] dtype=int32 is not supported; choose fp32 or fp64");
}

}  // namespace
}  // namespace perseid::kernels::testing
