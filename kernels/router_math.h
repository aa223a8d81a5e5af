#pragma once
#include <cmath>
#include <limits>

#include "kernels/math.h"
#include "kernels/ordered_key.h"
#include "kernels/router.h"

// Scores of single logits, and the rules of router.h for values that are no numbers, as functions
// that the router's CPU and CUDA versions share. Private to this folder.

namespace perseid::kernels {

/// Score of one logit, by a function of it alone.
template <typename T>
PERSEID_INLINE T score_of(ScoreFunction score_function, T z) {
  return score_function == ScoreFunction::kSigmoid ? sigmoid(z) : sqrt_softplus(z).score;
}

/// What shares of such scores are scaled by: all by e^c, c = max(0, -max z), or its root, so that
/// rows of very negative logits neither underflow nor need a logarithm:
/// e^c / (1 + e^-z) = 1 / (e^-c + e^-(z + c)).
template <typename T>
PERSEID_INLINE T share_shift(T max) {
  return max < T{0} ? -max : T{0};
}
/// @param floor  e^-c
template <typename T>
PERSEID_INLINE T sigmoid_share(T z, T c, T floor) {
  return T{1} / (floor + exp_of(-(z + c)));
}
template <typename T>
PERSEID_INLINE T sqrt_softplus_share(T z, T c) {
  const T t = exp_of(z > T{0} ? -z : z);
  const T ratio = log1p_ratio(t);
  const T inner = z > T{0} ? z + t * ratio : ratio;
  const T shifted = z + c;
  return exp_of(shifted < T{0} ? T{0.5} * shifted : T{0}) * std::sqrt(inner);
}

template <typename T>
PERSEID_INLINE bool is_nan(T x) {
  return x != x;
}
template <typename T>
PERSEID_INLINE bool is_infinite(T x) {
  return x == std::numeric_limits<T>::infinity() || x == -std::numeric_limits<T>::infinity();
}

// `max` below is the largest logit of a row where NaN counts as -inf. Sums of the terms are NaN if
// one of the logits is.

/// e^(z - max) with its limits: several +inf share equally, and so does a row of -inf.
template <typename T>
PERSEID_INLINE T softmax_term(T z, T max) {
  return z == max ? T{1} : exp_of(z - max);  // inf - inf is never formed
}

/// Where this maximum makes the shares of a row a convention, not a function of its logits. The
/// logarithm of the sigmoid is finite at +inf.
template <typename T>
PERSEID_INLINE bool has_share_convention(ScoreFunction score_function, T max) {
  return is_infinite(max) && !(score_function == ScoreFunction::kSigmoid && max > T{0});
}

/// The share of a logit in softmax(log s), not yet divided by the sum of the row.
/// @param c      share_shift(max)
/// @param floor  e^-c
template <typename T>
PERSEID_INLINE T share_term(ScoreFunction score_function, T z, T max, T c, T floor) {
  if (score_function == ScoreFunction::kSoftmax) return softmax_term(z, max);
  if (has_share_convention(score_function, max)) return z == max ? T{1} : is_nan(z) ? z : T{0};
  return score_function == ScoreFunction::kSigmoid ? sigmoid_share(z, c, floor)
                                                   : sqrt_softplus_share(z, c);
}

/// The score of a choice, whose weight is its part of the sum or, for other scores than the softmax
/// without `normalize`, the score itself. Infinite scores share equally and leave 0 to the others.
/// @param max  of the choices or, for the softmax without `normalize`, of all logits
template <typename T>
PERSEID_INLINE T choice_term(ScoreFunction score_function, bool normalize, T z, T max) {
  if (score_function == ScoreFunction::kSoftmax) return softmax_term(z, max);
  const bool is_convention = normalize && score_function == ScoreFunction::kSqrtSoftplus &&
                             max == std::numeric_limits<T>::infinity();
  if (is_convention) return z == max ? T{1} : is_nan(z) ? z : T{0};
  return score_of(score_function, z);
}

/// log of the sum of the e^z, from their maximum and the sum of softmax_term, which is 1 or more.
template <typename T>
PERSEID_INLINE double log_sum_exp_of(T max, T sum) {
  if (is_nan(sum)) return static_cast<double>(sum);
  const auto shift = static_cast<double>(max);
  return is_infinite(max) ? shift : shift + static_cast<double>(log_of(sum));
}

/// Slope of a choice's score at its logit; that of the softmax's term where its maximum stays.
template <typename T>
PERSEID_INLINE T choice_slope(ScoreFunction score_function, T score, T z) {
  if (score_function == ScoreFunction::kSoftmax) return score;
  return score_function == ScoreFunction::kSigmoid ? score * sigmoid(-z) : sqrt_softplus(z).slope;
}
/// Slope of log s of the scores other than the softmax.
template <typename T>
PERSEID_INLINE T log_slope_of(ScoreFunction score_function, T z) {
  return score_function == ScoreFunction::kSigmoid ? sigmoid(-z) : sqrt_softplus(z).log_slope;
}

/// Key of score + bias; an expert whose logit is -inf or NaN stays last.
template <typename T>
PERSEID_INLINE SignedKey<T> biased_key(T z, T score, float bias) {
  const SignedKey<T> key = signed_key(score + static_cast<T>(bias));
  const SignedKey<T> masked = signed_key(-std::numeric_limits<T>::infinity());
  return z >= std::numeric_limits<T>::lowest() ? key : masked;
}

/// -w log w, 0 unless w is positive and finite.
template <typename T>
PERSEID_INLINE T entropy_term(T w) {
  const bool is_positive = w > T{0} && w <= std::numeric_limits<T>::max();
  const T term = w * log_of(is_positive ? w : T{1});
  return is_positive ? -term : T{0};
}

}  // namespace perseid::kernels
