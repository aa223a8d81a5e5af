// comet, comet_backward: one pass over the logits, token by token, 2E-1 values of each tree in
// cache. The forward reads T*K*(2E-1) and writes T*E elements; the backward forms the trees again
// and reads and writes T*K*(2E-1). Sums over tokens in double over fixed blocks of tokens that are
// added in order: the same bits for any number of threads.
#include "kernels/comet.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/comet_trees.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kTokensPerBlock = 64;
/// Fewer logits take less time than waking a thread.
constexpr int64_t kLogitsPerThread = int64_t{1} << 13;

template <typename T>
struct CometJob {
  CometShape shape;
  CometOptions options;
  CometInput input;
  const T* split_logits;
  const T* leaf_logits;
  T gamma;

  bool is_valid(int64_t t) const { return input.valid == nullptr || input.valid[t] != 0; }
};

template <typename T>
CometJob<T> make_job(const CometShape& shape, const CometOptions& options,
                     const CometInput& input) {
  return {shape,
          options,
          input,
          static_cast<const T*>(input.split_logits),
          static_cast<const T*>(input.leaf_logits),
          static_cast<T>(options.gamma)};
}

/// Sums over the tokens of one block.
struct BlockSums {
  double entropy_sum = 0;
  double removed_weight = 0;
  int64_t reached_nodes = 0;
  int64_t saturated_nodes = 0;
  int64_t non_finite_tokens = 0;
};

template <typename T>
PERSEID_SIMD_CLONES void comet_block(const CometJob<T>& job, int64_t begin, int64_t end, T* weights,
                                     bool needs_entropy, CometScratch<T>& scratch,
                                     BlockSums& sums) {
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  const int64_t E = job.shape.num_experts;
  for (int64_t t = begin; t < end; ++t) {
    T* const row = weights == nullptr ? nullptr : weights + t * E;
    if (!job.is_valid(t)) {
      if (row != nullptr) std::fill_n(row, E, T{0});
      continue;
    }
    const T* const leaf_logits = job.leaf_logits + t * scratch.num_leaves;
    const SwitchFacts facts =
        read_switches(job.split_logits + t * scratch.num_splits, leaf_logits, job.gamma, scratch);
    sums.non_finite_tokens += facts.is_non_finite ? 1 : 0;
    if (facts.has_nan) {
      sums.entropy_sum = sums.removed_weight = static_cast<double>(kNaN);
      if (row == nullptr) continue;
      std::fill_n(row, E, T{0});
      std::fill_n(row, job.shape.num_trees, kNaN);
      continue;
    }
    const NodeCounts nodes = reach_leaves(scratch);
    sums.reached_nodes += nodes.reached;
    sums.saturated_nodes += nodes.saturated;
    if (needs_entropy)
      sums.entropy_sum +=
          static_cast<double>(switch_entropy(scratch.leaf_reach.data(), scratch.num_leaves));
    if (row == nullptr) continue;
    if (job.options.hard_eval) harden(scratch);
    const Softmax<T> softmax = merge_leaves(leaf_logits, job.input.expert_map, scratch);
    sums.removed_weight += write_weights(scratch.merged.data(), softmax.sum,
                                         static_cast<T>(job.options.min_weight), E, row);
  }
}

/// grad a, and dL/dv of the softmax added to leaf_grad unless v is a constant.
template <typename T>
PERSEID_INLINE void leaf_gradients(const CometJob<T>& job, const Softmax<T>& softmax, T mean,
                                   CometScratch<T>& scratch, T* grad_leaf_logits) {
  const T* const v = scratch.leaf_reach.data();
  const T* const factor = scratch.factor.data();
  const T* const grad = scratch.grad.data();
  T* const leaf_grad = scratch.leaf_grad.data();
  const T scale = std::isfinite(softmax.max) ? T{1} / softmax.sum : T{0};
  const T soft = job.options.hard_eval ? T{0} : T{1};
  const int32_t* const map = job.input.expert_map;
  for (int64_t first = 0; first < scratch.num_leaves; first += scratch.num_experts) {
    const auto pass = [&](int64_t i, T r) {
      const T slope = (factor[i] * scale) * (r - mean);
      grad_leaf_logits[i] = slope * v[i];
      leaf_grad[i] += soft * slope;
    };
    if (map == nullptr) {
#pragma omp simd
      for (int64_t l = 0; l < scratch.num_experts; ++l) pass(first + l, grad[l]);
    } else {
      for (int64_t l = 0; l < scratch.num_experts; ++l) pass(first + l, grad[map[first + l]]);
    }
  }
}

template <typename T>
PERSEID_INLINE void entropy_gradients(T coeff, CometScratch<T>& scratch) {
  const T* const v = scratch.leaf_reach.data();
  T* const leaf_grad = scratch.leaf_grad.data();
#pragma omp simd
  for (int64_t i = 0; i < scratch.num_leaves; ++i) {
    const T slope = coeff * entropy_slope(v[i]);
    leaf_grad[i] = v[i] > T{0} ? slope : T{0};
  }
}

/// Bottom-up: dL/d(reach) of every node, and from it grad z.
template <typename T>
PERSEID_INLINE void split_gradients(CometScratch<T>& scratch, T* grad_split_logits) {
  const int64_t E = scratch.num_experts;
  for (int64_t i = 0; i < scratch.num_leaves / E; ++i) {
    T* const node = scratch.node_grad.data() + i * (2 * E - 1);
    const T* const leaf = scratch.leaf_grad.data() + i * E;
    const T* const reach = scratch.reach.data() + i * (2 * E - 1);
    const T* const left = scratch.go_left.data() + i * (E - 1);
    const T* const right = scratch.go_right.data() + i * (E - 1);
    const T* const slope = scratch.slope.data() + i * (E - 1);
    T* const grad = grad_split_logits + i * (E - 1);
    std::copy_n(leaf, scratch.num_lowest, node + (2 * E - 1 - scratch.num_lowest));
    std::copy(leaf + scratch.num_lowest, leaf + E, node + E - 1);
    int64_t first = 0;
    while (2 * first + 1 < E - 1) first = 2 * first + 1;
    for (; first<E - 1; first = first> 0 ? (first - 1) / 2 : E) {
      const int64_t end = std::min(2 * first + 1, E - 1);
#pragma omp simd
      for (int64_t q = first; q < end; ++q) {
        const T of_left = node[2 * q + 1], of_right = node[2 * q + 2];
        node[q] = left[q] * of_left + right[q] * of_right;
        grad[q] = slope[q] * reach[q] * (of_left - of_right);
      }
    }
  }
}

template <typename T>
PERSEID_SIMD_CLONES void comet_backward_block(const CometJob<T>& job, const CometGradInput& input,
                                              int64_t begin, int64_t end, CometScratch<T>& scratch,
                                              T* grad_split_logits, T* grad_leaf_logits) {
  const int64_t E = job.shape.num_experts;
  const auto* const grad_weights = static_cast<const T*>(input.grad_weights);
  const auto* const weights = static_cast<const T*>(input.weights);
  const T entropy_coeff =
      input.grad_entropy_sum == nullptr ? T{0} : static_cast<T>(*input.grad_entropy_sum);
  for (int64_t t = begin; t < end; ++t) {
    T* const grad_splits = grad_split_logits + t * scratch.num_splits;
    T* const grad_leaves = grad_leaf_logits + t * scratch.num_leaves;
    const T* const leaf_logits = job.leaf_logits + t * scratch.num_leaves;
    T fill = 0;
    bool is_filled = !job.is_valid(t);
    if (!is_filled) {
      const SwitchFacts facts =
          read_switches(job.split_logits + t * scratch.num_splits, leaf_logits, job.gamma, scratch);
      is_filled = facts.has_nan;
      fill = std::numeric_limits<T>::quiet_NaN();
    }
    if (is_filled) {
      std::fill_n(grad_splits, scratch.num_splits, fill);
      std::fill_n(grad_leaves, scratch.num_leaves, fill);
      continue;
    }
    reach_leaves(scratch);
    if (entropy_coeff != T{0}) {
      entropy_gradients(entropy_coeff, scratch);
    } else {
      std::fill(scratch.leaf_grad.begin(), scratch.leaf_grad.end(), T{0});
    }
    if (grad_weights != nullptr) {
      if (job.options.hard_eval) harden(scratch);
      const Softmax<T> softmax = merge_leaves(leaf_logits, job.input.expert_map, scratch);
      const T mean = read_gradient(weights + t * E, grad_weights + t * E, E, scratch.grad.data());
      leaf_gradients(job, softmax, mean, scratch, grad_leaves);
    } else {
      std::fill_n(grad_leaves, scratch.num_leaves, T{0});
    }
    split_gradients(scratch, grad_splits);
  }
}

int64_t blocks_per_thread(const CometShape& shape) {
  return ceil_div(kLogitsPerThread, kTokensPerBlock * shape.num_trees * (2 * shape.num_experts));
}

}  // namespace

void comet(const CometShape& shape, const CometOptions& options, DType dtype,
           const CometInput& input, const CometOutput& output, Stream stream) {
  check_comet("comet", shape, options, input);
  if (stream.device == Device::kCuda) {
    return cuda::comet(shape, options, dtype, input, output, stream);
  }
  const int64_t num_blocks = ceil_div(shape.num_tokens, kTokensPerBlock);
  std::vector<BlockSums> blocks(static_cast<size_t>(num_blocks));
  dispatch_float_dtype(dtype, "comet", [&](auto tag) {
    using T = decltype(tag);
    const CometJob<T> job = make_job<T>(shape, options, input);
    parallel_for(0, num_blocks, blocks_per_thread(shape), [&](int64_t first, int64_t last) {
      CometScratch<T> scratch(shape);
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * kTokensPerBlock;
        comet_block(job, begin, std::min(begin + kTokensPerBlock, shape.num_tokens),
                    static_cast<T*>(output.weights), output.entropy_sum != nullptr, scratch,
                    blocks[block]);
      }
    });
  });
  BlockSums total;
  for (const BlockSums& sums : blocks) {
    total.entropy_sum += sums.entropy_sum;
    total.removed_weight += sums.removed_weight;
    total.reached_nodes += sums.reached_nodes;
    total.saturated_nodes += sums.saturated_nodes;
    total.non_finite_tokens += sums.non_finite_tokens;
  }
  if (output.entropy_sum != nullptr) *output.entropy_sum = total.entropy_sum;
  if (output.removed_weight != nullptr) *output.removed_weight = total.removed_weight;
  if (output.reached_nodes != nullptr) *output.reached_nodes = total.reached_nodes;
  if (output.saturated_nodes != nullptr) *output.saturated_nodes = total.saturated_nodes;
  if (output.non_finite_tokens != nullptr) *output.non_finite_tokens = total.non_finite_tokens;
}

void comet_backward(const CometShape& shape, const CometOptions& options, DType dtype,
                    const CometInput& input, const CometGradInput& grad, void* grad_split_logits,
                    void* grad_leaf_logits, Stream stream) {
  constexpr const char* kOperation = "comet_backward";
  check_comet(kOperation, shape, options, input);
  check_comet_grad(kOperation, shape, grad, grad_split_logits, grad_leaf_logits);
  if (stream.device == Device::kCuda) {
    return cuda::comet_backward(shape, options, dtype, input, grad, grad_split_logits,
                                grad_leaf_logits, stream);
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const CometJob<T> job = make_job<T>(shape, options, input);
    const int64_t grain = blocks_per_thread(shape) * kTokensPerBlock;
    parallel_for(0, shape.num_tokens, grain, [&](int64_t begin, int64_t end) {
      CometScratch<T> scratch(shape);
      comet_backward_block(job, grad, begin, end, scratch, static_cast<T*>(grad_split_logits),
                           static_cast<T*>(grad_leaf_logits));
    });
  });
}

}  // namespace perseid::kernels
