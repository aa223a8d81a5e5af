// comet: one warp a token, its trees level by level with the nodes of a level on the lanes. Reads
// T*K*(2E-1) logits, again from the first-level cache where they are needed again, and writes T*E
// weights. Memory of a token: K*(2E-1) + E values, in shared memory up to 40 KB. Sums in the type
// of the logits, over tokens in double, all in a fixed order. Limit: 2^31 - 1 values of a token.
#include "kernels/comet_warp.cuh"
#include "kernels/cuda_launchers.h"
#include "kernels/expert_chain.cuh"

namespace perseid::kernels {
namespace {

template <typename T>
struct Forward {
  using Element = T;
  static constexpr bool kHasSums = true;
  CometCall<T> call;
  const int32_t* chain;  ///< of leaves, see expert_chain_kernel; null without a map
  T* weights;
  bool needs_entropy;

  __device__ TokenSums operator()(int64_t t, T* nodes) const {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    const int E = call.num_experts, lane = TokenWarp::lane();
    T* const row = weights == nullptr ? nullptr : weights + t * E;
    TokenSums sums;
    if (!call.is_valid(t)) {
      for (int m = lane; row != nullptr && m < E; m += kWarpSize) row[m] = T{0};
      return sums;
    }
    const SwitchFacts facts = call.read_logits(t);
    sums.of[kNonFinite] = facts.is_non_finite ? 1 : 0;
    if (facts.has_nan) {
      sums.of[kEntropy] = sums.of[kRemoved] = static_cast<double>(kNaN);
      for (int m = lane; row != nullptr && m < E; m += kWarpSize) {
        row[m] = m < call.num_trees ? kNaN : T{0};
      }
      return sums;
    }
    const NodeCounts counts = call.reach_nodes(t, nodes);
    sums.of[kSwitches] = TokenWarp::sum(static_cast<int>(counts.reached));
    sums.of[kSaturated] = TokenWarp::sum(static_cast<int>(counts.saturated));
    T entropy = 0, max = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < call.num_trees; ++i) finish_leaves(t, i, nodes, entropy, max);
    if (needs_entropy) sums.of[kEntropy] = -static_cast<double>(TokenWarp::sum(entropy));
    if (row == nullptr) return sums;
    max = TokenWarp::max(max);
    TokenWarp::sync();  // a chain leads to leaves of other lanes
    sums.of[kRemoved] = write_weights(merge(t, nodes, max), nodes, row);
    return sums;
  }

  /// v of one tree in place of the reach of its leaves, and what it adds to entropy and amax.
  __device__ __forceinline__ void finish_leaves(int64_t t, int i, T* nodes, T& entropy,
                                                T& max) const {
    const int E = call.num_experts;
    const T* const a = call.leaves_of(t) + i * E;
    T* const node = call.tree(nodes, i);
    const int largest = call.is_hard ? call.largest_leaf(node) : 0;
    PERSEID_ROLLED
    for (int l = TokenWarp::lane(); l < E; l += kWarpSize) {
      T& at = node[call.leaf_node(l)];
      T v = without_subnormal(at);
      if (needs_entropy) entropy += v * log_of(v + static_cast<T>(kEntropyEpsilon));
      if (call.is_hard) v = l == largest ? T{1} : T{0};
      at = v;
      if (v > T{0} && a[l] > max) max = a[l];
    }
  }

  /// g * Z of each expert into the table behind the nodes; returns Z.
  __device__ __forceinline__ T merge(int64_t t, T* nodes, T max) const {
    const int E = call.num_experts, num_leaves = call.num_leaves();
    const T* const a = call.leaves_of(t);
    T* const table = call.tree(nodes, call.num_trees);
    const auto weight_of = [&](int i, int l) {
      const T v = call.tree(nodes, i)[call.leaf_node(l)];
      return leaf_factor(v, a[i * E + l], max) * v;
    };
    T total = 0;
    PERSEID_ROLLED
    for (int m = TokenWarp::lane(); m < E; m += kWarpSize) {
      T sum = 0;
      if (chain == nullptr) {
        for (int i = 0; i < call.num_trees; ++i) sum += weight_of(i, m);
      } else {
        for (int leaf = chain[m]; leaf < num_leaves; leaf = chain[E + leaf]) {
          sum += weight_of(leaf / E, leaf % E);
        }
      }
      table[m] = sum;
      total += sum;
    }
    return TokenWarp::sum(total);
  }

  /// Returns the weights that were removed.
  __device__ __forceinline__ double write_weights(T divisor, T* nodes, T* row) const {
    const T* const table = call.tree(nodes, call.num_trees);
    double removed = 0;
    PERSEID_ROLLED
    for (int m = TokenWarp::lane(); m < call.num_experts; m += kWarpSize) {
      const T g = table[m] / divisor;
      const bool is_removed = g < call.min_weight;
      row[m] = is_removed ? T{0} : g;
      removed += is_removed ? static_cast<double>(g) : 0.0;
    }
    return TokenWarp::sum(removed);
  }
};

}  // namespace

void cuda::comet(const CometShape& shape, const CometOptions& options, DType dtype,
                 const CometInput& input, const CometOutput& output, const Stream& stream) {
  DeviceMemory chain;
  dispatch_float_dtype(dtype, "comet", [&](auto tag) {
    using T = decltype(tag);
    const CometCall<T> call(shape, options, input);
    if (input.expert_map != nullptr && output.weights != nullptr && shape.num_tokens > 0) {
      chain = expert_chain("comet", input.expert_map, call.num_trees, call.num_experts, stream);
    }
    const TokenSumTargets targets{
        {output.entropy_sum, nullptr, output.removed_weight},
        {output.reached_nodes, output.saturated_nodes, output.non_finite_tokens}};
    for_each_token("comet",
                   Forward<T>{call, chain.as<int32_t>(), static_cast<T*>(output.weights),
                              output.entropy_sum != nullptr},
                   shape.num_tokens, call.elements(), targets, stream);
  });
}

}  // namespace perseid::kernels
