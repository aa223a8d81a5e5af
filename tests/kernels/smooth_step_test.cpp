// Smooth-step.
//   Table            the values of the formula at nine points, several widths, both types
//   Golden           S(0.25) at widths 1, 0.5 and 10
//   SaturatesExactly 0 and 1 and slope 0 at and beyond +-gamma/2, and nowhere inside
//   Complement       1 - S to a rounding of S, and relative to itself near S = 1; S(-z) = 1 - S(z)
//   Monotone         over a fine grid, in float32
//   Derivative       central differences to 1e-7 inside and outside; one-sided slope 0 at the ends
//   NaN              stays NaN in all three
#include "kernels/smooth_step.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
void expect_table(T gamma) {
  struct Row {
    double z, value, slope;  // z / gamma and gamma * S'
  };
  const Row rows[] = {
      {-0.5, 0, 0},       {-0.25, 0.15625, 1.125}, {-0.1, 0.352, 1.44}, {0, 0.5, 1.5},
      {0.1, 0.648, 1.44}, {0.25, 0.84375, 1.125},  {0.4, 0.972, 0.54},  {0.5, 1, 0}};
  const double tolerance = 4.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (const Row& row : rows) {
    const auto step = smooth_step(static_cast<T>(row.z) * gamma, gamma);
    EXPECT_NEAR(static_cast<double>(step.value), row.value, tolerance) << row.z;
    EXPECT_NEAR(static_cast<double>(step.complement), 1 - row.value, tolerance) << row.z;
    EXPECT_NEAR(static_cast<double>(step.slope * gamma), row.slope, 2 * tolerance) << row.z;
  }
}

TEST(SmoothStep, Table) {
  for (const double gamma : {1e-3, 0.5, 1.0, 10.0}) {
    expect_table<float>(static_cast<float>(gamma));
    expect_table<double>(gamma);
  }
}

TEST(SmoothStep, Golden) {
  EXPECT_EQ(smooth_step(0.25, 1.0).value, 0.84375);
  EXPECT_EQ(smooth_step(0.25, 0.5).value, 1.0);
  EXPECT_NEAR(smooth_step(0.25, 10.0).value, 0.53746875, 1e-15);
}

template <typename T>
void expect_saturation(T gamma) {
  for (const T z : {gamma / 2, gamma, T{1e30}, std::numeric_limits<T>::infinity()}) {
    const auto high = smooth_step(z, gamma), low = smooth_step(-z, gamma);
    EXPECT_EQ(high.value, T{1});
    EXPECT_EQ(high.complement, T{0});
    EXPECT_EQ(high.slope, T{0});
    EXPECT_EQ(low.value, T{0});
    EXPECT_EQ(low.complement, T{1});
    EXPECT_EQ(low.slope, T{0});
  }
  for (const double share : {0.4999, 0.49, 0.0}) {
    const auto inside = smooth_step(static_cast<T>(share) * gamma, gamma);
    EXPECT_GT(inside.complement, T{0}) << share;
    EXPECT_GT(inside.slope, T{0}) << share;
    EXPECT_GT(smooth_step(-static_cast<T>(share) * gamma, gamma).value, T{0}) << share;
  }
}

TEST(SmoothStep, SaturatesExactly) {
  for (const double gamma : {1e-3, 1.0, 10.0}) {
    expect_saturation<float>(static_cast<float>(gamma));
    expect_saturation<double>(gamma);
  }
}

TEST(SmoothStep, Complement) {
  for (double z = -0.6; z < 0.6; z += 0.00137) {
    const auto step = smooth_step(z, 1.0);
    EXPECT_NEAR(step.value + step.complement, 1, 3e-16) << z;
    EXPECT_NEAR(smooth_step(-z, 1.0).value, step.complement, 1e-15) << z;
    EXPECT_NEAR(smooth_step(-z, 1.0).slope, step.slope, 1e-15) << z;
  }
  // Near S = 1 the difference 1 - S is lost in float32; the complement is u'^2 (3 - 2u').
  const double u = 0.5 - static_cast<double>(0.4999f);
  EXPECT_NEAR(smooth_step(0.4999f, 1.0f).complement / (u * u * (3 - 2 * u)), 1, 2e-3);
}

TEST(SmoothStep, Monotone) {
  float previous = 0;
  for (float z = -0.51f; z < 0.51f; z += 1e-4f) {
    const float value = smooth_step(z, 1.0f).value;
    EXPECT_GE(value, previous) << z;
    EXPECT_LE(value, 1.0f) << z;
    previous = value;
  }
}

TEST(SmoothStep, Derivative) {
  const double h = 1e-6;
  for (const double gamma : {0.1, 1.0, 10.0}) {
    for (double share = -0.7; share < 0.7; share += 0.0137) {
      if (std::abs(std::abs(share) - 0.5) < 1e-3) continue;
      const double z = share * gamma, step = h * gamma;
      const double difference =
          (smooth_step(z + step, gamma).value - smooth_step(z - step, gamma).value) / (2 * step);
      EXPECT_NEAR(smooth_step(z, gamma).slope * gamma, difference * gamma, 1e-7) << z;
    }
    // One-sided from inside: 0 up to 3 h.
    const double edge = gamma / 2, step = h * gamma;
    EXPECT_NEAR((1 - smooth_step(edge - step, gamma).value) / h, 0, 4e-6);
    EXPECT_NEAR(smooth_step(step - edge, gamma).value / h, 0, 4e-6);
  }
}

TEST(SmoothStep, NaN) {
  const auto step = smooth_step(std::numeric_limits<float>::quiet_NaN(), 1.0f);
  EXPECT_TRUE(std::isnan(step.value));
  EXPECT_TRUE(std::isnan(step.complement));
  EXPECT_TRUE(std::isnan(step.slope));
}

}  // namespace
}  // namespace perseid::kernels::testing
