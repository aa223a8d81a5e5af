// Sinkhorn balancing of a table of logits.
//   EqualsReference  log d1 and the number of iterations, sizes around the block size, threads:
//   bits EqualsFormula    d0 and d1 by their definition, without logarithms, on small logits
//   Marginals        rows of the plan sum to 1/T, columns to 1/E up to the tolerance
//   LargeLogits      up to 10000 times as large: equal to the reference; a constant added to a
//   token's logits
//                    changes nothing
//   Ends             equal logits after one iteration; the cap; a tolerance that is met
#include "kernels/sinkhorn.h"

#include <cmath>
#include <functional>

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

struct Result {
  std::vector<double> log_d1;
  int64_t iterations = 0;
};

template <typename T>
Result balance(const SinkhornShape& shape, const std::vector<T>& logits,
               const SinkhornOptions& options = {}, bool is_reference = false) {
  Result result{nans<double>(shape.num_experts), 0};
  const DType dtype = DTypeOf<T>::value;
  result.iterations =
      is_reference ? sinkhorn_reference(shape, options, dtype, logits.data(), result.log_d1.data())
                   : sinkhorn(shape, options, dtype, logits.data(), result.log_d1.data());
  return result;
}

/// Logits that prefer the first experts.
template <typename T>
std::vector<T> skewed_logits(const SinkhornShape& shape, uint32_t seed, double scale = 1) {
  auto logits = normal_values<double>(shape.num_tokens * shape.num_experts, seed, scale);
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto e = static_cast<double>(i % static_cast<size_t>(shape.num_experts));
    logits[i] -= scale * 3 * e / static_cast<double>(shape.num_experts);
  }
  return {logits.begin(), logits.end()};
}

template <typename T>
class SinkhornTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(SinkhornTyped, Types);

TYPED_TEST(SinkhornTyped, EqualsReference) {
  using T = TypeParam;
  for (const int64_t num_tokens : {0, 1, 2, 37, 256, 257, 1000}) {
    for (const int64_t E : {1, 2, 5, 64}) {
      const SinkhornShape shape{num_tokens, E};
      const auto logits = skewed_logits<T>(shape, 1);
      for (const int64_t max_iterations : {1, 2, 7, 50}) {
        const SinkhornOptions options{max_iterations, 1e-4};
        const Result found = balance(shape, logits, options);
        const Result expected = balance(shape, logits, options, true);
        EXPECT_EQ(found.iterations, expected.iterations);
        for (size_t e = 0; e < expected.log_d1.size(); ++e) {
          const double allowed = std::is_same_v<T, float> ? 1e-5 : 1e-12;
          ASSERT_NEAR(found.log_d1[e], expected.log_d1[e], allowed) << num_tokens << " " << E;
        }
        if (max_iterations != 2) continue;
        for (const int threads_used : kThreadCounts) {
          const Threads threads(threads_used);
          EXPECT_TRUE(same_bits(balance(shape, logits, options).log_d1, found.log_d1));
        }
      }
    }
  }
}

TEST(Sinkhorn, EqualsFormula) {
  const SinkhornShape shape{37, 5};
  const auto logits = skewed_logits<double>(shape, 2);
  std::vector<double> d0(37), d1(5, 1.0);
  int64_t iterations = 0;
  for (double change = 1; change > 1e-4; ++iterations) {
    for (size_t t = 0; t < 37; ++t) {
      double sum = 0;
      for (size_t e = 0; e < 5; ++e) sum += std::exp(logits[t * 5 + e]) * d1[e];
      d0[t] = 1 / (37 * sum);
    }
    change = 0;
    for (size_t e = 0; e < 5; ++e) {
      double sum = 0;
      for (size_t t = 0; t < 37; ++t) sum += std::exp(logits[t * 5 + e]) * d0[t];
      change += std::abs(std::log(1 / (5 * sum) / d1[e])) / 5;
      d1[e] = 1 / (5 * sum);
    }
  }
  const Result found = balance(shape, logits);
  EXPECT_EQ(found.iterations, iterations);
  EXPECT_GT(iterations, 3);
  for (size_t e = 0; e < 5; ++e) EXPECT_NEAR(found.log_d1[e], std::log(d1[e]), 1e-12);
}

/// Largest |E * column sum - 1| of the plan whose rows sum to 1/T.
template <typename T>
double imbalance(const SinkhornShape& shape, const std::vector<T>& logits, const Result& result) {
  const auto E = static_cast<size_t>(shape.num_experts);
  std::vector<double> columns(E, 0.0), row(E);
  for (size_t t = 0; t < static_cast<size_t>(shape.num_tokens); ++t) {
    for (size_t e = 0; e < E; ++e) row[e] = double{logits[t * E + e]} + result.log_d1[e];
    const double largest = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (double& value : row) sum += value = std::exp(value - largest);
    for (size_t e = 0; e < E; ++e) columns[e] += row[e] / sum;
  }
  double worst = 0;
  for (const double column : columns) {
    worst = std::max(
        worst,
        std::abs(column * static_cast<double>(E) / static_cast<double>(shape.num_tokens) - 1));
  }
  return worst;
}

TEST(Sinkhorn, Marginals) {
  const SinkhornShape shape{600, 8};
  const auto logits = skewed_logits<float>(shape, 3);
  const Result found = balance(shape, logits);
  EXPECT_LT(found.iterations, 50);
  EXPECT_LT(imbalance(shape, logits, found), 1e-3);
  EXPECT_GT(imbalance(shape, logits, {std::vector<double>(8, 0.0), 0}), .5);
}

TEST(Sinkhorn, LargeLogits) {
  const SinkhornShape shape{600, 8};
  const Result none{std::vector<double>(8, 0.0), 0};
  for (const double scale : {30., 1e2, 1e4}) {
    const auto logits = skewed_logits<float>(shape, 4, scale);
    const Result found = balance(shape, logits), expected = balance(shape, logits, {}, true);
    for (size_t e = 0; e < 8; ++e) {
      EXPECT_NEAR(found.log_d1[e], expected.log_d1[e], 1e-6 * scale) << scale;
    }
    // The larger the logits, the further 50 iterations stop from the balance.
    EXPECT_LT(imbalance(shape, logits, found), imbalance(shape, logits, none)) << scale;
  }

  // 89 is where e^x ends in float32.
  for (const double shift : {89., 1e3, -1e3}) {
    const auto plain = skewed_logits<double>(shape, 5);
    auto shifted = plain;
    for (size_t i = 0; i < shifted.size(); ++i) {
      shifted[i] += i / 8 % 2 == 0 ? shift : 0;  // half of the tokens
    }
    const Result a = balance(shape, plain), b = balance(shape, shifted);
    for (size_t e = 0; e < 8; ++e) EXPECT_NEAR(a.log_d1[e], b.log_d1[e], 1e-10) << shift;
  }
}

TEST(Sinkhorn, Ends) {
  const Result equal = balance({6, 3}, std::vector<double>(18, 2.0));
  EXPECT_EQ(equal.iterations, 1);
  for (const double value : equal.log_d1) EXPECT_NEAR(value, 0, 1e-15);
  const SinkhornShape shape{37, 5};
  const auto logits = skewed_logits<double>(shape, 2);
  EXPECT_EQ(balance(shape, logits, {3, 0}).iterations, 3);
  const int64_t loose = balance(shape, logits, {50, 1e-2}).iterations;
  EXPECT_LT(loose, balance(shape, logits).iterations);
  EXPECT_EQ(balance(shape, logits, {loose + 5, 1e-2}).iterations, loose);
  EXPECT_EQ(balance({0, 2}, std::vector<double>()).iterations, 0);
}

TEST(Sinkhorn, WrongArguments) {
  const std::vector<double> logits(6, 1.0);
  std::vector<double> log_d1(3);
  const auto call = [&](const SinkhornShape& shape, const SinkhornOptions& options,
                        const double* given, DType dtype = DType::kFloat64) {
    return config_error([&] { sinkhorn(shape, options, dtype, given, log_d1.data()); });
  };
  EXPECT_EQ(call({-1, 3}, {}, logits.data()),
            "[sinkhorn] num_tokens=-1 is negative; choose 0 or more");
  EXPECT_EQ(call({2, 0}, {}, logits.data()), "[sinkhorn] num_experts=0 is below 1");
  EXPECT_EQ(call({2, 3}, {0, 1e-4}, logits.data()),
            "[sinkhorn] max_iterations=0 is below 1; 50 is usual");
  EXPECT_EQ(call({2, 3}, {50, -1}, logits.data()),
            "[sinkhorn] tolerance=-1 is not a number from 0 on; 1e-4 is usual");
  EXPECT_EQ(call({2, 3}, {}, nullptr),
            "[sinkhorn] logits=null but 6 elements are needed; pass a buffer");
  EXPECT_EQ(call({2, 3}, {}, logits.data(), DType::kBFloat16),
            "[sinkhorn] dtype=bf16 is not supported; choose fp32 or fp64");
}

}  // namespace
}  // namespace perseid::kernels::testing
