#pragma once
#include <cmath>
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/random.h"
#include "kernels/simd.h"

// One element of fill_uniform and fill_normal, for every device. Private to this folder.

namespace perseid::kernels {

PERSEID_INLINE void store_once(double* p, double x) { *p = x; }
PERSEID_INLINE void store_once(float* p, double x) { *p = static_cast<float>(x); }

/// Rounding to float first may land on a tie that the double was not. Round to odd instead: then
/// the second rounding sees whether anything was cut off.
template <typename T>
PERSEID_INLINE void store_once(T* p, double x) {
  float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) != x) {
    uint32_t bits = std::bit_cast<uint32_t>(nearest);
    if (std::abs(static_cast<double>(nearest)) > std::abs(x)) --bits;  // now cut off towards 0
    nearest = std::bit_cast<float>(bits | 1u);
  }
  store(p, nearest);
}

struct UniformRange {
  double low, high;
};
PERSEID_INLINE double uniform_element(const UniformRange& range, RandomKey key, uint64_t counter) {
  return range.low + (range.high - range.low) * random_uniform(key, counter);
}

/// Normal numbers `first` (even) and first + 1 of a key are radius times cosine and sine of 2 pi
/// turn.
struct NormalPoint {
  double radius;
  double turn;  ///< in [0, 1)
};
PERSEID_INLINE NormalPoint normal_point(RandomKey key, uint64_t first) {
  // 1 - u is in (0, 1]: its logarithm is finite.
  return {std::sqrt(-2.0 * std::log(1.0 - random_uniform(key, first))),
          random_uniform(key, first + 1)};
}
inline constexpr double kTwoPi = 6.28318530717958647692;

}  // namespace perseid::kernels
