// Sinkhorn's relaxation of permutations.
//   Golden             the values of Mena's operator on a 3 x 3 matrix at two temperatures
//   EqualsReference    sizes around the lanes, iterations, temperatures, both types
//   ManyIterations     low temperatures, forward and backward
//   Drift              potentials that leave the range of factors, forward and backward
//   Sums               columns 1 always; rows too at a temperature of 1e-2 after 150 iterations
//   Potentials         pi from the last ones; without them the same bits
//   BackwardEqualsReference, BackwardEqualsDifferences
//   ExtremeScores      finite at 1e-7; a matrix without a result leaves the others alone
//   ThreadsSameBits    any number of threads, and of matrices in the call
#include "kernels/doubly_stochastic.h"

#include <cmath>

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <typename T>
struct Result {
  std::vector<T> pi;
  std::vector<double> rows, columns;
};

template <typename T>
Result<T> forward(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                  const std::vector<T>& scores, bool is_kept = true) {
  const int64_t potentials = shape.num_matrices * options.iterations * shape.size;
  Result<T> result{nans<T>(static_cast<int64_t>(scores.size())), nans<double>(potentials),
                   nans<double>(potentials)};
  doubly_stochastic(shape, options, DTypeOf<T>::value, scores.data(), result.pi.data(),
                    is_kept ? result.rows.data() : nullptr,
                    is_kept ? result.columns.data() : nullptr);
  return result;
}

template <typename T>
std::vector<T> reference(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                         const std::vector<T>& scores) {
  std::vector<T> pi = nans<T>(static_cast<int64_t>(scores.size()));
  doubly_stochastic_reference(shape, options, DTypeOf<T>::value, scores.data(), pi.data());
  return pi;
}

template <typename T>
std::vector<T> backward(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                        const std::vector<T>& scores, const std::vector<T>& grad_pi) {
  const Result<T> kept = forward(shape, options, scores);
  std::vector<T> grad = nans<T>(static_cast<int64_t>(scores.size()));
  doubly_stochastic_backward(shape, options, DTypeOf<T>::value, scores.data(), kept.rows.data(),
                             kept.columns.data(), grad_pi.data(), grad.data());
  return grad;
}

template <typename T>
std::vector<T> backward_reference(const DoublyStochasticShape& shape,
                                  const DoublyStochasticOptions& options,
                                  const std::vector<T>& scores, const std::vector<T>& grad_pi) {
  std::vector<T> grad = nans<T>(static_cast<int64_t>(scores.size()));
  doubly_stochastic_backward_reference(shape, options, DTypeOf<T>::value, scores.data(),
                                       grad_pi.data(), grad.data());
  return grad;
}

/// 1e-12 where scores / temperature are small, else what their digits allow.
template <typename T>
double allowed(const std::vector<T>& scores, const DoublyStochasticOptions& options) {
  if constexpr (std::is_same_v<T, float>) return 2e-6;
  double largest = 0;
  for (const T score : scores) largest = std::max(largest, std::abs(static_cast<double>(score)));
  return std::max(1e-12, 1e-15 * largest / options.temperature);
}

/// As expect_close; where quotients are large, the terms that cancel are as large as the upstream
/// gradient over the temperature, and so is their rounding.
template <typename T>
void expect_gradient(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                     const std::vector<T>& scores, const std::vector<T>& grad_pi,
                     const std::string& what) {
  const auto found = backward(shape, options, scores, grad_pi);
  const auto expected = backward_reference(shape, options, scores, grad_pi);
  const double limit = 10 * allowed(scores, options);
  if (options.temperature >= .05) return expect_close(found, expected, limit, what);
  double largest = 0;
  for (const T grad : grad_pi) largest = std::max(largest, std::abs(static_cast<double>(grad)));
  for (size_t k = 0; k < found.size(); ++k) {
    ASSERT_NEAR(found[k], expected[k], limit * largest / options.temperature) << what << " " << k;
  }
}

/// Sums of the rows, or of the columns, of one matrix.
std::vector<double> sums_of(const std::vector<double>& pi, size_t n, bool of_columns,
                            size_t matrix = 0) {
  std::vector<double> sums(n, 0.0);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) sums[of_columns ? j : i] += pi[(matrix * n + i) * n + j];
  }
  return sums;
}

void expect_all_near(const std::vector<double>& values, double expected, double tolerance,
                     const std::string& what) {
  for (const double value : values) ASSERT_NEAR(value, expected, tolerance) << what;
}

TEST(DoublyStochastic, Golden) {
  const std::vector<double> scores = {.04, .01, -.02, .03, .02, -.01, -.05, 0, .02};
  const std::vector<double> expected = {.73057, .24776, .02000, .26935, .67497,
                                        .05447, .00008, .07727, .92553};
  const auto pi = forward({1, 3}, {1e-2, 20}, scores).pi;
  for (size_t i = 0; i < 9; ++i) EXPECT_NEAR(pi[i], expected[i], 5e-6) << i;
  const auto cold = forward({1, 3}, {1e-3, 20}, scores).pi;
  EXPECT_NEAR(sums_of(cold, 3, false)[0], .97496, 5e-6);
  expect_all_near(sums_of(cold, 3, true), 1, 1e-14, "columns");
}

template <typename T>
class DoublyStochasticTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(DoublyStochasticTyped, Types);

TYPED_TEST(DoublyStochasticTyped, EqualsReference) {
  using T = TypeParam;
  for (const int64_t n : {1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 100}) {
    for (const int64_t B : {0, 1, 3}) {
      const DoublyStochasticShape shape{B, n};
      const auto scores = normal_values<T>(B * n * n, static_cast<uint32_t>(n));
      for (const double temperature : {5.0, 1.0, .05, 1e-3, 1e-6}) {
        for (const int64_t iterations : {1, 2, 7, 20}) {
          const DoublyStochasticOptions options{temperature, iterations};
          expect_close(forward(shape, options, scores).pi, reference(shape, options, scores),
                       allowed(scores, options),
                       to_text(n) + " at " + to_text(temperature) + " x " + to_text(iterations));
        }
      }
    }
  }
}

TEST(DoublyStochastic, ManyIterations) {
  for (const int64_t n : {3, 33}) {
    const DoublyStochasticShape shape{2, n};
    for (const double temperature : {1e-2, 1e-3, 1e-5, 1e-7}) {
      const DoublyStochasticOptions options{temperature, 150};
      auto scores = normal_values<double>(2 * n * n, 5, .05);
      // The second matrix has rows that all want one column: its potentials move at every step.
      for (int64_t i = 0; i < n; ++i) scores[static_cast<size_t>(n * n + i * n)] += 1;
      const std::string what = to_text(n) + " at " + to_text(temperature);
      expect_close(forward(shape, options, scores).pi, reference(shape, options, scores),
                   allowed(scores, options), what);
      expect_gradient(shape, options, scores, normal_values<double>(2 * n * n, 6), what);
    }
  }
}

/// Three rows share two columns and the fourth row has the other two, as all else is out of reach:
/// no doubly stochastic matrix is near, and the potentials drift for ever.
TEST(DoublyStochastic, Drift) {
  constexpr int64_t kIterations = 1500;
  constexpr double kFar = -9000;
  const std::vector<double> scores = {.1,  .7,  kFar, kFar, -.3,  .2,   kFar, kFar,
                                      1.1, -.6, kFar, kFar, kFar, kFar, .4,   -.5};
  const DoublyStochasticShape shape{1, 4};
  const DoublyStochasticOptions options{1, kIterations};
  const auto kept = forward(shape, options, scores);
  expect_close(kept.pi, reference(shape, options, scores), 1e-11, "pi");
  EXPECT_GT(std::abs(kept.columns[(kIterations - 1) * 4] - kept.columns[0]), 600);
  const std::vector<double> grad_pi = {1, -2, 3, 5, -8, 13, 21, -34, 55, -89, 144, 2, 7, 1, -8, 2};
  const auto expected = backward_reference(shape, options, scores, grad_pi);
  EXPECT_GT(std::abs(expected[0]), 1);
  expect_close(backward(shape, options, scores, grad_pi), expected, 1e-10, "gradient");
}

TEST(DoublyStochastic, Sums) {
  for (const int64_t n : {2, 16, 64}) {
    const auto scores = normal_values<double>(2 * n * n, 7, .05);
    for (const double temperature : {1., .1, 1e-2, 1e-3, 1e-5}) {
      const auto pi = forward({2, n}, {temperature, 150}, scores).pi;
      for (size_t b = 0; b < 2; ++b) {
        const std::string what = to_text(n) + " at " + to_text(temperature);
        expect_all_near(sums_of(pi, static_cast<size_t>(n), true, b), 1, 1e-13, what);
        if (temperature < 1e-2) continue;
        expect_all_near(sums_of(pi, static_cast<size_t>(n), false, b), 1, 1e-3, what);
      }
    }
  }
}

TYPED_TEST(DoublyStochasticTyped, Potentials) {
  using T = TypeParam;
  const DoublyStochasticShape shape{2, 13};
  const auto scores = normal_values<T>(2 * 169, 8);
  for (const double temperature : {1., 1e-2, 1e-5}) {
    const DoublyStochasticOptions options{temperature, 30};
    const Result<T> kept = forward(shape, options, scores);
    EXPECT_TRUE(same_bits(forward(shape, options, scores, false).pi, kept.pi));
    std::vector<T> pi(scores.size());
    for (size_t k = 0; k < pi.size(); ++k) {
      const size_t b = k / 169, i = k / 13 % 13, j = k % 13, last = (b * 30 + 29) * 13;
      pi[k] = static_cast<T>(std::exp(static_cast<double>(scores[k]) / temperature -
                                      kept.rows[last + i] - kept.columns[last + j]));
    }
    expect_close(kept.pi, pi, allowed(scores, options), "pi at " + to_text(temperature));
  }
}

TYPED_TEST(DoublyStochasticTyped, BackwardEqualsReference) {
  using T = TypeParam;
  for (const int64_t n : {1, 2, 5, 8, 31, 64}) {
    for (const int64_t B : {0, 1, 3}) {
      const DoublyStochasticShape shape{B, n};
      const auto scores = normal_values<T>(B * n * n, static_cast<uint32_t>(n));
      const auto grad_pi = normal_values<T>(B * n * n, static_cast<uint32_t>(n + 1));
      for (const double temperature : {5.0, 1.0, .05, 1e-3}) {
        for (const int64_t iterations : {1, 2, 20}) {
          const DoublyStochasticOptions options{temperature, iterations};
          expect_gradient(shape, options, scores, grad_pi,
                          to_text(n) + " at " + to_text(temperature) + " x " + to_text(iterations));
        }
      }
    }
  }
}

TEST(DoublyStochastic, BackwardEqualsDifferences) {
  const DoublyStochasticShape shape{1, 5};
  for (const uint32_t seed : {1u, 2u, 3u}) {
    const auto grad_pi = normal_values<double>(25, seed + 10);
    for (const double temperature : {1., .05}) {
      const auto scores = normal_values<double>(25, seed, temperature < 1 ? .1 : 1);
      for (const int64_t iterations : {1, 2, 7, 20}) {
        const DoublyStochasticOptions options{temperature, iterations};
        const double step = 1e-5 * temperature;
        std::vector<double> differences(25);
        for (size_t k = 0; k < 25; ++k) {
          auto above = scores, below = scores;
          above[k] += step;
          below[k] -= step;
          const auto pi_above = forward(shape, options, above, false).pi;
          const auto pi_below = forward(shape, options, below, false).pi;
          for (size_t m = 0; m < 25; ++m) {
            differences[k] += grad_pi[m] * (pi_above[m] - pi_below[m]) / (above[k] - below[k]);
          }
        }
        expect_close(backward(shape, options, scores, grad_pi), differences, 1e-7,
                     to_text(seed) + " at " + to_text(temperature) + " x " + to_text(iterations));
      }
    }
  }
}

TYPED_TEST(DoublyStochasticTyped, ExtremeScores) {
  using T = TypeParam;
  const int64_t n = 9;
  const DoublyStochasticShape shape{4, n};
  for (const int64_t iterations : {1, 2, 150}) {
    const DoublyStochasticOptions options{1e-7, iterations};
    auto scores = normal_values<T>(4 * n * n, 3);
    for (T& score : scores) score = score > T{0} ? T(50) - score : T(-50) - score;
    const auto clean = forward(shape, options, scores);
    const auto grad_pi = normal_values<T>(4 * n * n, 4);
    const auto clean_grad = backward(shape, options, scores, grad_pi);
    for (const auto& values : {clean.pi, clean_grad}) {
      for (const T value : values) ASSERT_TRUE(std::isfinite(value)) << value;
    }
    for (const double bad : {kNaN, kInf, -kInf, 2e5, -2e5}) {  // 2e5 / 1e-7 is above 1e12
      auto broken = scores;
      broken[static_cast<size_t>(n * n) + 17] = static_cast<T>(bad);
      const auto found = forward(shape, options, broken);
      const auto grad = backward(shape, options, broken, grad_pi);
      const auto expected = reference(shape, options, broken);
      const auto expected_grad = backward_reference(shape, options, broken, grad_pi);
      for (size_t k = 0; k < scores.size(); ++k) {
        const bool is_broken = k / static_cast<size_t>(n * n) == 1;
        ASSERT_EQ(std::isnan(found.pi[k]), is_broken) << bad << " " << k;
        ASSERT_EQ(std::isnan(grad[k]), is_broken) << bad << " " << k;
        ASSERT_EQ(std::isnan(expected[k]), is_broken) << bad << " " << k;
        ASSERT_EQ(std::isnan(expected_grad[k]), is_broken) << bad << " " << k;
        if (is_broken) continue;
        ASSERT_EQ(found.pi[k], clean.pi[k]);
        ASSERT_EQ(grad[k], clean_grad[k]);
      }
      for (size_t k = 0; k < found.rows.size(); ++k) {
        const bool is_broken = k / static_cast<size_t>(n * iterations) == 1;
        ASSERT_EQ(std::isnan(found.rows[k]), is_broken);
        ASSERT_EQ(std::isnan(found.columns[k]), is_broken);
      }
    }
    // A gradient that is not finite stays with its matrix.
    auto broken_grad = grad_pi;
    broken_grad[5] = std::numeric_limits<T>::quiet_NaN();
    const auto grad = backward(shape, options, scores, broken_grad);
    EXPECT_TRUE(std::isnan(grad[5]));
    for (size_t k = static_cast<size_t>(n * n); k < grad.size(); ++k) {
      ASSERT_EQ(grad[k], clean_grad[k]);
    }
  }
}

TYPED_TEST(DoublyStochasticTyped, ThreadsSameBits) {
  using T = TypeParam;
  const int64_t B = 7, n = 21, elements = n * n;
  const auto scores = normal_values<T>(B * elements, 1);
  const auto grad_pi = normal_values<T>(B * elements, 2);
  const DoublyStochasticOptions options{1e-2, 9};
  const auto pi = forward({B, n}, options, scores);
  const auto grad = backward({B, n}, options, scores, grad_pi);
  for (const int threads_used : kThreadCounts) {
    const Threads threads(threads_used);
    const auto again = forward({B, n}, options, scores);
    EXPECT_TRUE(same_bits(again.pi, pi.pi));
    EXPECT_TRUE(same_bits(again.rows, pi.rows));
    EXPECT_TRUE(same_bits(again.columns, pi.columns));
    EXPECT_TRUE(same_bits(backward({B, n}, options, scores, grad_pi), grad));
  }
  const auto part = [&](const std::vector<T>& values, int64_t b) {
    return std::vector<T>(values.begin() + b * elements, values.begin() + (b + 1) * elements);
  };
  for (int64_t b = 0; b < B; ++b) {
    EXPECT_TRUE(same_bits(forward({1, n}, options, part(scores, b)).pi, part(pi.pi, b)));
    EXPECT_TRUE(
        same_bits(backward({1, n}, options, part(scores, b), part(grad_pi, b)), part(grad, b)));
  }
}

TEST(DoublyStochastic, WrongArguments) {
  std::vector<double> scores(8), pi(8), rows(4), columns(4);
  const auto call = [&](const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                        DType dtype = DType::kFloat64) {
    return config_error([&] {
      doubly_stochastic(shape, options, dtype, scores.data(), pi.data(), nullptr, nullptr);
    });
  };
  EXPECT_EQ(call({-1, 2}, {}), "[doubly_stochastic] num_matrices=-1 is negative; choose 0 or more");
  EXPECT_EQ(call({2, 0}, {}), "[doubly_stochastic] size=0 is below 1");
  const std::string suffix = " is not a finite number above 0; 1e-3 is usual";
  EXPECT_EQ(call({2, 2}, {0, 1}), "[doubly_stochastic] temperature=0" + suffix);
  EXPECT_EQ(call({2, 2}, {-1, 1}), "[doubly_stochastic] temperature=-1" + suffix);
  EXPECT_EQ(call({2, 2}, {kNaN, 1}), "[doubly_stochastic] temperature=nan" + suffix);
  EXPECT_EQ(call({2, 2}, {kInf, 1}), "[doubly_stochastic] temperature=inf" + suffix);
  EXPECT_EQ(call({2, 2}, {1, 0}), "[doubly_stochastic] iterations=0 is below 1; 20 is usual");
  EXPECT_EQ(call({2, 2}, {1, 1}, DType::kBFloat16),
            "[doubly_stochastic] dtype=bf16 is not supported; choose fp32 or fp64");

  const auto buffers = [&](const void* from, void* to, double* of_rows, double* of_columns) {
    return config_error([&] {
      doubly_stochastic({2, 2}, {1, 1}, DType::kFloat64, from, to, of_rows, of_columns);
    });
  };
  const auto missing = [](const char* operation, const char* argument, int count) {
    return "[" + std::string(operation) + "] " + argument + "=null but " + to_text(count) +
           " elements are needed; pass a buffer";
  };
  constexpr const char* kForward = "doubly_stochastic";
  EXPECT_EQ(buffers(nullptr, pi.data(), nullptr, nullptr), missing(kForward, "scores", 8));
  EXPECT_EQ(buffers(scores.data(), nullptr, nullptr, nullptr), missing(kForward, "pi", 8));
  EXPECT_EQ(buffers(scores.data(), pi.data(), nullptr, columns.data()),
            missing(kForward, "rows", 4));
  EXPECT_EQ(buffers(scores.data(), pi.data(), rows.data(), nullptr),
            missing(kForward, "columns", 4));

  const auto back = [&](const DoublyStochasticOptions& options, const void* from,
                        const double* of_rows, const double* of_columns, const void* grad,
                        void* to) {
    return config_error([&] {
      doubly_stochastic_backward({2, 2}, options, DType::kFloat64, from, of_rows, of_columns, grad,
                                 to);
    });
  };
  constexpr const char* kBackward = "doubly_stochastic_backward";
  double* const x = scores.data();
  EXPECT_EQ(back({0, 1}, x, x, x, x, x), "[doubly_stochastic_backward] temperature=0" + suffix);
  EXPECT_EQ(back({1, 1}, nullptr, x, x, x, x), missing(kBackward, "scores", 8));
  EXPECT_EQ(back({1, 1}, x, nullptr, x, x, x), missing(kBackward, "rows", 4));
  EXPECT_EQ(back({1, 1}, x, x, nullptr, x, x), missing(kBackward, "columns", 4));
  EXPECT_EQ(back({1, 1}, x, x, x, nullptr, x), missing(kBackward, "grad_pi", 8));
  EXPECT_EQ(back({1, 1}, x, x, x, x, nullptr), missing(kBackward, "grad_scores", 8));
}

}  // namespace
}  // namespace perseid::kernels::testing
