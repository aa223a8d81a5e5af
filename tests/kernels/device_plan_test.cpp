// Integers of a plan and sums by expert on a device against the twins, bit for bit; integer outputs
// held -9 and sums NaN before.
//   Integers     0, 1 and more numbers than a block has threads; empty rows
//   SumByExpert  experts of no row, of one, around 32 and of many; all dtypes; odd widths, NaN
#include "kernels/plan.h"

#include <numeric>

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

class DevicePlan : public DeviceTest {};

TEST_F(DevicePlan, InvertOrder) {
  for (const int64_t count : {0, 1, 127, 300}) {
    std::vector<int32_t> order(static_cast<size_t>(count)), expected(order.size(), -9);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(3));
    DeviceArray<int32_t> on_device(order, stream()), place_of(expected, stream());
    invert_order(on_device.data(), count, place_of.data(), stream());
    invert_order(order.data(), count, expected.data());
    EXPECT_EQ(place_of.read(), expected);
  }
}

TEST_F(DevicePlan, RowOfSorted) {
  for (const int64_t num_rows : {1, 2, 90}) {
    std::vector<int32_t> offsets = {0};
    for (int64_t n = 0; n < num_rows; ++n) {
      offsets.push_back(offsets.back() + static_cast<int32_t>((n + 1) * 3 % 8));
    }
    std::vector<int32_t> order(static_cast<size_t>(offsets.back()));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(3));
    for (const int64_t fixed : {0, 1, 4}) {
      std::vector<int32_t> expected(order.size(), -9);
      DeviceArray<int32_t> on_device(order, stream()), d_offsets(offsets, stream());
      DeviceArray<int32_t> row_of(expected, stream());
      const auto count = static_cast<int64_t>(order.size());
      row_of_sorted(on_device.data(), count, fixed > 0 ? nullptr : d_offsets.data(), num_rows,
                    fixed, row_of.data(), stream());
      row_of_sorted(order.data(), count, fixed > 0 ? nullptr : offsets.data(), num_rows, fixed,
                    expected.data());
      EXPECT_EQ(row_of.read(), expected);
    }
  }
}

TEST_F(DevicePlan, ExpertEnds) {
  for (const int64_t count : {0, 1, 130}) {
    std::vector<int64_t> offsets(static_cast<size_t>(count + 1));
    for (size_t l = 0; l < offsets.size(); ++l) offsets[l] = static_cast<int64_t>(l / 3 * 5);
    std::vector<int32_t> expected(static_cast<size_t>(count), -9);
    DeviceArray<int64_t> on_device(offsets, stream());
    DeviceArray<int32_t> ends(expected, stream());
    expert_ends(on_device.data(), count, ends.data(), stream());
    expert_ends(offsets.data(), count, expected.data());
    EXPECT_EQ(ends.read(), expected);
  }
}

template <typename T>
class DeviceSumByExpert : public DeviceTest {};
using Types = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(DeviceSumByExpert, Types);

TYPED_TEST(DeviceSumByExpert, EqualsTwin) {
  using T = TypeParam;
  const std::vector<std::vector<int64_t>> counts = {
      {0}, {1}, {32}, {33}, {0, 31, 0, 0, 65, 1, 200, 0}, {5, 7, 9, 11, 64, 64, 3}, {0, 0, 0}};
  for (const auto& rows_of : counts) {
    std::vector<int64_t> offsets = {0};
    for (const int64_t count : rows_of) offsets.push_back(offsets.back() + count);
    const auto num_experts = static_cast<int64_t>(rows_of.size());
    const int64_t num_rows = offsets.back() + 3;  // the last rows belong to nobody
    for (const int64_t width : {0, 1, 24, 131, 1040}) {
      std::vector<T> rows = normal_values<T>(num_rows * width, 3);
      for (int64_t i = offsets.back() * width; i < num_rows * width; ++i) {
        rows[i] = make<T>(std::nan(""));
      }
      if (offsets.back() > 4 && width > 0) rows[4 * width] = make<T>(std::nan(""));
      std::vector<T> expected = nans<T>(num_experts * width);
      DeviceArray<T> d_rows(rows, this->stream()), out(expected, this->stream());
      DeviceArray<int64_t> d_offsets(offsets, this->stream());
      sum_by_expert(d_rows.data(), num_rows, width, d_offsets.data(), num_experts, out.data(),
                    DTypeOf<T>::value, this->stream());
      sum_by_expert(rows.data(), num_rows, width, offsets.data(), num_experts, expected.data(),
                    DTypeOf<T>::value);
      // Bits of numbers; which NaN it is may differ.
      const auto actual = to_doubles(out.read()), wanted = to_doubles(expected);
      for (size_t i = 0; i < wanted.size(); ++i) {
        if (std::isnan(wanted[i]) && std::isnan(actual[i])) continue;
        ASSERT_EQ(actual[i], wanted[i]) << num_rows << " rows, width " << width << ", " << i;
      }
    }
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
