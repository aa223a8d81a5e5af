// The three products of a weight in rows of active elements against their references, with columns
// of 32 and of 16 bits; rows without elements, none at all, no batch; the same bits for any thread
// count; each is the transpose of the other.
#include "kernels/csr_product.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class CsrProductTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(CsrProductTyped, Types);

template <typename T>
struct Weight {
  Weight(int64_t rows, int64_t cols, uint32_t divisor) : M(rows), N(cols) {
    std::mt19937_64 random(divisor);
    offsets.push_back(0);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t n = 0; n < cols; ++n) {
        if (m % 5 == 3 || random() % divisor != 0) continue;  // every fifth row has none
        columns.push_back(static_cast<int32_t>(n));
        short_columns.push_back(static_cast<uint16_t>(n));
      }
      offsets.push_back(static_cast<int32_t>(columns.size()));
    }
    values = normal_values<T>(static_cast<int64_t>(columns.size()), 3);
  }
  CsrWeight csr(bool is_short) const {
    return {M,
            N,
            offsets.data(),
            is_short ? nullptr : columns.data(),
            is_short ? short_columns.data() : nullptr,
            values.data()};
  }
  int64_t M, N;
  std::vector<int32_t> offsets, columns;
  std::vector<uint16_t> short_columns;
  std::vector<T> values;
};

TYPED_TEST(CsrProductTyped, EqualsReference) {
  using T = TypeParam;
  constexpr DType kType = DTypeOf<T>::value;
  struct Shape {
    int64_t M, N, D;
  };
  for (const Shape& s : std::vector<Shape>{{1, 1, 1},
                                           {3, 21, 5},
                                           {64, 64, 40},
                                           {33, 100, 127},
                                           {20, 700, 6},
                                           {5, 7, 0},
                                           {0, 3, 2},
                                           {3, 0, 2},
                                           {100, 90, 24}}) {
    const auto x = normal_values<T>(s.N * s.D, 2), delta = normal_values<T>(s.M * s.D, 1);
    for (const uint32_t divisor : {1u, 3u, 1000u}) {
      const Weight<T> weight(s.M, s.N, divisor);
      const auto nnz = static_cast<int64_t>(weight.values.size());
      auto out = nans<T>(s.M * s.D), grad_x = nans<T>(s.N * s.D), grad = nans<T>(nnz);
      csr_product_reference(weight.csr(false), x.data(), s.D, kType, out.data());
      csr_transposed_product_reference(weight.csr(true), delta.data(), s.D, kType, grad_x.data());
      csr_outer_product_reference(weight.csr(false), delta.data(), x.data(), s.D, kType,
                                  grad.data());
      std::vector<T> first, first_grad_x;
      for (const int count : {1, 3}) {
        for (const bool is_short : {false, true}) {
          const Threads threads(count);
          const CsrWeight csr = weight.csr(is_short);
          auto my_out = nans<T>(s.M * s.D), my_grad_x = nans<T>(s.N * s.D), my_grad = nans<T>(nnz);
          csr_product(csr, x.data(), s.D, kType, my_out.data());
          csr_transposed_product(csr, delta.data(), s.D, kType, my_grad_x.data());
          csr_outer_product(csr, delta.data(), x.data(), s.D, kType, my_grad.data());
          expect_close(my_out, out, 10 * tolerance<T>(), "out");
          expect_close(my_grad_x, grad_x, 10 * tolerance<T>(), "grad_x");
          expect_close(my_grad, grad, 10 * tolerance<T>(), "grad_values");
          if (first.empty()) first = my_out;
          if (first_grad_x.empty()) first_grad_x = my_grad_x;
          EXPECT_TRUE(same_bits(my_out, first));
          EXPECT_TRUE(same_bits(my_grad_x, first_grad_x));
        }
      }
      // <W x, delta> = <x, W^T delta> = <grad, values>
      const double forward = dot(to_doubles(out), to_doubles(delta));
      const double scale = 1 + std::abs(forward);
      EXPECT_NEAR(dot(to_doubles(grad_x), to_doubles(x)), forward, 1e-3 * scale);
      EXPECT_NEAR(dot(to_doubles(grad), to_doubles(weight.values)), forward, 1e-3 * scale);
    }
  }
}

TEST(CsrProduct, ByHand) {
  // [[0 2 0] [0 0 0] [3 0 5]]
  const int32_t offsets[] = {0, 1, 1, 3};
  const uint16_t columns[] = {1, 0, 2};
  const double values[] = {2, 3, 5}, x[] = {1, 10, 100}, delta[] = {7, 11, 13};
  const CsrWeight weight{3, 3, offsets, nullptr, columns, values};
  double out[3], grad_x[3], grad[3];
  csr_product(weight, x, 1, DType::kFloat64, out);
  csr_transposed_product(weight, delta, 1, DType::kFloat64, grad_x);
  csr_outer_product(weight, delta, x, 1, DType::kFloat64, grad);
  EXPECT_EQ(std::vector<double>(out, out + 3), (std::vector<double>{20, 0, 503}));
  EXPECT_EQ(std::vector<double>(grad_x, grad_x + 3), (std::vector<double>{39, 14, 65}));
  EXPECT_EQ(std::vector<double>(grad, grad + 3), (std::vector<double>{70, 13, 1300}));
}

TEST(CsrProduct, Refused) {
  const int32_t offsets[] = {0, 1};
  const uint16_t column = 0;
  const float value = 1;
  CsrWeight weight{1, 70'000, offsets, nullptr, &column, &value};
  std::vector<float> x(70'000), out(1);
  EXPECT_EQ(config_error([&] { csr_product(weight, x.data(), 1, DType::kFloat32, out.data()); }),
            "[csr_product] N=70000 exceeds 65536, which columns of 16 bits reach; pass 32-bit "
            "columns");
  weight.short_columns = nullptr;
  EXPECT_EQ(config_error([&] { csr_product(weight, x.data(), 1, DType::kFloat32, out.data()); }),
            "[csr_product] columns=null but 1 elements are needed; pass a buffer");
  weight.N = 1;
  weight.short_columns = &column;
  EXPECT_EQ(config_error([&] { csr_product(weight, x.data(), 1, DType::kBFloat16, out.data()); }),
            "[csr_product] dtype=bf16 is not supported; choose fp32 or fp64");
}

}  // namespace
}  // namespace perseid::kernels::testing
