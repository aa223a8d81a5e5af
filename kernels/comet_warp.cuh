#pragma once
#include <cmath>
#include <limits>

#include "kernels/comet_trees.h"
#include "kernels/token_warp.cuh"

// One token's trees in a warp: what both directions of COMET on CUDA share. Private to this folder.

namespace perseid::kernels {

/// A call, and where the nodes of a token's trees are: [K, 2E-1] in heap order. Leaves are kept in
/// their nodes. Nothing is written of a switch, which is formed again where it is needed.
template <typename T>
struct CometCall {
  const T* split_logits;
  const T* leaf_logits;
  const int32_t* expert_map;  ///< or null
  const uint8_t* valid;       ///< or null
  T gamma, min_weight;
  int num_experts, num_trees;
  int num_levels;  ///< that hold split nodes
  int num_lowest;
  bool is_hard;

  CometCall(const CometShape& shape, const CometOptions& options, const CometInput& input)
      : split_logits(static_cast<const T*>(input.split_logits)),
        leaf_logits(static_cast<const T*>(input.leaf_logits)),
        expert_map(input.expert_map),
        valid(input.valid),
        gamma(static_cast<T>(options.gamma)),
        min_weight(static_cast<T>(options.min_weight)),
        num_experts(static_cast<int>(shape.num_experts)),
        num_trees(static_cast<int>(shape.num_trees)),
        num_levels(std::bit_width(static_cast<uint64_t>(shape.num_experts - 1))),
        num_lowest(static_cast<int>(lowest_leaves(shape.num_experts))),
        is_hard(options.hard_eval) {}
  /// Of memory for a token: the nodes and a table of E.
  int64_t elements() const {
    return int64_t{num_trees} * (2 * int64_t{num_experts} - 1) + num_experts;
  }

  __device__ __forceinline__ bool is_valid(int64_t t) const {
    return valid == nullptr || valid[t] != 0;
  }
  __device__ __forceinline__ int num_splits() const { return num_trees * (num_experts - 1); }
  __device__ __forceinline__ int num_leaves() const { return num_trees * num_experts; }
  __device__ __forceinline__ const T* splits_of(int64_t t) const {
    return split_logits + t * num_splits();
  }
  __device__ __forceinline__ const T* leaves_of(int64_t t) const {
    return leaf_logits + t * num_leaves();
  }
  __device__ __forceinline__ T* tree(T* nodes, int i) const {
    return nodes + i * (2 * num_experts - 1);
  }
  /// Node of a leaf: the order of leaves is a rotation of the heap's.
  __device__ __forceinline__ int leaf_node(int l) const {
    return l < num_lowest ? 2 * num_experts - 1 - num_lowest + l : num_experts - 1 + l - num_lowest;
  }

  __device__ __forceinline__ SwitchFacts read_logits(int64_t t) const {
    constexpr T kMax = std::numeric_limits<T>::max();
    bool has_nan = false, is_non_finite = false;
    const auto look_at = [&](const T* values, int count) {
      for (int i = TokenWarp::lane(); i < count; i += kWarpSize) {
        has_nan |= values[i] != values[i];
        is_non_finite |= !(std::abs(values[i]) <= kMax);
      }
    };
    look_at(splits_of(t), num_splits());
    look_at(leaves_of(t), num_leaves());
    return {TokenWarp::any(has_nan), TokenWarp::any(is_non_finite)};
  }

  /// body(tree i, split node q) for the split nodes of one level of all trees.
  template <typename Body>
  __device__ __forceinline__ void for_each_node(int level, const Body& body) const {
    const int width = 1 << level;  // the lowest level may have fewer
    PERSEID_ROLLED
    for (int n = TokenWarp::lane(); n < num_trees << level; n += kWarpSize) {
      const int q = width - 1 + (n & (width - 1));
      if (q < num_experts - 1) body(n >> level, q);
    }
    TokenWarp::sync();
  }

  /// Reach of every node, that of a leaf not yet without subnormal numbers. Counts of this lane.
  __device__ __forceinline__ NodeCounts reach_nodes(int64_t t, T* nodes) const {
    const T* const z = splits_of(t);
    int reached = 0, saturated = 0;
    for (int i = TokenWarp::lane(); i < num_trees; i += kWarpSize) tree(nodes, i)[0] = T{1};
    TokenWarp::sync();
    for (int level = 0; level < num_levels; ++level) {
      for_each_node(level, [&](int i, int q) {
        T* const node = tree(nodes, i);
        const SmoothStep<T> step = smooth_step(z[i * (num_experts - 1) + q], gamma);
        const T reach = node[q];
        const int is_reached = reach < std::numeric_limits<T>::min() ? 0 : 1;
        reached += is_reached;
        saturated += step.slope == T{0} ? is_reached : 0;
        node[2 * q + 1] = reach * step.value;
        node[2 * q + 2] = reach * step.complement;
      });
    }
    return {reached, saturated};
  }

  /// First of the leaves of tree i with the largest v.
  __device__ __forceinline__ int largest_leaf(const T* node) const {
    LargestOfWarp<T> largest;
    for (int l = TokenWarp::lane(); l < num_experts; l += kWarpSize) {
      largest.add(without_subnormal(node[leaf_node(l)]), l);
    }
    largest.join();
    return largest.index;
  }
};

/// e^(a - amax) of a leaf with v > 0, else 0.
template <typename T>
__device__ __forceinline__ T leaf_factor(T v, T a, T max) {
  return v > T{0} ? share_of_max(a, max) : T{0};
}

}  // namespace perseid::kernels
