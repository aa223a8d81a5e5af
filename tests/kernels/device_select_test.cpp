// select_k on a device against the twin, byte for byte; is_kept held 9 before.
//   EqualsTwin  0, 1 and odd counts around a tile and past the largest grid; k of 0, 1, all and
//   more;
//               distinct values, heavy ties, all equal; NaN, infinities and -0
#include "kernels/select.h"

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class DeviceSelect : public DeviceTest {
 protected:
  void compare(const std::vector<T>& values, int64_t k) {
    const auto count = static_cast<int64_t>(values.size());
    std::vector<uint8_t> expected(values.size(), 9);
    DeviceArray<T> on_device(values, this->stream());
    DeviceArray<uint8_t> is_kept(expected, this->stream());
    select_k(on_device.data(), count, k, DTypeOf<T>::value, is_kept.data(), this->stream());
    select_k(values.data(), count, k, DTypeOf<T>::value, expected.data());
    ASSERT_EQ(is_kept.read(), expected) << k << " of " << count;
  }
};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(DeviceSelect, Types);

TYPED_TEST(DeviceSelect, EqualsTwin) {
  using T = TypeParam;
  for (const int64_t count : {0, 1, 2, 1023, 1024, 2500}) {
    std::vector<T> values = normal_values<T>(count, 3);
    for (const int64_t k : {int64_t{0}, int64_t{1}, count / 3, count - 1, count, count + 5}) {
      if (k >= 0) this->compare(values, k);
    }
    for (size_t i = 0; i < values.size(); ++i) values[i] = T(int(i * 7 % 5)) - 2;
    for (const int64_t k : {int64_t{1}, count / 2, count - 1}) {
      if (k >= 0) this->compare(values, k);
    }
    this->compare(std::vector<T>(values.size(), T(1)), count / 2);
  }
}

TYPED_TEST(DeviceSelect, SpecialValues) {
  using T = TypeParam;
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const std::vector<T> values = {nan, -inf, T(0), -T(0), inf, -nan, T(-1), T(0), -T(0), inf};
  for (int64_t k = 0; k <= 10; ++k) this->compare(values, k);
}

TEST(DeviceSelectLarge, SeveralTilesOfABlock) {
  if (device_count() == 0) GTEST_SKIP() << "needs a GPU: " << device_problem();
  const OwnedStream stream;
  const int64_t count = int64_t{1024} * 1024 + 3;
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 7919 % 1000);
  std::vector<uint8_t> expected(values.size(), 9);
  DeviceArray<float> on_device(values, stream.get());
  DeviceArray<uint8_t> is_kept(expected, stream.get());
  select_k(on_device.data(), count, 400321, DType::kFloat32, is_kept.data(), stream.get());
  select_k(values.data(), count, 400321, DType::kFloat32, expected.data());
  EXPECT_TRUE(same_bits(is_kept.read(), expected));
}

}  // namespace
}  // namespace perseid::kernels::testing
