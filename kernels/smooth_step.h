#pragma once
#include "kernels/simd.h"

// The cubic smooth-step function (Hazimeh et al. 2020, "The Tree Ensemble Layer"): the
// differentiable switch of COMET and DSelect-k. It reaches 0 and 1 exactly, so what it switches off
// costs nothing.

namespace perseid::kernels {

/// S(z) for a width `gamma` > 0: 0 for z <= -gamma/2, 1 for z >= gamma/2, cubic and increasing
/// between, S(-z) = 1 - S(z). A NaN in z is a NaN in all three.
template <typename T>
struct SmoothStep {
  T value;       ///< S
  T complement;  ///< 1 - S without cancellation, exactly 0 where S is 1
  T slope;       ///< dS/dz, exactly 0 at and beyond +-gamma/2
};

/// In u = clamp(z/gamma + 1/2, 0, 1), which needs no power of gamma: S = u^2 (3 - 2u),
/// 1 - S = (1-u)^2 (1 + 2u), S' = 6 u (1-u) / gamma.
template <typename T>
PERSEID_INLINE SmoothStep<T> smooth_step(T z, T gamma) {
  T u = z / gamma + T(0.5);
  u = u < T(0) ? T(0) : u;  // comparisons with a NaN are false and leave it
  u = u > T(1) ? T(1) : u;
  const T v = T(1) - u;
  return {u * u * (T(3) - T(2) * u), v * v * (T(1) + T(2) * u), T(6) * u * v / gamma};
}

}  // namespace perseid::kernels
