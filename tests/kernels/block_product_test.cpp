// The three grouped products of block-sparse weights against their references: ragged edges, whose
// padding is NaN in the weight and 0 in its gradient, experts without rows or blocks, block rows
// without blocks; the same bits for any thread count; each is the transpose of the other.
#include "kernels/block_product.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class BlockProductTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(BlockProductTyped, Types);

struct Shape {
  int64_t out, in, block_rows, block_cols;
  std::vector<int64_t> rows;  ///< of each expert
};

template <typename T>
struct Problem {
  Problem(const Shape& s, uint32_t divisor) {
    const int64_t lines = (s.out + s.block_rows - 1) / s.block_rows;
    const int64_t columns = (s.in + s.block_cols - 1) / s.block_cols;
    std::mt19937_64 random(divisor);
    block_offsets.push_back(0);
    row_offsets.push_back(0);
    for (size_t e = 0; e < s.rows.size(); ++e) {
      row_offsets.push_back(row_offsets.back() + s.rows[e]);
      for (int64_t line = 0; line < lines; ++line) {
        for (int64_t column = 0; column < columns; ++column) {
          // Expert 2 has no block, nor has every fourth block row.
          if (e == 2 || line % 4 == 1 || random() % divisor != 0) continue;
          block_columns.push_back(static_cast<int32_t>(column));
          block_lines.push_back(line);
        }
        block_offsets.push_back(static_cast<int32_t>(block_columns.size()));
      }
    }
    const auto num_blocks = static_cast<int64_t>(block_columns.size());
    values = normal_values<T>(num_blocks * s.block_rows * s.block_cols, 3);
    is_real.resize(values.size());
    for (size_t k = 0; k < values.size(); ++k) {
      const auto size = static_cast<size_t>(s.block_rows * s.block_cols);
      const auto inside = static_cast<int64_t>(k % size);
      const int64_t i = block_lines[k / size] * s.block_rows + inside / s.block_cols;
      const int64_t j = block_columns[k / size] * s.block_cols + inside % s.block_cols;
      is_real[k] = i < s.out && j < s.in;
      if (!is_real[k]) values[k] = std::numeric_limits<T>::quiet_NaN();
    }
    weights = {static_cast<int64_t>(s.rows.size()),
               s.out,
               s.in,
               s.block_rows,
               s.block_cols,
               block_offsets.data(),
               block_columns.data(),
               values.data()};
    x = normal_values<T>(row_offsets.back() * s.in, 1);
    delta = normal_values<T>(row_offsets.back() * s.out, 2);
  }
  std::vector<int32_t> block_offsets, block_columns;
  std::vector<int64_t> block_lines, row_offsets;
  std::vector<T> values, x, delta;
  std::vector<bool> is_real;
  BlockWeights weights;
};

TYPED_TEST(BlockProductTyped, EqualsReference) {
  using T = TypeParam;
  constexpr DType kType = DTypeOf<T>::value;
  for (const Shape& s : std::vector<Shape>{{5, 7, 2, 3, {4, 0, 3, 1}},
                                           {70, 90, 16, 32, {7, 200, 5, 0}},
                                           {64, 128, 64, 64, {33}},
                                           {100, 65, 64, 64, {13, 6, 2, 20}},
                                           {33, 40, 1, 1, {9, 12}},
                                           {8, 8, 20, 20, {5}},
                                           {6, 6, 2, 2, {0, 0}}}) {
    for (const uint32_t divisor : {1u, 2u, 1000u}) {
      const Problem<T> p(s, divisor);
      auto y = nans<T>(static_cast<int64_t>(p.delta.size()));
      auto grad_x = nans<T>(static_cast<int64_t>(p.x.size()));
      auto grad = nans<T>(static_cast<int64_t>(p.values.size()));
      block_product_reference(p.weights, p.x.data(), p.row_offsets.data(), kType, y.data());
      block_transposed_product_reference(p.weights, p.delta.data(), p.row_offsets.data(), kType,
                                         grad_x.data());
      block_outer_product_reference(p.weights, p.delta.data(), p.x.data(), p.row_offsets.data(),
                                    kType, grad.data());
      double product = 0;
      for (size_t k = 0; k < grad.size(); ++k) {
        if (p.is_real[k]) {
          product += double{grad[k]} * double{p.values[k]};
        } else {
          ASSERT_EQ(grad[k], T{0});
        }
      }
      const double forward = dot(to_doubles(y), to_doubles(p.delta));
      EXPECT_NEAR(dot(to_doubles(grad_x), to_doubles(p.x)), forward,
                  1e-3 * (1 + std::abs(forward)));
      EXPECT_NEAR(product, forward, 1e-3 * (1 + std::abs(forward)));
      std::vector<std::vector<T>> first;
      for (const int count : {1, 3}) {
        const Threads threads(count);
        auto my_y = nans<T>(static_cast<int64_t>(y.size()));
        auto my_grad_x = nans<T>(static_cast<int64_t>(grad_x.size()));
        auto my_grad = nans<T>(static_cast<int64_t>(grad.size()));
        block_product(p.weights, p.x.data(), p.row_offsets.data(), kType, my_y.data());
        block_transposed_product(p.weights, p.delta.data(), p.row_offsets.data(), kType,
                                 my_grad_x.data());
        block_outer_product(p.weights, p.delta.data(), p.x.data(), p.row_offsets.data(), kType,
                            my_grad.data());
        expect_close(my_y, y, 10 * tolerance<T>(), "y");
        expect_close(my_grad_x, grad_x, 10 * tolerance<T>(), "grad_x");
        expect_close(my_grad, grad, 10 * tolerance<T>(), "grad_values");
        if (first.empty()) first = {my_y, my_grad_x, my_grad};
        EXPECT_TRUE(same_bits(my_y, first[0]) && same_bits(my_grad_x, first[1]) &&
                    same_bits(my_grad, first[2]));
      }
    }
  }
}

TEST(BlockProduct, ByHand) {
  // One expert, W = [[1 2 0] [3 4 0]], the first of two blocks of 2 x 2; rows (1, 10, 100), (2, 0,
  // 7).
  const int32_t block_offsets[] = {0, 1}, block_columns[] = {0};
  const double values[] = {1, 2, 3, 4}, x[] = {1, 10, 100, 2, 0, 7}, delta[] = {1, 2, 3, 5};
  const int64_t row_offsets[] = {0, 2};
  const BlockWeights weights{1, 2, 3, 2, 2, block_offsets, block_columns, values};
  double y[4], grad_x[6], grad[4];
  block_product(weights, x, row_offsets, DType::kFloat64, y);
  block_transposed_product(weights, delta, row_offsets, DType::kFloat64, grad_x);
  block_outer_product(weights, delta, x, row_offsets, DType::kFloat64, grad);
  EXPECT_EQ(std::vector<double>(y, y + 4), (std::vector<double>{21, 43, 2, 6}));
  EXPECT_EQ(std::vector<double>(grad_x, grad_x + 6), (std::vector<double>{7, 10, 0, 18, 26, 0}));
  EXPECT_EQ(std::vector<double>(grad, grad + 4), (std::vector<double>{7, 10, 12, 20}));
}

TEST(BlockProduct, Refused) {
  const int32_t block_offsets[] = {0, 1};
  const int64_t row_offsets[] = {0, 1};
  float value = 0;
  BlockWeights weights{1, 1, 1, 1, 1, block_offsets, nullptr, &value};
  EXPECT_EQ(
      config_error([&] { block_product(weights, &value, row_offsets, DType::kFloat32, &value); }),
      "[block_product] block_columns=null but 1 elements are needed; pass a buffer");
  weights.block_cols = 0;
  EXPECT_EQ(
      config_error([&] { block_product(weights, &value, row_offsets, DType::kFloat32, &value); }),
      "[block_product] block_cols=0 is below 1");
}

}  // namespace
}  // namespace perseid::kernels::testing
