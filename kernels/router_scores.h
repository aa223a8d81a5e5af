#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/ordered_key.h"
#include "kernels/router_math.h"

// Scores of one row of logits, in loops that vectorise. Rows have whole lanes and a finite maximum;
// padding is -inf. Private to this folder.

namespace perseid::kernels {

/// e^(z - shift), and their sum.
template <typename T>
PERSEID_INLINE T exp_row(const T* z, T shift, int64_t count, T* exps) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < count; ++e) {
    exps[e] = exp_of(z[e] - shift);
    sum += exps[e];
  }
  return sum;
}

/// Scores that are functions of their own logit alone: all but the softmax.
template <typename T>
PERSEID_INLINE void score_row(ScoreFunction score_function, const T* z, int64_t count, T* scores) {
  if (score_function == ScoreFunction::kSigmoid) {
#pragma omp simd
    for (int64_t e = 0; e < count; ++e) scores[e] = sigmoid(z[e]);
  } else {
#pragma omp simd
    for (int64_t e = 0; e < count; ++e) scores[e] = sqrt_softplus(z[e]).score;
  }
}

/// Shares s / (sum of s) of such scores, not yet divided by their sum, which is returned.
template <typename T>
PERSEID_INLINE T share_row(ScoreFunction score_function, const T* z, T max, int64_t count,
                           T* shares) {
  const T c = share_shift(max);
  T sum = 0;
  if (score_function == ScoreFunction::kSigmoid) {
    const T floor = exp_of(-c);
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < count; ++e) {
      shares[e] = sigmoid_share(z[e], c, floor);
      sum += shares[e];
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < count; ++e) {
      shares[e] = sqrt_softplus_share(z[e], c);
      sum += shares[e];
    }
  }
  return sum;
}

template <typename T>
PERSEID_INLINE void add_shares(const T* shares, T scale, int64_t count, double* sum) {
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) sum[e] += static_cast<double>(shares[e] * scale);
}

/// Keys of score + bias; an expert whose logit is -inf stays last.
template <typename T>
PERSEID_INLINE void biased_keys(const T* z, const T* scores, T scale, const float* bias,
                                int64_t num_experts, SignedKey<T>* keys) {
#pragma omp simd
  for (int64_t e = 0; e < num_experts; ++e) keys[e] = biased_key(z[e], scores[e] * scale, bias[e]);
}

/// -sum of w log w over the positive and finite ones.
template <typename T>
PERSEID_INLINE T entropy_of(const T* weights, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) sum += entropy_term(weights[k]);
  return sum;
}

}  // namespace perseid::kernels
