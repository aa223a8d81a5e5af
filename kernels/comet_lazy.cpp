// comet_reached_logits: each token walks down its trees, a dot product of length D per logit.
// Figures: gates/comet_logits.cpp.
#include "kernels/comet_lazy.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/comet_trees.h"
#include "kernels/dense_row.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

/// Share of the logits up to which a dot product each is faster than the matrix product of all.
constexpr int64_t kReachedShareInverse = 5;
/// Multiplications that take longer than waking a thread, at few logits per token.
constexpr int64_t kProductsPerThread = int64_t{1} << 16;

template <typename T>
struct Job {
  CometShape shape;
  int64_t d_model;
  int64_t num_lowest;
  T gamma;
  const T *features, *split_weight, *split_bias, *leaf_weight, *leaf_bias;

  /// Place in depth-first order of the leaf at place `i` of the heap's leaves.
  int64_t leaf_of(int64_t i) const {
    const int64_t num_upper = shape.num_experts - num_lowest;
    return i >= num_upper ? i - num_upper : i + num_lowest;
  }
};

template <typename T>
Job<T> make_job(const CometShape& shape, double gamma, const CometLinear& linear) {
  return {shape,
          linear.d_model,
          lowest_leaves(shape.num_experts),
          static_cast<T>(gamma),
          static_cast<const T*>(linear.features),
          static_cast<const T*>(linear.split_weight),
          static_cast<const T*>(linear.split_bias),
          static_cast<const T*>(linear.leaf_weight),
          static_cast<const T*>(linear.leaf_bias)};
}

template <typename T>
struct ReachedNode {
  int64_t node;
  T reach;
};

/// Logits of one token whose rows hold zeros; returns how many it formed.
template <typename T>
PERSEID_SIMD_CLONES int64_t descend(const Job<T>& job, const T* x,
                                    std::vector<ReachedNode<T>>& reached, T* split_logits,
                                    T* leaf_logits) {
  // Less than what `comet` counts as 0: rounding may differ there, and it must not miss a logit.
  constexpr T kSmallest = std::numeric_limits<T>::min() / 2;
  const int64_t E = job.shape.num_experts, D = job.d_model;
  int64_t count = 0;
  for (int64_t i = 0; i < job.shape.num_trees; ++i) {
    reached.assign(1, {0, T{1}});
    for (size_t n = 0; n < reached.size(); ++n) {
      const auto [node, reach] = reached[n];
      if (node >= E - 1) {
        const int64_t leaf = i * E + job.leaf_of(node - (E - 1));
        leaf_logits[leaf] = dot(x, job.leaf_weight + leaf * D, D) + job.leaf_bias[leaf];
        continue;
      }
      const int64_t split = i * (E - 1) + node;
      const T z = dot(x, job.split_weight + split * D, D) + job.split_bias[split];
      split_logits[split] = z;
      const SmoothStep<T> step = smooth_step(z, job.gamma);
      // Written so that a NaN goes down both ways.
      if (!(reach * step.value < kSmallest)) reached.push_back({2 * node + 1, reach * step.value});
      if (!(reach * step.complement < kSmallest)) {
        reached.push_back({2 * node + 2, reach * step.complement});
      }
    }
    count += static_cast<int64_t>(reached.size());
  }
  return count;
}

void check(const char* operation, const CometShape& shape, double gamma, const CometLinear& linear,
           const void* split_logits, const void* leaf_logits) {
  const int64_t D = linear.d_model;
  const int64_t num_splits = shape.num_trees * (shape.num_experts - 1);
  const int64_t num_leaves = shape.num_trees * shape.num_experts;
  CometOptions options;
  options.gamma = gamma;
  check_comet(operation, shape, options, {split_logits, leaf_logits, nullptr, nullptr});
  require(D >= 1, operation, "d_model", D, "is below 1; give the width of the tokens");
  require_buffer(operation, "features", linear.features, shape.num_tokens * D);
  require_buffer(operation, "split_weight", linear.split_weight, num_splits * D);
  require_buffer(operation, "split_bias", linear.split_bias, num_splits);
  require_buffer(operation, "leaf_weight", linear.leaf_weight, num_leaves * D);
  require_buffer(operation, "leaf_bias", linear.leaf_bias, num_leaves);
}

template <typename T>
void walk_all(const Job<T>& job, const T* x, int64_t tree, int64_t node, double reach,
              T* split_logits, T* leaf_logits) {
  const int64_t E = job.shape.num_experts;
  const bool is_leaf = node >= E - 1;
  const int64_t row = is_leaf ? tree * E + job.leaf_of(node - (E - 1)) : tree * (E - 1) + node;
  const T* const weight = (is_leaf ? job.leaf_weight : job.split_weight) + row * job.d_model;
  auto logit = static_cast<double>((is_leaf ? job.leaf_bias : job.split_bias)[row]);
  for (int64_t d = 0; d < job.d_model; ++d) {
    logit += static_cast<double>(x[d]) * static_cast<double>(weight[d]);
  }
  (is_leaf ? leaf_logits : split_logits)[row] = static_cast<T>(logit);
  if (is_leaf) return;
  const auto step =
      smooth_step(static_cast<double>(static_cast<T>(logit)), static_cast<double>(job.gamma));
  const double smallest = static_cast<double>(std::numeric_limits<T>::min()) / 2;
  const double left = reach * step.value, right = reach * step.complement;
  if (!(left < smallest)) walk_all(job, x, tree, 2 * node + 1, left, split_logits, leaf_logits);
  if (!(right < smallest)) walk_all(job, x, tree, 2 * node + 2, right, split_logits, leaf_logits);
}

}  // namespace

void comet_reached_logits(const CometShape& shape, double gamma, DType dtype,
                          const CometLinear& linear, const uint8_t* valid, void* split_logits,
                          void* leaf_logits, Stream stream) {
  constexpr const char* kOperation = "comet_reached_logits";
  require_device(stream, kOperation, "form all logits by a matrix product there");
  check(kOperation, shape, gamma, linear, split_logits, leaf_logits);
  const int64_t num_splits = shape.num_trees * (shape.num_experts - 1);
  const int64_t num_leaves = shape.num_trees * shape.num_experts;
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const Job<T> job = make_job<T>(shape, gamma, linear);
    const int64_t grain = ceil_div(kProductsPerThread, linear.d_model * shape.num_trees);
    parallel_for(0, shape.num_tokens, grain, [&](int64_t begin, int64_t end) {
      std::vector<ReachedNode<T>> reached;
      for (int64_t t = begin; t < end; ++t) {
        T* const splits = static_cast<T*>(split_logits) + t * num_splits;
        T* const leaves = static_cast<T*>(leaf_logits) + t * num_leaves;
        std::fill_n(splits, num_splits, T{0});
        std::fill_n(leaves, num_leaves, T{0});
        if (valid != nullptr && valid[t] == 0) continue;
        descend(job, job.features + t * job.d_model, reached, splits, leaves);
      }
    });
  });
}

void comet_reached_logits_reference(const CometShape& shape, double gamma, DType dtype,
                                    const CometLinear& linear, const uint8_t* valid,
                                    void* split_logits, void* leaf_logits) {
  check("comet_reached_logits", shape, gamma, linear, split_logits, leaf_logits);
  const int64_t num_splits = shape.num_trees * (shape.num_experts - 1);
  const int64_t num_leaves = shape.num_trees * shape.num_experts;
  dispatch_float_dtype(dtype, "comet_reached_logits", [&](auto tag) {
    using T = decltype(tag);
    const Job<T> job = make_job<T>(shape, gamma, linear);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      T* const splits = static_cast<T*>(split_logits) + t * num_splits;
      T* const leaves = static_cast<T*>(leaf_logits) + t * num_leaves;
      std::fill_n(splits, num_splits, T{0});
      std::fill_n(leaves, num_leaves, T{0});
      if (valid != nullptr && valid[t] == 0) continue;
      for (int64_t i = 0; i < shape.num_trees; ++i) {
        walk_all(job, job.features + t * job.d_model, i, 0, 1.0, splits, leaves);
      }
    }
  });
}

bool comet_reaches_few(const CometShape& shape, double gamma, DType dtype,
                       const CometLinear& linear, int64_t num_probes) {
  constexpr const char* kOperation = "comet_reaches_few";
  const int64_t num_splits = shape.num_trees * (shape.num_experts - 1);
  const int64_t num_leaves = shape.num_trees * shape.num_experts;
  check(kOperation, {0, shape.num_experts, shape.num_trees}, gamma, linear, nullptr, nullptr);
  require_buffer(kOperation, "features", linear.features, shape.num_tokens * linear.d_model);
  require(num_probes >= 1, kOperation, "num_probes", num_probes, "is below 1");
  int64_t left = num_probes * (num_splits + num_leaves) / kReachedShareInverse;
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const Job<T> job = make_job<T>(shape, gamma, linear);
    std::vector<T> splits(static_cast<size_t>(num_splits)), leaves(static_cast<size_t>(num_leaves));
    std::vector<ReachedNode<T>> reached;
    for (int64_t p = 0; p < num_probes && left >= 0 && shape.num_tokens > 0; ++p) {
      const int64_t t = p * shape.num_tokens / num_probes;
      left -= descend(job, job.features + t * job.d_model, reached, splits.data(), leaves.data());
    }
  });
  return left >= 0;
}

}  // namespace perseid::kernels
