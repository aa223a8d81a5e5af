#pragma once
#include <type_traits>

#include "kernels/activation.h"
#include "kernels/math.h"

// The activations at one point, for CPU and GPU. Private to this folder.

namespace perseid::kernels {

/// f(x) and f'(x). NaN stays NaN: comparisons are written so that it takes the branch that keeps
/// it.
template <typename A>
struct Point {
  A value;
  A slope;
};

template <Activation kActivation, typename A>
PERSEID_INLINE Point<A> evaluate(A x) {
  if constexpr (kActivation == Activation::kIdentity) {
    return {x, A{1}};
  } else if constexpr (kActivation == Activation::kRelu) {
    return {x < A{0} ? A{0} : x, x <= A{0} ? A{0} : A{1}};
  } else if constexpr (kActivation == Activation::kGelu) {
    const Normal<A> at = normal(x);
    return {x * at.cdf, at.cdf + x * at.density};
  } else {
    const A s = sigmoid(x);
    return {x * s, s + x * s * (A{1} - s)};
  }
}

template <Activation kActivation>
using ActivationTag = std::integral_constant<Activation, kActivation>;

}  // namespace perseid::kernels
