// Values and flags of masks against their references, with full, empty and mixed words, NaN, ragged
// ends, any thread count; what lies behind the last value is not written.
#include "kernels/mask_values.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class MaskValuesTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(MaskValuesTyped, Types);

TYPED_TEST(MaskValuesTyped, EqualsReference) {
  using T = TypeParam;
  for (const int64_t count : {0, 1, 31, 63, 64, 65, 129, 100'003}) {
    std::mt19937_64 random(1);
    std::vector<uint64_t> bits(static_cast<size_t>((count + 63) / 64));
    for (size_t w = 0; w < bits.size(); ++w) {
      bits[w] = w % 5 == 1 ? 0 : w % 5 == 2 ? ~uint64_t{0} : random();
    }
    if (count % 64 != 0) bits.back() &= (uint64_t{1} << (count % 64)) - 1;
    auto expected = normal_values<T>(count + 3, 1);
    for (size_t p = 0; p < expected.size(); p += 7) {
      expected[p] = make<T>(std::numeric_limits<double>::quiet_NaN());
    }
    const std::vector<T> before = expected;
    zero_inactive_reference(bits.data(), count, DTypeOf<T>::value, expected.data());
    std::vector<uint8_t> expected_flags(static_cast<size_t>(count) + 3, 7);
    expand_mask_reference(bits.data(), count, expected_flags.data());
    for (const int threads_used : kThreadCounts) {
      const Threads threads(threads_used);
      std::vector<T> values = before;
      std::vector<uint8_t> flags(expected_flags.size(), 7);
      zero_inactive(bits.data(), count, DTypeOf<T>::value, values.data());
      expand_mask(bits.data(), count, flags.data());
      EXPECT_TRUE(same_bits(values, expected)) << count;
      EXPECT_EQ(flags, expected_flags) << count;
    }
  }
}

TEST(MaskValues, ByHand) {
  const uint64_t bits = 0b101;
  double values[] = {1, 2, 3, 4};
  uint8_t flags[] = {9, 9, 9, 9};
  zero_inactive(&bits, 3, DType::kFloat64, values);
  expand_mask(&bits, 3, flags);
  EXPECT_EQ(std::vector<double>(values, values + 4), (std::vector<double>{1, 0, 3, 4}));
  EXPECT_EQ(std::vector<uint8_t>(flags, flags + 4), (std::vector<uint8_t>{1, 0, 1, 9}));
}

}  // namespace
}  // namespace perseid::kernels::testing
