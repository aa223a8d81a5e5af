// combine and combine_backward.
//   ClosedForm     rows of unique small integers, weights powers of two: every sum is exact
//   Reference      fixed and ragged, 1..3 gates, all dtypes, odd widths; outputs were NaN before
//   IsTranspose    <combine(x), y> == <x, grad_rows(y)> == <w, grad_weights(y)> in float64, 1e-12
#include "kernels/combine.h"

#include <numeric>

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

/// Ragged: output n has n % 5 entries, so some have none and some more than four.
std::vector<int32_t> ragged_offsets(int64_t num_out) {
  std::vector<int32_t> offsets = {0};
  for (int64_t n = 0; n < num_out; ++n) {
    offsets.push_back(offsets.back() + static_cast<int32_t>(n * 3 % 7));
  }
  return offsets;
}

template <typename T>
struct Case {
  using A = Accumulate<T>;
  Case(int64_t outputs, int64_t fixed, int64_t gates, int64_t columns)
      : num_out(outputs), num_gates(gates), width(columns) {
    if (fixed < 0) offsets = ragged_offsets(outputs);
    const int64_t num_entries = fixed < 0 ? offsets.back() : outputs * fixed;
    row_of.resize(static_cast<size_t>(num_entries));
    std::iota(row_of.begin(), row_of.end(), 0);
    std::shuffle(row_of.begin(), row_of.end(), std::mt19937(7));
    rows = normal_values<T>(num_entries * width, 1);
    weights = normal_values<A>(num_entries * num_gates, 2);
    grad_out = normal_values<T>(num_out * num_gates * width, 3);
    fixed_entries = std::max<int64_t>(fixed, 0);
  }
  CombineIndex index() const {
    return {offsets.empty() ? nullptr : offsets.data(), fixed_entries, row_of.data()};
  }
  std::vector<T> forward(bool is_reference = false) const {
    std::vector<T> out = nans<T>(num_out * num_gates * width);
    const DType dtype = DTypeOf<T>::value;
    if (is_reference) {
      combine_reference(rows.data(), index(), weights.data(), num_gates, out.data(), num_out, width,
                        dtype);
    } else {
      combine(rows.data(), index(), weights.data(), num_gates, out.data(), num_out, width, dtype);
    }
    return out;
  }
  struct Gradients {
    std::vector<T> rows;
    std::vector<A> weights;
  };
  Gradients backward(bool is_reference = false) const {
    Gradients grad{nans<T>(static_cast<int64_t>(rows.size())),
                   nans<A>(static_cast<int64_t>(weights.size()))};
    const DType dtype = DTypeOf<T>::value;
    if (is_reference) {
      combine_backward_reference(grad_out.data(), rows.data(), index(), weights.data(), num_gates,
                                 grad.rows.data(), grad.weights.data(), num_out, width, dtype);
    } else {
      combine_backward(grad_out.data(), rows.data(), index(), weights.data(), num_gates,
                       grad.rows.data(), grad.weights.data(), num_out, width, dtype);
    }
    return grad;
  }
  std::string name() const {
    return to_text(num_out) + " outputs, " + to_text(num_gates) + " gates, width " + to_text(width);
  }

  int64_t num_out, num_gates, width, fixed_entries = 0;
  std::vector<int32_t> offsets, row_of;
  std::vector<T> rows, grad_out;
  std::vector<A> weights;
};

template <typename T>
class CombineTyped : public ::testing::Test {};
using Types = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(CombineTyped, Types);

TYPED_TEST(CombineTyped, ClosedForm) {
  // Entry a of output n weighs 2^-(a % K); row r column i holds 8 r + i + 1: exact in every dtype.
  using T = TypeParam;
  const int64_t num_out = 3, fixed = 3, width = 5;
  std::vector<int32_t> row_of = {4, 0, 8, 3, 7, 1, 6, 2, 5};
  std::vector<T> rows, out = nans<T>(num_out * width);
  std::vector<Accumulate<T>> weights;
  for (int64_t r = 0; r < 9; ++r) {
    for (int64_t i = 0; i < width; ++i) rows.push_back(make<T>(static_cast<double>(8 * r + i + 1)));
    weights.push_back(static_cast<Accumulate<T>>(std::exp2(-static_cast<double>(r % 3))));
  }
  combine(rows.data(), {nullptr, fixed, row_of.data()}, weights.data(), 1, out.data(), num_out,
          width, DTypeOf<T>::value);
  for (int64_t n = 0; n < num_out; ++n) {
    for (int64_t i = 0; i < width; ++i) {
      const int32_t* const r = row_of.data() + 3 * n;
      const double expected =
          (8 * r[0] + i + 1) + (8 * r[1] + i + 1) / 2.0 + (8 * r[2] + i + 1) / 4.0;
      EXPECT_EQ(load(&out[n * width + i]), load(std::vector<T>{make<T>(expected)}.data()));
    }
  }
}

TYPED_TEST(CombineTyped, EqualsReference) {
  using T = TypeParam;
  for (const int64_t num_out : {0, 1, 9}) {
    for (const int64_t fixed : {-1, 0, 1, 4, 9}) {
      for (const int64_t num_gates : {1, 3}) {
        for (const int64_t width : {0, 1, 17, 256, 515}) {
          const Case<T> at(num_out, fixed, num_gates, width);
          expect_close(at.forward(), at.forward(true), tolerance<T>(), at.name());
          const auto actual = at.backward(), expected = at.backward(true);
          expect_close(actual.rows, expected.rows, tolerance<T>(), at.name() + " grad_rows");
          expect_close(actual.weights, expected.weights, tolerance<Accumulate<T>>() * 10,
                       at.name() + " grad_weights");
        }
      }
    }
  }
}

TYPED_TEST(CombineTyped, SameBitsForAnyThreadCount) {
  using T = TypeParam;
  for (const int64_t fixed : {-1, 5}) {
    const Case<T> at(1003, fixed, 1, 67);
    const auto out = at.forward();
    const auto grads = at.backward();
    for (const int count : kThreadCounts) {
      const Threads threads(count);
      EXPECT_TRUE(same_bits(at.forward(), out));
      const auto again = at.backward();
      EXPECT_TRUE(same_bits(again.rows, grads.rows));
      EXPECT_TRUE(same_bits(again.weights, grads.weights));
    }
  }
}

TYPED_TEST(CombineTyped, OneGradientAlone) {
  using T = TypeParam;
  for (const int64_t num_gates : {1, 2}) {
    const Case<T> at(7, -1, num_gates, 300);
    const auto expected = at.backward();
    const DType dtype = DTypeOf<T>::value;
    std::vector<T> rows = nans<T>(static_cast<int64_t>(at.rows.size()));
    combine_backward(at.grad_out.data(), nullptr, at.index(), at.weights.data(), num_gates,
                     rows.data(), nullptr, 7, 300, dtype);
    EXPECT_TRUE(same_bits(rows, expected.rows));
    auto weights = nans<Accumulate<T>>(static_cast<int64_t>(at.weights.size()));
    combine_backward(at.grad_out.data(), at.rows.data(), at.index(), at.weights.data(), num_gates,
                     nullptr, weights.data(), 7, 300, dtype);
    expect_close(weights, expected.weights, tolerance<Accumulate<T>>(), "grad_weights alone");
  }
}

TYPED_TEST(CombineTyped, NullWeightsAndNullRowOf) {
  using T = TypeParam;
  Case<T> at(6, 3, 1, 19);
  std::fill(at.weights.begin(), at.weights.end(), Accumulate<T>{1});
  std::iota(at.row_of.begin(), at.row_of.end(), 0);
  std::vector<T> out = nans<T>(6 * 19), rows = nans<T>(18 * 19);
  combine(at.rows.data(), {nullptr, 3, nullptr}, nullptr, 1, out.data(), 6, 19, DTypeOf<T>::value);
  EXPECT_TRUE(same_bits(out, at.forward()));
  combine_backward(at.grad_out.data(), nullptr, {nullptr, 3, nullptr}, nullptr, 1, rows.data(),
                   nullptr, 6, 19, DTypeOf<T>::value);
  EXPECT_TRUE(same_bits(rows, at.backward().rows));
}

TEST(Combine, IsTranspose) {
  for (const int64_t fixed : {-1, 1, 6}) {
    for (const int64_t num_gates : {1, 2, 5}) {
      const Case<double> at(23, fixed, num_gates, 41);
      const auto grads = at.backward();
      const double expected = dot(at.forward(), at.grad_out);
      EXPECT_NEAR(dot(at.rows, grads.rows), expected, 1e-12 * std::abs(expected));
      EXPECT_NEAR(dot(at.weights, grads.weights), expected, 1e-12 * std::abs(expected));
    }
  }
}

TEST(Combine, WrongArguments) {
  EXPECT_EQ(config_error([] { combine(nullptr, {}, nullptr, 0, nullptr, 0, 0, DType::kFloat32); }),
            "[combine] num_gates=0 is below 1; choose 1 or more");
  EXPECT_EQ(config_error([] {
              combine(nullptr, {nullptr, 3, nullptr}, nullptr, 2, nullptr, 1, 0, DType::kFloat32);
            }),
            "[combine] num_gates=2 differs from 1, but weights=null; pass weights or choose 1");
  EXPECT_EQ(config_error([] {
              combine_backward(nullptr, nullptr, {}, nullptr, 1, nullptr, nullptr, 1, -3,
                               DType::kFloat32);
            }),
            "[combine_backward] width=-3 is negative; choose 0 or more");
}

}  // namespace
}  // namespace perseid::kernels::testing
