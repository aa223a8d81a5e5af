// The gradient at some elements against the reference; by hand; it adds to what is there; any
// thread count, all types.
#include "kernels/sampled_product.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class SampledProductTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(SampledProductTyped, Types);

TYPED_TEST(SampledProductTyped, EqualsReference) {
  using T = TypeParam;
  using Sum = Accumulate<T>;
  constexpr DType kType = DTypeOf<T>::value;
  struct Shape {
    int64_t M, N, D;
  };
  for (const Shape& s : std::vector<Shape>{{1, 1, 1},
                                           {3, 21, 5},
                                           {64, 64, 40},
                                           {33, 1000, 17},
                                           {5, 7, 0},
                                           {0, 3, 2},
                                           {3, 0, 2},
                                           {700, 90, 80}}) {
    const auto x = normal_values<T>(s.N * s.D, 2), delta = normal_values<T>(s.M * s.D, 1);
    for (const uint32_t divisor : {1u, 2u, 30u, 100000u}) {
      std::mt19937_64 random(divisor);
      std::vector<uint64_t> bits(static_cast<size_t>((s.M * s.N + 63) / 64), 0);
      int64_t count = 0;
      for (int64_t i = 0; i < s.M * s.N; ++i) {
        if (random() % divisor != 0) continue;
        bits[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
        ++count;
      }
      const auto start = normal_values<Sum>(count, 3);
      auto expected = start;
      sampled_product_reference(delta.data(), x.data(), bits.data(), s.M, s.N, s.D, kType,
                                expected.data());
      std::vector<Sum> first;
      for (const int threads_used : kThreadCounts) {
        const Threads threads(threads_used);
        auto values = start;
        sampled_product(delta.data(), x.data(), bits.data(), s.M, s.N, s.D, kType, values.data());
        expect_close(values, expected, tolerance<Sum>() * 10, "sampled product");
        if (first.empty()) first = values;
        ASSERT_TRUE(same_bits(values, first));
      }
    }
  }
}

TEST(SampledProduct, Example) {
  // Elements (0, 0), (0, 2), (1, 1) of [2, 3].
  const uint64_t sampled = 0b010101;
  const std::vector<float> x = {1, 2, 30, 40, 5, 6}, delta = {1, 10, 100, 1000};
  std::vector<float> values = {0, 0, 0.5f};
  sampled_product(delta.data(), x.data(), &sampled, 2, 3, 2, DType::kFloat32, values.data());
  EXPECT_EQ(values, (std::vector<float>{21, 65, 43000.5f}));
  sampled_product(delta.data(), x.data(), &sampled, 2, 3, 2, DType::kFloat32, values.data());
  EXPECT_EQ(values, (std::vector<float>{42, 130, 86000.5f}));
  EXPECT_EQ(config_error([&] {
              sampled_product(delta.data(), x.data(), nullptr, 2, 3, 2, DType::kFloat32,
                              values.data());
            }),
            "[sampled_product] is_sampled=null but 6 elements are needed; pass a buffer");
  EXPECT_EQ(config_error([&] {
              sampled_product(delta.data(), x.data(), &sampled, 2, 3, 2, DType::kFloat32, nullptr);
            }),
            "[sampled_product] values=null but 3 elements are needed; pass a buffer");
  EXPECT_EQ(config_error([&] {
              sampled_product(delta.data(), x.data(), &sampled, 2, -3, 2, DType::kFloat32,
                              values.data());
            }),
            "[sampled_product] N=-3 is negative; choose 0 or more");
}

}  // namespace
}  // namespace perseid::kernels::testing
