// Integers of a plan by hand, and sums of rows by expert.
//   SumByExpert  exact small integers; the reference in float64; idle experts; threads
#include "kernels/plan.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

TEST(Plan, InvertOrder) {
  const std::vector<int32_t> order = {3, 0, 4, 1, 2};
  std::vector<int32_t> place_of(5, -9);
  invert_order(order.data(), 5, place_of.data());
  EXPECT_EQ(place_of, (std::vector<int32_t>{1, 3, 4, 0, 2}));
  invert_order(nullptr, 0, nullptr);
}

TEST(Plan, RowOfSorted) {
  // Rows 0, 2 and 4 are empty.
  const std::vector<int32_t> offsets = {0, 0, 2, 2, 5, 5}, order = {4, 0, 2, 1, 3};
  std::vector<int32_t> row_of(5, -9);
  row_of_sorted(order.data(), 5, offsets.data(), 5, 0, row_of.data());
  EXPECT_EQ(row_of, (std::vector<int32_t>{3, 1, 3, 1, 3}));
  row_of = order;
  row_of_sorted(row_of.data(), 5, nullptr, 3, 2, row_of.data());  // in place
  EXPECT_EQ(row_of, (std::vector<int32_t>{2, 0, 1, 0, 1}));
}

TEST(Plan, ExpertEnds) {
  const std::vector<int64_t> offsets = {0, 0, 7, 9};
  std::vector<int32_t> ends(3, -9);
  expert_ends(offsets.data(), 3, ends.data());
  EXPECT_EQ(ends, (std::vector<int32_t>{0, 7, 9}));
}

template <typename T>
class SumByExpert : public ::testing::Test {};
using Types = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(SumByExpert, Types);

TYPED_TEST(SumByExpert, EqualsReference) {
  using T = TypeParam;
  const std::vector<int64_t> offsets = {0, 0, 1, 34, 34, 130};
  for (const int64_t width : {1, 17, 600}) {
    const auto rows = normal_values<T>(130 * width, 5);
    std::vector<T> sums = nans<T>(5 * width), expected = nans<T>(5 * width);
    sum_by_expert(rows.data(), 130, width, offsets.data(), 5, sums.data(), DTypeOf<T>::value);
    sum_by_expert_reference(rows.data(), width, offsets.data(), 5, expected.data(),
                            DTypeOf<T>::value);
    expect_close(sums, expected, 10 * tolerance<T>(), "width " + to_text(width));
    for (const int count : kThreadCounts) {
      const Threads threads(count);
      std::vector<T> again = nans<T>(5 * width);
      sum_by_expert(rows.data(), 130, width, offsets.data(), 5, again.data(), DTypeOf<T>::value);
      EXPECT_TRUE(same_bits(again, sums));
    }
  }
}

TYPED_TEST(SumByExpert, IsExactForIntegers) {
  // Row r holds r + 1: experts of rows 0..2 and 3..4, and one without rows.
  using T = TypeParam;
  std::vector<T> rows, sums = nans<T>(3);
  for (int r = 0; r < 5; ++r) rows.push_back(make<T>(r + 1));
  const std::vector<int64_t> offsets = {0, 3, 3, 5};
  sum_by_expert(rows.data(), 5, 1, offsets.data(), 3, sums.data(), DTypeOf<T>::value);
  EXPECT_EQ(to_doubles(sums), (std::vector<double>{6, 0, 9}));
}

TEST(Plan, WrongArguments) {
  EXPECT_EQ(config_error([] { invert_order(nullptr, -1, nullptr); }),
            "[invert_order] num_rows=-1 is negative; choose 0 or more");
  EXPECT_EQ(config_error([] { expert_ends(nullptr, int64_t{1} << 31, nullptr); }),
            "[expert_ends] num_experts=2147483648 exceeds 2147483647");
  int32_t one = 0;
  EXPECT_EQ(config_error([&] { row_of_sorted(&one, 1, nullptr, 1, 0, &one); }),
            "[row_of_sorted] fixed=0 is outside [1, 2147483647], and row_offsets=null; pass one of "
            "them");
}

}  // namespace
}  // namespace perseid::kernels::testing
