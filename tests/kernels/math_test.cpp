// Vectorised elementary functions against the standard library in double.
#include "kernels/math.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(Math, ExpWithinTwoUnits) {
  double worst = 0;
  for (double x = -87.3; x < 88.7; x += 0.00137) {
    const double expected = std::exp(static_cast<double>(static_cast<float>(x)));
    worst = std::max(worst, std::abs(exp_of(static_cast<float>(x)) / expected - 1.0));
  }
  EXPECT_LE(worst, 2.0 * 0x1p-23);
  for (double x = -103.9; x < -87.3; x += 0.0137) {  // subnormal results: one step apart
    EXPECT_NEAR(exp_of(static_cast<float>(x)), std::exp(static_cast<double>(static_cast<float>(x))),
                0x1p-149);
  }
}

TEST(Math, ExpSaturates) {
  EXPECT_EQ(exp_of(0.0f), 1.0f);
  EXPECT_EQ(exp_of(-0.0f), 1.0f);
  for (const float x : {88.73f, 89.5f, 1e4f, 3e38f, kInf}) EXPECT_EQ(exp_of(x), kInf) << x;
  for (const float x : {-104.0f, -1e4f, -3e38f, -kInf}) EXPECT_EQ(exp_of(x), 0.0f) << x;
  EXPECT_TRUE(std::isnan(exp_of(std::numeric_limits<float>::quiet_NaN())));
}

TEST(Math, SimdExp) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double worst = 0;
  for (double x = -708.3; x < 709.7; x += 0.00737) {
    const double expected = std::exp(x);
    worst = std::max(
        worst, std::abs(simd_exp(x) - expected) / (std::nextafter(expected, kInfinity) - expected));
  }
  for (double x = -1; x < 1; x += 1.1e-5) {
    const double expected = std::exp(x);
    worst = std::max(
        worst, std::abs(simd_exp(x) - expected) / (std::nextafter(expected, kInfinity) - expected));
  }
  EXPECT_LE(worst, 2.0);
  for (double x = -745.0; x < -708.3; x += 0.0137) {  // subnormal results: one step apart
    EXPECT_NEAR(simd_exp(x), std::exp(x), 0x1p-1074) << x;
  }
  EXPECT_EQ(simd_exp(0.0), 1.0);
  EXPECT_EQ(simd_exp(-0.0), 1.0);
  for (const double x : {709.79, 710.5, 1e4, 1e308, kInfinity}) EXPECT_EQ(simd_exp(x), kInfinity);
  for (const double x : {-746.0, -1e4, -1e308, -kInfinity}) EXPECT_EQ(simd_exp(x), 0.0) << x;
  EXPECT_TRUE(std::isnan(simd_exp(std::numeric_limits<double>::quiet_NaN())));
}

TEST(Math, LogWithinThreeUnits) {
  double worst = 0;
  for (double exponent = -126; exponent < 127.9; exponent += 0.00137) {
    const auto x = static_cast<float>(std::exp2(exponent));
    const double expected = std::log(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(log_of(x)) / expected - 1.0));
  }
  EXPECT_LE(worst, 3.0 * 0x1p-23);
  for (float x = 0.7f; x < 1.45f; x += 1.1e-4f) {  // around the zero
    const double expected = std::log(static_cast<double>(x));
    EXPECT_NEAR(log_of(x), expected, 3.0 * 0x1p-23 * std::abs(expected)) << x;
  }
  EXPECT_EQ(log_of(1.0f), 0.0f);
}

TEST(Math, NormalDistribution) {
  for (double x = -12.0; x < 12.0; x += 0.00173) {
    const auto at = normal(static_cast<float>(x));
    const auto expected = normal(static_cast<double>(static_cast<float>(x)));
    ASSERT_NEAR(at.cdf, expected.cdf,
                4e-7 * expected.cdf + 3e-6 * expected.cdf * std::abs(x) + 1e-38)
        << x;
    ASSERT_NEAR(at.cdf, expected.cdf, 2.5e-7) << x;
    ASSERT_NEAR(at.density, expected.density, 2e-7) << x;
  }
  EXPECT_EQ(normal(kInf).cdf, 1.0f);
  EXPECT_EQ(normal(-kInf).cdf, 0.0f);
  EXPECT_EQ(normal(3e38f).cdf, 1.0f);
  EXPECT_EQ(normal(-3e38f).density, 0.0f);
  EXPECT_TRUE(std::isnan(normal(std::numeric_limits<float>::quiet_NaN()).cdf));
}

TEST(Math, Sigmoid) {
  for (double x = -80.0; x < 80.0; x += 0.0171) {
    const double expected = 1.0 / (1.0 + std::exp(-static_cast<double>(static_cast<float>(x))));
    ASSERT_NEAR(sigmoid(static_cast<float>(x)), expected, 4e-7 * expected) << x;
  }
  EXPECT_EQ(sigmoid(-kInf), 0.0f);
  EXPECT_EQ(sigmoid(kInf), 1.0f);
}

TEST(Math, Logarithm) {
  for (double x = 1e-37; x < 1e38; x *= 1.00137) {
    const double expected = std::log(static_cast<double>(static_cast<float>(x)));
    ASSERT_NEAR(log_of(static_cast<float>(x)), expected, 3e-7 * std::abs(expected)) << x;
  }
  for (double x = 0.9; x < 1.1; x += 1.3e-5) {
    const double expected = std::log(static_cast<double>(static_cast<float>(x)));
    ASSERT_NEAR(log_of(static_cast<float>(x)), expected, 3e-7 * std::abs(expected)) << x;
  }
  EXPECT_EQ(log_of(1.0f), 0.0f);
}

TEST(Math, SqrtSoftplus) {
  for (double z = -170.0; z < 90.0; z += 0.0171) {
    const auto x = static_cast<double>(static_cast<float>(z));
    const double softplus = x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
    const double s = std::sqrt(softplus), slope = 1 / (1 + std::exp(-x)) / (2 * s);
    const auto at = sqrt_softplus(static_cast<float>(z));
    const auto exact = sqrt_softplus(x);
    ASSERT_NEAR(at.score, s, 6e-7 * s) << z;
    ASSERT_NEAR(at.slope, slope, 1e-6 * slope) << z;
    ASSERT_NEAR(at.log_slope, slope / s, 1e-6 * slope / s) << z;
    ASSERT_NEAR(exact.score, s, 1e-15 * s) << z;
    ASSERT_NEAR(exact.slope, slope, 1e-15 * slope) << z;
    ASSERT_NEAR(exact.log_slope, slope / s, 1e-15 * slope / s) << z;
  }
  EXPECT_EQ(sqrt_softplus(-kInf).score, 0.0f);
  EXPECT_EQ(sqrt_softplus(kInf).score, kInf);
}

}  // namespace
}  // namespace perseid::kernels::testing
