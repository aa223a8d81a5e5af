// gemm_bf16 against sums in double.
//   EqualsReference  all four layouts, gathered or not, sizes around tiles, panels, pairs and
//   blocks ExactSums        small integers: no rounding, every element exact RowsDoNotDependOnM  a
//   row alone has the same bits as among others: strict mode needs it Guards           elements
//   beside c are left alone, and nothing past the operands is read
#include "kernels/gemm_bf16.h"

#include <cstdlib>
#include <memory>

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

struct Shape {
  int64_t m, n, k;
};

/// A matrix [rows, columns] in memory, its rows spread over a larger buffer if they are gathered.
struct Matrix {
  std::vector<BFloat16> values;
  std::vector<int32_t> row_of;
  GemmOperand operand;
};

Matrix make_matrix(int64_t rows, int64_t columns, bool transposed, bool gathered, uint32_t seed,
                   bool integers = false) {
  Matrix matrix;
  if (transposed) std::swap(rows, columns);
  const int64_t stored = gathered ? rows + 5 : rows;
  matrix.values = normal_values<BFloat16>(stored * columns, seed);
  if (integers) {
    for (size_t i = 0; i < matrix.values.size(); ++i) {
      matrix.values[i] = make<BFloat16>(static_cast<double>(i * 7 % 5) - 2);
    }
  }
  for (int64_t i = 0; gathered && i < rows; ++i) {
    matrix.row_of.push_back(static_cast<int32_t>((i * 3 + 1) % stored));
  }
  matrix.operand = {matrix.values.data(), columns, transposed,
                    gathered ? matrix.row_of.data() : nullptr};
  return matrix;
}

std::vector<BFloat16> product(const Shape& s, const GemmOperand& a, const GemmOperand& b) {
  const int64_t size = gemm_bf16_workspace(s.m, s.n, s.k, a.transposed);
  // Exactly the size that was asked for, so that a sanitizer sees a step past it.
  const size_t bytes = static_cast<size_t>((2 * size + 63) / 64 * 64);
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, bytes),
                                                              &std::free);
  std::memset(workspace.get(), 0xFF, bytes);  // NaN
  std::vector<BFloat16> c = nans<BFloat16>(s.m * s.n);
  gemm_bf16(s.m, s.n, s.k, a, b, c.data(), s.n, static_cast<BFloat16*>(workspace.get()));
  return c;
}

std::vector<BFloat16> reference(const Shape& s, const GemmOperand& a, const GemmOperand& b) {
  std::vector<BFloat16> c = nans<BFloat16>(s.m * s.n);
  gemm_bf16_reference(s.m, s.n, s.k, a, b, c.data(), s.n);
  return c;
}

const std::vector<Shape> kShapes = {{1, 1, 1},    {6, 64, 2},   {7, 65, 3},     {5, 15, 31},
                                    {13, 70, 33}, {12, 16, 64}, {3, 130, 5},    {193, 63, 17},
                                    {2, 3, 2051}, {9, 64, 0},   {385, 17, 2050}};

#define SKIP_WITHOUT_BF16() \
  if (!has_gemm_bf16()) GTEST_SKIP() << "this CPU has no AVX512-BF16, or has AMX"

TEST(GemmBf16, EqualsReference) {
  SKIP_WITHOUT_BF16();
  for (const Shape& s : kShapes) {
    for (int layout = 0; layout < 16; ++layout) {
      const bool a_transposed = layout & 1, b_transposed = layout & 2;
      const Matrix a = make_matrix(s.m, s.k, a_transposed, layout & 4, 1);
      const Matrix b = make_matrix(s.k, s.n, b_transposed, layout & 8, 2);
      expect_close(product(s, a.operand, b.operand), reference(s, a.operand, b.operand), 0x1p-7,
                   std::to_string(s.m) + "x" + std::to_string(s.n) + "x" + std::to_string(s.k) +
                       " layout " + std::to_string(layout));
    }
  }
}

TEST(GemmBf16, ExactSums) {
  SKIP_WITHOUT_BF16();
  for (const Shape& s : {Shape{7, 65, 31}, Shape{50, 33, 20}}) {
    for (int layout = 0; layout < 4; ++layout) {
      const Matrix a = make_matrix(s.m, s.k, layout & 1, false, 1, true);
      const Matrix b = make_matrix(s.k, s.n, layout & 2, false, 2, true);
      EXPECT_TRUE(same_bits(product(s, a.operand, b.operand), reference(s, a.operand, b.operand)));
    }
  }
}

TEST(GemmBf16, RowsDoNotDependOnM) {
  SKIP_WITHOUT_BF16();
  const Shape all{200, 37, 2053};
  const Matrix a = make_matrix(all.m, all.k, false, false, 3);
  const Matrix b = make_matrix(all.k, all.n, true, false, 4);
  const std::vector<BFloat16> whole = product(all, a.operand, b.operand);
  for (const int64_t row : {0, 5, 6, 191, 192, 199}) {
    GemmOperand one = a.operand;
    one.data += row * all.k;
    const std::vector<BFloat16> alone = product({1, all.n, all.k}, one, b.operand);
    EXPECT_TRUE(same_bits(alone, {whole.begin() + row * all.n, whole.begin() + (row + 1) * all.n}));
  }
}

TEST(GemmBf16, Guards) {
  SKIP_WITHOUT_BF16();
  const Shape s{8, 19, 21};
  const int64_t stride = 40;
  const Matrix a = make_matrix(s.m, s.k, true, false, 5),
               b = make_matrix(s.k, s.n, false, false, 6);
  std::vector<BFloat16> c(static_cast<size_t>(s.m * stride), make<BFloat16>(3));
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(64, 1 << 20),
                                                              &std::free);
  gemm_bf16(s.m, s.n, s.k, a.operand, b.operand, c.data(), stride,
            static_cast<BFloat16*>(workspace.get()));
  const std::vector<BFloat16> expected = reference(s, a.operand, b.operand);
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < stride; ++j) {
      const float got = to_float(c[static_cast<size_t>(i * stride + j)]);
      if (j >= s.n) {
        EXPECT_EQ(got, 3.0f) << i << ", " << j;
      } else {
        EXPECT_NEAR(got, to_float(expected[static_cast<size_t>(i * s.n + j)]), 0.05);
      }
    }
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
