// comet_backward: one warp a token; down the trees for the reach of each node, over the leaves, and
// up again, where dL/d(reach) takes the place of the reach. Reads T*(K*(2E-1) + 2E) values, the
// logits again from the first-level cache, and writes T*K*(2E-1). Memory of a token: K*(2E-1) + E
// values, in shared memory up to 40 KB. Sums in the type of the logits in a fixed order. Limit:
// 2^31 - 1 values of a token.
#include "kernels/comet_warp.cuh"
#include "kernels/cuda_launchers.h"

namespace perseid::kernels {
namespace {

template <typename T>
struct Backward {
  using Element = T;
  static constexpr bool kHasSums = false;
  CometCall<T> call;
  const T* weights;
  const T* grad_weights;           ///< or null
  const double* grad_entropy_sum;  ///< or null
  T* grad_split_logits;
  T* grad_leaf_logits;

  __device__ void operator()(int64_t t, T* nodes) const {
    const bool is_valid = call.is_valid(t);
    if (!is_valid || call.read_logits(t).has_nan) {
      const T value = is_valid ? std::numeric_limits<T>::quiet_NaN() : T{0};
      const auto fill = [&](T* row, int count) {
        for (int i = TokenWarp::lane(); i < count; i += kWarpSize) row[i] = value;
      };
      fill(grad_split_logits + t * call.num_splits(), call.num_splits());
      fill(grad_leaf_logits + t * call.num_leaves(), call.num_leaves());
      return;
    }
    call.reach_nodes(t, nodes);
    T mean = 0;
    Softmax<T> softmax{T{0}, T{1}};
    if (grad_weights != nullptr) {
      mean = read_gradients(t, call.tree(nodes, call.num_trees));
      softmax = join_leaves(t, nodes);
    }
    PERSEID_ROLLED
    for (int i = 0; i < call.num_trees; ++i) grade_leaves(t, i, softmax, mean, nodes);
    TokenWarp::sync();
    grade_splits(t, nodes);
  }

  /// dL/dg where it may be read; returns sum_m g_m dL/dg_m.
  __device__ __forceinline__ T read_gradients(int64_t t, T* grad) const {
    const T* const g = weights + t * call.num_experts;
    const T* const upstream = grad_weights + t * call.num_experts;
    T mean = 0;
    PERSEID_ROLLED
    for (int m = TokenWarp::lane(); m < call.num_experts; m += kWarpSize) {
      grad[m] = g[m] > T{0} ? upstream[m] : T{0};
      mean += g[m] * grad[m];
    }
    TokenWarp::sync();
    return TokenWarp::sum(mean);
  }

  /// body(leaf l, its soft v, its v) for the leaves of tree i.
  template <typename Body>
  __device__ __forceinline__ void for_each_leaf(int i, T* nodes, const Body& body) const {
    const T* const node = call.tree(nodes, i);
    const int largest = call.is_hard && grad_weights != nullptr ? call.largest_leaf(node) : 0;
    PERSEID_ROLLED
    for (int l = TokenWarp::lane(); l < call.num_experts; l += kWarpSize) {
      const T soft = without_subnormal(node[call.leaf_node(l)]);
      body(l, soft, !call.is_hard ? soft : l == largest ? T{1} : T{0});
    }
  }

  __device__ __forceinline__ Softmax<T> join_leaves(int64_t t, T* nodes) const {
    T max = -std::numeric_limits<T>::infinity(), sum = 0;
    PERSEID_ROLLED
    for (int i = 0; i < call.num_trees; ++i) {
      const T* const a = call.leaves_of(t) + i * call.num_experts;
      for_each_leaf(i, nodes, [&](int l, T, T v) { max = v > T{0} && a[l] > max ? a[l] : max; });
    }
    max = TokenWarp::max(max);
    PERSEID_ROLLED
    for (int i = 0; i < call.num_trees; ++i) {
      const T* const a = call.leaves_of(t) + i * call.num_experts;
      for_each_leaf(i, nodes, [&](int l, T, T v) { sum += leaf_factor(v, a[l], max) * v; });
    }
    return {max, TokenWarp::sum(sum)};
  }

  /// grad a of tree i, and dL/dv in place of the reach of its leaves.
  __device__ __forceinline__ void grade_leaves(int64_t t, int i, const Softmax<T>& softmax, T mean,
                                               T* nodes) const {
    const T scale = std::isfinite(softmax.max) ? T{1} / softmax.sum : T{0};
    const T entropy_coeff = grad_entropy_sum == nullptr ? T{0} : static_cast<T>(*grad_entropy_sum);
    const int first = i * call.num_experts;
    const T* const a = call.leaves_of(t) + first;
    const T* const grad = call.tree(nodes, call.num_trees);
    T* const grad_a = grad_leaf_logits + t * call.num_leaves() + first;
    T* const node = call.tree(nodes, i);
    for_each_leaf(i, nodes, [&](int l, T soft, T v) {
      T of_reach =
          entropy_coeff != T{0} && soft > T{0} ? entropy_coeff * entropy_slope(soft) : T{0};
      T of_logit = 0;
      if (grad_weights != nullptr) {
        const T r = grad[call.expert_map == nullptr ? l : call.expert_map[first + l]];
        const T slope = (leaf_factor(v, a[l], softmax.max) * scale) * (r - mean);
        of_logit = slope * v;
        if (!call.is_hard) of_reach += slope;
      }
      grad_a[l] = of_logit;
      node[call.leaf_node(l)] = of_reach;
    });
  }

  /// Bottom-up.
  __device__ __forceinline__ void grade_splits(int64_t t, T* nodes) const {
    const T* const z = call.splits_of(t);
    T* const grad_z = grad_split_logits + t * call.num_splits();
    for (int level = call.num_levels - 1; level >= 0; --level) {
      call.for_each_node(level, [&](int i, int q) {
        T* const node = call.tree(nodes, i);
        const int split = i * (call.num_experts - 1) + q;
        const SmoothStep<T> step = smooth_step(z[split], call.gamma);
        const T of_left = node[2 * q + 1], of_right = node[2 * q + 2];
        grad_z[split] = step.slope * node[q] * (of_left - of_right);
        node[q] = step.value * of_left + step.complement * of_right;
      });
    }
  }
};

}  // namespace

void cuda::comet_backward(const CometShape& shape, const CometOptions& options, DType dtype,
                          const CometInput& input, const CometGradInput& grad,
                          void* grad_split_logits, void* grad_leaf_logits, const Stream& stream) {
  dispatch_float_dtype(dtype, "comet_backward", [&](auto tag) {
    using T = decltype(tag);
    const CometCall<T> call(shape, options, input);
    for_each_token(
        "comet_backward",
        Backward<T>{call, static_cast<const T*>(grad.weights),
                    static_cast<const T*>(grad.grad_weights), grad.grad_entropy_sum,
                    static_cast<T*>(grad_split_logits), static_cast<T*>(grad_leaf_logits)},
        shape.num_tokens, call.elements(), {}, stream);
  });
}

}  // namespace perseid::kernels
