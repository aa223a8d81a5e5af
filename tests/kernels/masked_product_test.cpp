// masked_product against its reference, and by hand; unwanted elements are exactly 0, NaN or not.
#include "kernels/masked_product.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class MaskedProductTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(MaskedProductTyped, Types);

TYPED_TEST(MaskedProductTyped, EqualsReference) {
  using T = TypeParam;
  struct Shape {
    int64_t M, N, D;
  };
  for (const Shape& s : std::vector<Shape>{{1, 1, 1},
                                           {3, 21, 5},
                                           {64, 64, 40},
                                           {33, 1000, 17},
                                           {5, 7, 0},
                                           {0, 3, 2},
                                           {700, 90, 8}}) {
    const auto a = normal_values<T>(s.M * s.D, 1), b = normal_values<T>(s.N * s.D, 2);
    for (const uint32_t divisor : {1u, 2u, 30u}) {
      std::mt19937_64 random(divisor);
      std::vector<uint64_t> bits(static_cast<size_t>((s.M * s.N + 63) / 64), 0);
      for (int64_t i = 0; i < s.M * s.N; ++i) {
        if (random() % divisor == 0) bits[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
      }
      auto expected = nans<T>(s.M * s.N), actual = expected;
      masked_product_reference(a.data(), b.data(), bits.data(), s.M, s.N, s.D, DTypeOf<T>::value,
                               expected.data());
      std::vector<T> first;
      for (const int threads_used : kThreadCounts) {
        const Threads threads(threads_used);
        actual = nans<T>(s.M * s.N);
        masked_product(a.data(), b.data(), bits.data(), s.M, s.N, s.D, DTypeOf<T>::value,
                       actual.data());
        expect_close(actual, expected, tolerance<T>() * 10, "product");
        if (first.empty()) first = actual;
        ASSERT_TRUE(same_bits(actual, first));
        for (size_t i = 0; i < actual.size(); ++i) {
          if ((bits[i / 64] >> (i % 64) & 1) == 0) {
            ASSERT_EQ(actual[i], 0);
          }
        }
      }
    }
  }
}

TEST(MaskedProduct, Example) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> a = {1, 2, nan, 4}, b = {5, 6, 7, 8, 9, 10};
  std::vector<float> out(6, nan);
  const uint64_t wanted = 0b000101;
  masked_product(a.data(), b.data(), &wanted, 2, 3, 2, DType::kFloat32, out.data());
  EXPECT_EQ(out, (std::vector<float>{17, 0, 29, 0, 0, 0}));
  EXPECT_EQ(config_error([&] {
              masked_product(a.data(), b.data(), nullptr, 2, 3, 2, DType::kFloat32, out.data());
            }),
            "[masked_product] is_wanted=null but 6 elements are needed; pass a buffer");
}

}  // namespace
}  // namespace perseid::kernels::testing
