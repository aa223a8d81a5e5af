#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/comet.h"
#include "kernels/math.h"
#include "kernels/simd.h"
#include "kernels/smooth_step.h"
#include "kernels/smooth_step_token.h"

// One token's trees: what forward and backward of COMET share. Private to this folder.

namespace perseid::kernels {

/// Leaves on the lowest level of the heap, its last nodes. A depth-first walk meets them first and
/// then those of the level above, nodes E-1 and following: its order is a rotation of the heap's.
inline int64_t lowest_leaves(int64_t num_experts) {
  int64_t first = 0;  // of the lowest level that has nodes
  while (2 * first + 1 <= 2 * num_experts - 2) first = 2 * first + 1;
  return std::min(2 * num_experts - 1 - first, num_experts);
}

/// Working memory of one thread for one token.
template <typename T>
struct CometScratch {
  explicit CometScratch(const CometShape& shape)
      : num_experts(shape.num_experts),
        num_splits(shape.num_trees * (shape.num_experts - 1)),
        num_leaves(shape.num_trees * shape.num_experts),
        num_lowest(lowest_leaves(shape.num_experts)) {
    const auto buffer = [](std::vector<T>& values, int64_t count) {
      values.resize(static_cast<size_t>(count));
    };
    for (auto* values : {&go_left, &go_right, &slope}) buffer(*values, num_splits);
    for (auto* values : {&reach, &node_grad}) buffer(*values, num_splits + num_leaves);
    for (auto* values : {&leaf_reach, &factor, &leaf_grad}) buffer(*values, num_leaves);
    for (auto* values : {&merged, &grad}) buffer(*values, num_experts);
  }
  int64_t num_experts, num_splits, num_leaves, num_lowest;
  std::vector<T> go_left, go_right, slope;  ///< [K, E-1] of the switches
  std::vector<T> reach;                     ///< [K, 2E-1] by node
  std::vector<T> leaf_reach;                ///< [K, E] v in the order of leaves
  std::vector<T> factor;                    ///< [K, E] e^(a - amax) where v > 0, else 0
  std::vector<T> merged;                    ///< [E] g * Z
  std::vector<T> node_grad, leaf_grad;      ///< [K, 2E-1], [K, E] dL/d(reach)
  std::vector<T> grad;                      ///< [E] dL/dg where it may be read, else 0
};

struct SwitchFacts {
  bool has_nan;
  bool is_non_finite;
};

template <typename T>
PERSEID_INLINE SwitchFacts read_switches(const T* split_logits, const T* leaf_logits, T gamma,
                                         CometScratch<T>& scratch) {
  constexpr T kMax = std::numeric_limits<T>::max();
  T* const left = scratch.go_left.data();
  T* const right = scratch.go_right.data();
  T* const slope = scratch.slope.data();
  int32_t nans = 0, non_finite = 0;
#pragma omp simd reduction(+ : nans, non_finite)
  for (int64_t i = 0; i < scratch.num_splits; ++i) {
    const T z = split_logits[i];
    const SmoothStep<T> step = smooth_step(z, gamma);
    left[i] = step.value;
    right[i] = step.complement;
    slope[i] = step.slope;
    nans += z != z ? 1 : 0;
    non_finite += std::abs(z) <= kMax ? 0 : 1;
  }
#pragma omp simd reduction(+ : nans, non_finite)
  for (int64_t i = 0; i < scratch.num_leaves; ++i) {
    const T a = leaf_logits[i];
    nans += a != a ? 1 : 0;
    non_finite += std::abs(a) <= kMax ? 0 : 1;
  }
  return {nans > 0, non_finite > 0};
}

struct NodeCounts {
  int64_t reached;
  int64_t saturated;  ///< of these
};

/// Top-down, level by level: reach of every node, then v of the leaves in their order. Counts
/// the split nodes that are reached.
template <typename T>
PERSEID_INLINE NodeCounts reach_leaves(CometScratch<T>& scratch) {
  constexpr T kSmallest = std::numeric_limits<T>::min();
  const int64_t E = scratch.num_experts;
  const int64_t num_trees = scratch.num_leaves / E;
  int32_t num_reached = 0, num_saturated = 0;
  for (int64_t i = 0; i < num_trees; ++i) {
    T* const reach = scratch.reach.data() + i * (2 * E - 1);
    const T* const left = scratch.go_left.data() + i * (E - 1);
    const T* const right = scratch.go_right.data() + i * (E - 1);
    const T* const slope = scratch.slope.data() + i * (E - 1);
    reach[0] = T{1};
    for (int64_t first = 0; first < E - 1; first = 2 * first + 1) {
      const int64_t end = std::min(2 * first + 1, E - 1);
#pragma omp simd reduction(+ : num_reached, num_saturated)
      for (int64_t q = first; q < end; ++q) {
        const int32_t is_reached = reach[q] < kSmallest ? 0 : 1;
        num_reached += is_reached;
        num_saturated += slope[q] == T{0} ? is_reached : 0;
        reach[2 * q + 1] = reach[q] * left[q];
        reach[2 * q + 2] = reach[q] * right[q];
      }
    }
    T* const v = scratch.leaf_reach.data() + i * E;
    const T* const lowest = reach + (2 * E - 1 - scratch.num_lowest);
#pragma omp simd
    for (int64_t l = 0; l < scratch.num_lowest; ++l) v[l] = without_subnormal(lowest[l]);
#pragma omp simd
    for (int64_t l = scratch.num_lowest; l < E; ++l) {
      v[l] = without_subnormal(reach[E - 1 + l - scratch.num_lowest]);
    }
  }
  return {num_reached, num_saturated};
}

/// Each tree's v becomes one-hot on its largest, equal ones on the smaller leaf.
template <typename T>
PERSEID_INLINE void harden(CometScratch<T>& scratch) {
  const int64_t E = scratch.num_experts;
  for (int64_t first = 0; first < scratch.num_leaves; first += E) {
    T* const v = scratch.leaf_reach.data() + first;
    const int64_t largest = std::max_element(v, v + E) - v;
    std::fill_n(v, E, T{0});
    v[largest] = T{1};
  }
}

template <typename T>
struct Softmax {
  T max;  ///< amax
  T sum;  ///< Z > 0
};

/// The joint softmax: factors of the leaves, and merged weights times Z.
template <typename T>
PERSEID_INLINE Softmax<T> merge_leaves(const T* leaf_logits, const int32_t* expert_map,
                                       CometScratch<T>& scratch) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const int64_t E = scratch.num_experts;
  const T* const v = scratch.leaf_reach.data();
  T* const factor = scratch.factor.data();
  T* const merged = scratch.merged.data();
  T max = -kInfinity;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < scratch.num_leaves; ++i) {
    const T a = v[i] > T{0} ? leaf_logits[i] : -kInfinity;
    max = a > max ? a : max;
  }
#pragma omp simd
  for (int64_t i = 0; i < scratch.num_leaves; ++i) {
    const T a = leaf_logits[i];
    const T power = share_of_max(a, max);
    factor[i] = v[i] > T{0} ? power : T{0};
  }
  std::fill_n(merged, E, T{0});
  for (int64_t first = 0; first < scratch.num_leaves; first += E) {
    if (expert_map == nullptr) {
#pragma omp simd
      for (int64_t l = 0; l < E; ++l) merged[l] += factor[first + l] * v[first + l];
    } else {
      for (int64_t l = 0; l < E; ++l) {
        merged[expert_map[first + l]] += factor[first + l] * v[first + l];
      }
    }
  }
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t m = 0; m < E; ++m) sum += merged[m];
  return {max, sum};
}

/// Checks shape, options and buffers of both directions; throws ConfigError.
void check_comet(const char* operation, const CometShape& shape, const CometOptions& options,
                 const CometInput& input);
void check_comet_grad(const char* operation, const CometShape& shape, const CometGradInput& grad,
                      const void* grad_split_logits, const void* grad_leaf_logits);

}  // namespace perseid::kernels
