#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/simd.h"

// Elementary functions that vectorise when they are inlined into a loop: no branches, no tables, no
// calls. Those for double call the standard library, as double is there for gradient tests; only
// simd_exp does not.

namespace perseid::kernels {

/// e^x, within 2 units in the last place, subnormal results included. Saturates to 0 and inf; NaN
/// stays NaN.
PERSEID_INLINE float exp_of(float x) {
  constexpr float kLog2E = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.62E4p-1f;  // 16 bits, so that n * kLn2High is exact
  constexpr float kLn2Low = 1.42860682030941723e-6f;
  constexpr float kRound = 0x1.8p+23f;  // adding it leaves the nearest integer in the low bits
  // Comparisons in this form keep NaN.
  const float high = x > 89.0f ? 89.0f : x;
  const float clamped = high < -104.0f ? -104.0f : high;
  const float shifted = clamped * kLog2E + kRound;
  const uint32_t n = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound);
  const float rounded = shifted - kRound;
  const float r = (clamped - rounded * kLn2High) - rounded * kLn2Low;
  float p = 0.0013926400479735911f;
  p = p * r + 0.008363352682556844f;
  p = p * r + 0.041666553310799825f;
  p = p * r + 0.16666575943917977f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors: n reaches from -150 to 128, more than one exponent field holds.
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(n) >> 1);
  const float first = std::bit_cast<float>((half + 127u) << 23);
  const float second = std::bit_cast<float>((n - half + 127u) << 23);
  return p * first * second;
}
PERSEID_INLINE double exp_of(double x) { return std::exp(x); }

/// e^x in double for loops that must vectorise: as exp_of(float), within 2 units in the last place.
PERSEID_INLINE double simd_exp(double x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2High = 0x1.62e42fefp-1;  // 33 bits, so that n * kLn2High is exact
  constexpr double kLn2Low = 0x1.473de6af278edp-34;
  constexpr double kRound = 0x1.8p+52;
  const double high = x > 710.0 ? 710.0 : x;
  const double clamped = high < -746.0 ? -746.0 : high;
  const double shifted = clamped * kLog2E + kRound;
  const uint64_t n = std::bit_cast<uint64_t>(shifted) - std::bit_cast<uint64_t>(kRound);
  const double rounded = shifted - kRound;
  const double r = (clamped - rounded * kLn2High) - rounded * kLn2Low;
  double p = 0x1.af38d53857513p-26;  // (e^r - 1 - r) / r^2 through its values at Chebyshev points
  p = p * r + 0x1.2891a8c1d838dp-22;
  p = p * r + 0x1.71de0d9c145d0p-19;
  p = p * r + 0x1.a019b8ef67c6cp-16;
  p = p * r + 0x1.a01a01a7c8d47p-13;
  p = p * r + 0x1.6c16c17893833p-10;
  p = p * r + 0x1.11111111109adp-7;
  p = p * r + 0x1.5555555553d4fp-5;
  p = p * r + 0x1.5555555555556p-3;
  p = p * r + 0x1.0000000000001p-1;
  p = p * (r * r) + r + 1.0;
  // 2^n in two factors. n / 2 of a number made positive: many machines shift no negative ones.
  const uint64_t half = ((n + 2048u) >> 1) - 1024u;
  const double first = std::bit_cast<double>((half + 1023u) << 52);
  const double second = std::bit_cast<double>((n - half + 1023u) << 52);
  return p * first * second;
}

/// log x of a positive normal number, within 3 units in the last place; nothing is promised for
/// others. With x = 2^n m, m in [sqrt(1/2), sqrt(2)), and s = (m-1)/(m+1): log m = 2 artanh s.
PERSEID_INLINE float log_of(float x) {
  constexpr uint32_t kRootHalf = 0x3F3504F3u;  // bits of sqrt(1/2)
  const uint32_t bits = std::bit_cast<uint32_t>(x) - kRootHalf;
  const auto n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float m = std::bit_cast<float>((bits & 0x007FFFFFu) + kRootHalf);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float q = s * s;
  float p = 0.2222222222f;
  p = p * q + 0.2857142857f;
  p = p * q + 0.4f;
  p = p * q + 0.6666666667f;
  const float fraction = 2.0f * s + s * (q * p);
  return n * 0.693145751953125f + (n * 1.42860682030941723e-6f + fraction);
}
PERSEID_INLINE double log_of(double x) { return std::log(x); }

PERSEID_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }
PERSEID_INLINE double sigmoid(double x) { return 1.0 / (1.0 + exp_of(-x)); }

/// log(1 + t) / t for t in [0, 1], 1 at t = 0: the series of 2 atanh(t / (2 + t)).
PERSEID_INLINE float log1p_ratio(float t) {
  const float u = t / (2.0f + t);
  const float v = u * u;
  float p = 0.06666667f;
  p = p * v + 0.07692308f;
  p = p * v + 0.09090909f;
  p = p * v + 0.11111111f;
  p = p * v + 0.14285715f;
  p = p * v + 0.2f;
  p = p * v + 0.33333334f;
  p = p * v + 1.0f;
  return (1.0f - u) * p;
}
PERSEID_INLINE double log1p_ratio(double t) { return t > 0.0 ? std::log1p(t) / t : 1.0 - t; }

/// s = sqrt(softplus(z)) with its slopes.
template <typename A>
struct SqrtSoftplus {
  A score;
  A slope;      ///< ds/dz = sigmoid(z) / (2 s)
  A log_slope;  ///< d(log s)/dz
};

/// With h = e^(-|z|/2) and t = h^2 = e^-|z|: softplus is z + log(1 + t) or, below 0, log(1 + t), so
/// that h is a factor of s there. No term underflows before s does.
template <typename A>
PERSEID_INLINE SqrtSoftplus<A> sqrt_softplus(A z) {
  const A h = exp_of(A{-0.5} * (z > A{0} ? z : -z));
  const A t = h * h;
  const A ratio = log1p_ratio(t);
  const A inner = z > A{0} ? z + t * ratio : ratio;
  const A factor = z > A{0} ? A{1} : h;
  const A root = std::sqrt(inner);
  const A rate = A{0.5} / (A{1} + t);
  return {factor * root, factor * rate / root, rate / inner};
}

/// Distribution function and density of the standard normal distribution at one point.
template <typename A>
struct Normal {
  A cdf;
  A density;
};

/// cdf(-a) = e^(-a^2/2) t P(t) with t = 1/(1 + 0.32 a): P is a Chebyshev fit, good to 6e-8
/// relative, so the lower tail keeps its relative accuracy; 1 - cdf(-a) gives the upper half.
PERSEID_INLINE Normal<float> normal(float x) {
  const float a = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu);
  const float e = exp_of(-0.5f * (x * x));
  const float t = 1.0f / (1.0f + 0.32f * a);
  float p = -0.021623132350305243f;
  p = p * t + 0.09793521525111828f;
  p = p * t - 0.1516076950519903f;
  p = p * t + 0.07046826119133984f;
  p = p * t - 0.012533999182605636f;
  p = p * t + 0.05979932619484442f;
  p = p * t + 0.08759353037422629f;
  p = p * t + 0.11464702820291628f;
  p = p * t + 0.12765991008967922f;
  p = p * t + 0.12766153768853963f;
  const float tail = e * (t * p);
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.3989422804014327f};
}
PERSEID_INLINE Normal<double> normal(double x) {
  return {0.5 * std::erfc(-x * 0.70710678118654752440),
          std::exp(-0.5 * x * x) * 0.3989422804014327};
}

}  // namespace perseid::kernels
