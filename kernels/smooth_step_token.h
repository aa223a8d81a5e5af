#pragma once
#include <cstdint>
#include <limits>

#include "kernels/math.h"
#include "kernels/simd.h"

// Pieces of one token that gates of smooth-step switches share. Private to this folder.

namespace perseid::kernels {

/// Keeps the logarithm of the entropy finite.
inline constexpr double kEntropyEpsilon = 1e-6;

/// A product of shares, 0 below the smallest normal number.
template <typename T>
PERSEID_INLINE T without_subnormal(T reach) {
  return reach < std::numeric_limits<T>::min() ? T{0} : reach;
}

/// e^(logit - max), of which the sum over a softmax's terms is at least 1. Logits may be infinite:
/// inf - inf is not used.
template <typename T>
PERSEID_INLINE T share_of_max(T logit, T max) {
  return logit == max ? T{1} : exp_of(logit - max);
}

/// Sum of -v log(v + epsilon).
template <typename T>
PERSEID_INLINE T switch_entropy(const T* v, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += v[i] * log_of(v[i] + static_cast<T>(kEntropyEpsilon));
  return -sum;
}

/// Its derivative with respect to one v.
template <typename T>
PERSEID_INLINE T entropy_slope(T v) {
  const T shifted = v + static_cast<T>(kEntropyEpsilon);
  return -log_of(shifted) - v / shifted;
}

/// weights = merged / divisor, 0 below min_weight; returns what that removed.
template <typename T>
PERSEID_INLINE double write_weights(const T* merged, T divisor, T min_weight, int64_t num_experts,
                                    T* weights) {
  double removed = 0;
#pragma omp simd reduction(+ : removed)
  for (int64_t m = 0; m < num_experts; ++m) {
    const T g = merged[m] / divisor;
    const T cut = g < min_weight ? g : T{0};
    weights[m] = g < min_weight ? T{0} : g;
    removed += static_cast<double>(cut);
  }
  return removed;
}

/// grad = dL/dg where g > 0, else 0; returns sum_m g_m dL/dg_m.
template <typename T>
PERSEID_INLINE T read_gradient(const T* weights, const T* grad_weights, int64_t num_experts,
                               T* grad) {
  T mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t m = 0; m < num_experts; ++m) {
    grad[m] = weights[m] > T{0} ? grad_weights[m] : T{0};
    mean += weights[m] * grad[m];
  }
  return mean;
}

}  // namespace perseid::kernels
