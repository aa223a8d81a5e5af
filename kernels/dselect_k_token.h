#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/dselect_k.h"
#include "kernels/smooth_step.h"
#include "kernels/smooth_step_token.h"

// One token's selectors: what forward and backward of DSelect-k share. Private to this folder.

namespace perseid::kernels {

/// Keeps the penalty finite.
inline constexpr double kPenaltyEpsilon = 1e-6;

/// Working memory of one thread for one token.
template <typename T>
struct DSelectKScratch {
  explicit DSelectKScratch(const DSelectKShape& shape)
      : num_experts(shape.num_experts),
        num_selectors(shape.num_selectors),
        num_bits(dselect_k_bits(shape.num_experts)),
        num_codes(int64_t{1} << num_bits) {
    const auto buffer = [](std::vector<T>& values, int64_t count) {
      values.resize(static_cast<size_t>(count));
    };
    for (auto* values : {&one, &zero, &slope}) buffer(*values, num_selectors * num_bits);
    for (auto* values : {&alpha, &mass, &alpha_grad}) buffer(*values, num_selectors);
    for (auto* values : {&merged, &grad}) buffer(*values, num_experts);
    buffer(products, num_selectors * 2 * num_codes);
    buffer(code_grad, num_codes);
    largest.resize(static_cast<size_t>(num_selectors));
  }
  /// r [E] of one selector, or of every code [2^bits].
  T* reach(int64_t i) { return products.data() + (2 * i + 1) * num_codes; }
  const T* reach(int64_t i) const { return products.data() + (2 * i + 1) * num_codes; }

  int64_t num_experts, num_selectors, num_bits, num_codes;
  std::vector<T> one, zero, slope;  ///< [K, bits] S, 1 - S and S' of the switches
  /// [K, 2 * 2^bits] of each selector, elements 2^n .. 2^(n+1)-1: products of the shares of the
  /// last n bits of a code, by their number. The last level is r.
  std::vector<T> products;
  std::vector<T> alpha;          ///< [K] softmax of omega
  std::vector<T> mass;           ///< [K] sum of r over the experts
  std::vector<int64_t> largest;  ///< [K] with hard_eval: expert of the largest r, -1 if all are 0
  std::vector<T> merged;         ///< [E] g before it is renormalised; then, in the backward with a
                                 ///< map, `grad` by the codes of one selector
  std::vector<T> grad;           ///< [E] dL/d(merged)
  std::vector<T> alpha_grad;     ///< [K] dL/d(alpha)
  std::vector<T> code_grad;      ///< [2^bits] dL/dr of one selector
};

struct SelectorFacts {
  bool has_nan;
  bool is_non_finite;
  int64_t saturated;  ///< switches
};

/// Switches and facts of a row of logits.
template <typename T>
PERSEID_INLINE SelectorFacts read_selectors(const T* logits, T gamma, DSelectKScratch<T>& scratch) {
  constexpr T kMax = std::numeric_limits<T>::max();
  const int64_t num_switches = scratch.num_selectors * scratch.num_bits;
  T* const one = scratch.one.data();
  T* const zero = scratch.zero.data();
  T* const slope = scratch.slope.data();
  int32_t nans = 0, non_finite = 0, saturated = 0;
#pragma omp simd reduction(+ : nans, non_finite, saturated)
  for (int64_t i = 0; i < num_switches; ++i) {
    const T z = logits[i];
    const SmoothStep<T> step = smooth_step(z, gamma);
    one[i] = step.value;
    zero[i] = step.complement;
    slope[i] = step.slope;
    nans += z != z ? 1 : 0;
    non_finite += std::abs(z) <= kMax ? 0 : 1;
    saturated += step.slope == T{0} ? 1 : 0;
  }
  for (int64_t i = 0; i < scratch.num_selectors; ++i) {
    const T omega = logits[num_switches + i];
    nans += omega != omega ? 1 : 0;
    non_finite += std::abs(omega) <= kMax ? 0 : 1;
  }
  return {nans > 0, non_finite > 0, saturated};
}

/// r of every selector, from the last bit to the first: each bit doubles the products. Then the
/// mass on the experts.
template <typename T>
PERSEID_INLINE void reach_experts(DSelectKScratch<T>& scratch) {
  const int64_t E = scratch.num_experts, bits = scratch.num_bits;
  for (int64_t i = 0; i < scratch.num_selectors; ++i) {
    T* const products = scratch.products.data() + 2 * i * scratch.num_codes;
    products[1] = T{1};
    for (int64_t n = 0; n < bits; ++n) {
      const int64_t count = int64_t{1} << n;
      const T* const lower = products + count;
      T* const next = products + 2 * count;
      const T one = scratch.one[i * bits + bits - 1 - n];
      const T zero = scratch.zero[i * bits + bits - 1 - n];
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) {
        next[c] = lower[c] * zero;
        next[count + c] = lower[c] * one;
      }
    }
    T* const r = scratch.reach(i);
    T mass = 0;
#pragma omp simd reduction(+ : mass)
    for (int64_t j = 0; j < E; ++j) {
      r[j] = without_subnormal(r[j]);
      mass += r[j];
    }
    scratch.mass[i] = mass;
  }
}

/// alpha = softmax(omega); false if the largest omega is infinite: then it has no gradient.
template <typename T>
PERSEID_INLINE bool share_selectors(const T* omega, DSelectKScratch<T>& scratch) {
  const int64_t K = scratch.num_selectors;
  const T max = *std::max_element(omega, omega + K);
  T sum = 0;
  for (int64_t i = 0; i < K; ++i) {
    scratch.alpha[i] = share_of_max(omega[i], max);
    sum += scratch.alpha[i];
  }
  for (int64_t i = 0; i < K; ++i) scratch.alpha[i] /= sum;
  return std::isfinite(max);
}

/// Weights before they are renormalised; returns what to divide them by.
/// @param expert_map  [K, E] or null
template <typename T>
PERSEID_INLINE T merge_selectors(const DSelectKOptions& options, const int32_t* expert_map,
                                 DSelectKScratch<T>& scratch) {
  const int64_t E = scratch.num_experts;
  T* const merged = scratch.merged.data();
  std::fill_n(merged, E, T{0});
  for (int64_t i = 0; i < scratch.num_selectors; ++i) {
    const T* const r = scratch.reach(i);
    const T alpha = scratch.alpha[i];
    const int32_t* const map = expert_map == nullptr ? nullptr : expert_map + i * E;
    if (options.hard_eval) {
      const int64_t largest = std::max_element(r, r + E) - r;
      const int64_t expert = map == nullptr ? largest : map[largest];
      scratch.largest[i] = r[largest] > T{0} ? expert : -1;
      if (r[largest] > T{0}) merged[expert] += alpha;
      continue;
    }
    if (map != nullptr) {
      for (int64_t j = 0; j < E; ++j) merged[map[j]] += alpha * r[j];
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < E; ++j) merged[j] += alpha * r[j];
  }
  if (!options.renormalize) return T{1};
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < E; ++j) sum += merged[j];
  return sum > T{0} ? sum : T{1};
}

/// Checks shape, options and buffers of both directions; throws ConfigError.
void check_dselect_k(const char* operation, const DSelectKShape& shape,
                     const DSelectKOptions& options, const DSelectKInput& input);
void check_dselect_k_grad(const char* operation, const DSelectKShape& shape,
                          const DSelectKGradInput& grad, const void* grad_logits);

}  // namespace perseid::kernels
