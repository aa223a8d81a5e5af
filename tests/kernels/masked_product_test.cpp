// The three products of a masked weight against their references; by hand; inactive elements are
// NaN and have no influence, their gradient is exactly 0; any thread count.
#include "kernels/masked_product.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class MaskedProductTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(MaskedProductTyped, Types);

bool is_set(const std::vector<uint64_t>& bits, int64_t i) {
  return (bits[static_cast<size_t>(i / 64)] >> (i % 64) & 1) != 0;
}

TYPED_TEST(MaskedProductTyped, EqualsReference) {
  using T = TypeParam;
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
                                           {700, 90, 8}}) {
    const auto x = normal_values<T>(s.N * s.D, 2), delta = normal_values<T>(s.M * s.D, 1);
    for (const uint32_t divisor : {1u, 2u, 30u}) {
      std::mt19937_64 random(divisor);
      std::vector<uint64_t> bits(static_cast<size_t>((s.M * s.N + 63) / 64), 0);
      auto weight = normal_values<T>(s.M * s.N, 3);
      for (int64_t i = 0; i < s.M * s.N; ++i) {
        if (random() % divisor == 0) {
          bits[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
        } else {
          weight[static_cast<size_t>(i)] = std::numeric_limits<T>::quiet_NaN();
        }
      }
      auto out = nans<T>(s.M * s.D), grad_x = nans<T>(s.N * s.D), grad = nans<T>(s.M * s.N);
      masked_product_reference(weight.data(), bits.data(), x.data(), s.M, s.N, s.D, kType,
                               out.data());
      masked_transposed_product_reference(weight.data(), bits.data(), delta.data(), s.M, s.N, s.D,
                                          kType, grad_x.data());
      masked_outer_product_reference(delta.data(), x.data(), bits.data(), s.M, s.N, s.D, kType,
                                     grad.data());
      std::vector<T> first;
      for (const int threads_used : kThreadCounts) {
        const Threads threads(threads_used);
        auto my_out = nans<T>(s.M * s.D), my_grad_x = nans<T>(s.N * s.D);
        auto my_grad = nans<T>(s.M * s.N);
        masked_product(weight.data(), bits.data(), x.data(), s.M, s.N, s.D, kType, my_out.data());
        masked_transposed_product(weight.data(), bits.data(), delta.data(), s.M, s.N, s.D, kType,
                                  my_grad_x.data());
        masked_outer_product(delta.data(), x.data(), bits.data(), s.M, s.N, s.D, kType,
                             my_grad.data());
        expect_close(my_out, out, tolerance<T>() * 10, "product");
        expect_close(my_grad_x, grad_x, tolerance<T>() * 10, "transposed product");
        expect_close(my_grad, grad, tolerance<T>() * 10, "outer product");
        for (int64_t i = 0; i < s.M * s.N; ++i) {
          if (!is_set(bits, i)) {
            ASSERT_EQ(my_grad[static_cast<size_t>(i)], 0);
          }
        }
        std::vector<T> all = my_out;
        all.insert(all.end(), my_grad_x.begin(), my_grad_x.end());
        all.insert(all.end(), my_grad.begin(), my_grad.end());
        if (first.empty()) first = all;
        ASSERT_TRUE(same_bits(all, first));
      }
    }
  }
}

TEST(MaskedProduct, Example) {
  // [1 . 2; . . 3]
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> weight = {1, nan, 2, nan, nan, 3};
  const uint64_t active = 0b100101;
  const std::vector<float> x = {1, 2, 30, 40, 5, 6}, delta = {1, 10, 100, 1000};
  std::vector<float> out(4, nan), grad_x(6, nan), grad_weight(6, nan);
  masked_product(weight.data(), &active, x.data(), 2, 3, 2, DType::kFloat32, out.data());
  EXPECT_EQ(out, (std::vector<float>{11, 14, 15, 18}));
  masked_transposed_product(weight.data(), &active, delta.data(), 2, 3, 2, DType::kFloat32,
                            grad_x.data());
  EXPECT_EQ(grad_x, (std::vector<float>{1, 10, 0, 0, 302, 3020}));
  masked_outer_product(delta.data(), x.data(), &active, 2, 3, 2, DType::kFloat32,
                       grad_weight.data());
  EXPECT_EQ(grad_weight, (std::vector<float>{21, 0, 65, 0, 0, 6500}));
  EXPECT_EQ(config_error([&] {
              masked_product(weight.data(), nullptr, x.data(), 2, 3, 2, DType::kFloat32,
                             out.data());
            }),
            "[masked_product] is_active=null but 6 elements are needed; pass a buffer");
  EXPECT_EQ(config_error([&] {
              masked_product(weight.data(), &active, x.data(), 2, 3, -2, DType::kFloat32,
                             out.data());
            }),
            "[masked_product] D=-2 is negative; choose 0 or more");
}

}  // namespace
}  // namespace perseid::kernels::testing
