// dselect_k, dselect_k_backward: one pass over the logits, token by token, 2^(bits+1) products of
// each selector in cache. The forward reads T*K*(bits+1) and writes T*E elements; the backward
// forms the products again, reads T*(K*(bits+1) + 2E) and writes T*K*(bits+1). Sums over tokens in
// double over fixed blocks of tokens that are added in order: the same bits for any number of
// threads.
#include "kernels/dselect_k.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/dselect_k_token.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kTokensPerBlock = 64;
/// Fewer products take less time than waking a thread.
constexpr int64_t kProductsPerThread = int64_t{1} << 13;

template <typename T>
struct DSelectKJob {
  DSelectKShape shape;
  DSelectKOptions options;
  const T* logits;
  const int32_t* expert_map;  ///< or null
  const uint8_t* valid;
  int64_t num_switches;  ///< of a token, K*bits
  int64_t row_size;      ///< K*bits + K

  bool is_valid(int64_t t) const { return valid == nullptr || valid[t] != 0; }
};

template <typename T>
DSelectKJob<T> make_job(const DSelectKShape& shape, const DSelectKOptions& options,
                        const DSelectKInput& input) {
  const int64_t num_switches = shape.num_selectors * dselect_k_bits(shape.num_experts);
  return {shape,       options,      static_cast<const T*>(input.logits), input.expert_map,
          input.valid, num_switches, num_switches + shape.num_selectors};
}

/// Sums over the tokens of one block.
struct BlockSums {
  double entropy_sum = 0;
  double penalty_sum = 0;
  double removed_weight = 0;
  int64_t num_switches = 0;
  int64_t saturated_switches = 0;
  int64_t non_finite_tokens = 0;
};

template <typename T>
PERSEID_INLINE void add_losses(const DSelectKScratch<T>& scratch, bool needs_entropy,
                               BlockSums& sums) {
  for (int64_t i = 0; i < scratch.num_selectors; ++i) {
    if (needs_entropy) {
      sums.entropy_sum +=
          static_cast<double>(switch_entropy(scratch.reach(i), scratch.num_experts));
    }
    sums.penalty_sum += 1 / (kPenaltyEpsilon + static_cast<double>(scratch.mass[i]));
  }
}

template <typename T>
PERSEID_SIMD_CLONES void dselect_k_block(const DSelectKJob<T>& job, int64_t begin, int64_t end,
                                         T* weights, bool needs_entropy,
                                         DSelectKScratch<T>& scratch, BlockSums& sums) {
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  const int64_t E = job.shape.num_experts;
  for (int64_t t = begin; t < end; ++t) {
    T* const row = weights == nullptr ? nullptr : weights + t * E;
    if (!job.is_valid(t)) {
      if (row != nullptr) std::fill_n(row, E, T{0});
      continue;
    }
    const T* const logits = job.logits + t * job.row_size;
    const SelectorFacts facts = read_selectors(logits, static_cast<T>(job.options.gamma), scratch);
    sums.non_finite_tokens += facts.is_non_finite ? 1 : 0;
    if (facts.has_nan) {
      sums.entropy_sum = sums.penalty_sum = sums.removed_weight = static_cast<double>(kNaN);
      if (row == nullptr) continue;
      std::fill_n(row, E, T{0});
      std::fill_n(row, job.shape.num_selectors, kNaN);
      continue;
    }
    sums.num_switches += job.num_switches;
    sums.saturated_switches += facts.saturated;
    reach_experts(scratch);
    add_losses(scratch, needs_entropy, sums);
    if (row == nullptr) continue;
    share_selectors(logits + job.num_switches, scratch);
    const T divisor = merge_selectors(job.options, job.expert_map, scratch);
    sums.removed_weight += write_weights(scratch.merged.data(), divisor,
                                         static_cast<T>(job.options.min_weight), E, row);
  }
}

/// dL/d(merged) at the experts of selector i's codes, [E]. In order of codes sums over it have the
/// same bits whatever the map.
template <typename T>
PERSEID_INLINE const T* code_gradients(const DSelectKJob<T>& job, int64_t i,
                                       DSelectKScratch<T>& scratch) {
  const T* const grad = scratch.grad.data();
  if (job.expert_map == nullptr) return grad;
  const int64_t E = scratch.num_experts;
  const int32_t* const map = job.expert_map + i * E;
  T* const mapped = scratch.merged.data();
  for (int64_t j = 0; j < E; ++j) mapped[j] = grad[map[j]];
  return mapped;
}

/// dL/d(merged) and dL/d(alpha).
template <typename T>
PERSEID_INLINE void alpha_gradients(const DSelectKJob<T>& job, const T* weights,
                                    const T* grad_weights, DSelectKScratch<T>& scratch) {
  const int64_t E = scratch.num_experts;
  T* const grad = scratch.grad.data();
  const bool is_merged = job.options.renormalize || job.options.hard_eval;
  const T divisor = is_merged ? merge_selectors(job.options, job.expert_map, scratch) : T{1};
  const T mean = read_gradient(weights, grad_weights, E, grad);
  if (job.options.renormalize) {
#pragma omp simd
    for (int64_t j = 0; j < E; ++j) grad[j] = (grad[j] - mean) / divisor;
  }
  for (int64_t i = 0; i < scratch.num_selectors; ++i) {
    if (job.options.hard_eval) {
      scratch.alpha_grad[i] = scratch.largest[i] >= 0 ? grad[scratch.largest[i]] : T{0};
      continue;
    }
    const T* const r = scratch.reach(i);
    const T* const of_codes = code_gradients(job, i, scratch);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < E; ++j) sum += r[j] * of_codes[j];
    scratch.alpha_grad[i] = sum;
  }
}

/// grad omega, the Jacobian of a softmax.
template <typename T>
PERSEID_INLINE void omega_gradients(const DSelectKScratch<T>& scratch, T* grad_omega) {
  const int64_t K = scratch.num_selectors;
  T mean = 0;
  for (int64_t i = 0; i < K; ++i) mean += scratch.alpha[i] * scratch.alpha_grad[i];
  for (int64_t i = 0; i < K; ++i) {
    grad_omega[i] = scratch.alpha[i] * (scratch.alpha_grad[i] - mean);
  }
}

/// Coefficients of the terms of dL/dr.
template <typename T>
struct ReachTerms {
  bool has_weights;
  T entropy;
  T penalty;
};

/// G of selector i; codes without an expert have none.
template <typename T>
PERSEID_INLINE void reach_gradients(const DSelectKJob<T>& job, const ReachTerms<T>& terms,
                                    int64_t i, DSelectKScratch<T>& scratch) {
  const int64_t E = scratch.num_experts;
  const T* const r = scratch.reach(i);
  const T* const grad = terms.has_weights ? code_gradients(job, i, scratch) : scratch.grad.data();
  T* const code_grad = scratch.code_grad.data();
  const T shifted = scratch.mass[i] + static_cast<T>(kPenaltyEpsilon);
  const T of_mass = -terms.penalty / (shifted * shifted);
  const T alpha = terms.has_weights ? scratch.alpha[i] : T{0};
#pragma omp simd
  for (int64_t j = 0; j < E; ++j) {
    const T of_weights = terms.has_weights ? alpha * grad[j] : T{0};
    code_grad[j] = r[j] > T{0} ? of_weights + of_mass : T{0};
  }
  if (terms.entropy != T{0}) {
#pragma omp simd
    for (int64_t j = 0; j < E; ++j) {
      const T of_entropy = terms.entropy * entropy_slope(r[j]);
      code_grad[j] += r[j] > T{0} ? of_entropy : T{0};
    }
  }
  std::fill(code_grad + E, code_grad + scratch.num_codes, T{0});
}

/// grad z of selector i from G, from the first bit to the last: each bit halves the codes, as its
/// switch sums the two halves up, and its own gradient is their difference.
template <typename T>
PERSEID_INLINE void bit_gradients(int64_t i, DSelectKScratch<T>& scratch, T* grad_z) {
  const int64_t bits = scratch.num_bits;
  const T* const products = scratch.products.data() + 2 * i * scratch.num_codes;
  T* const code_grad = scratch.code_grad.data();
  for (int64_t b = 0; b < bits; ++b) {
    const int64_t half = scratch.num_codes >> (b + 1);
    const T* const lower = products + half;
    const T one = scratch.one[i * bits + b], zero = scratch.zero[i * bits + b];
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < half; ++c) {
      const T of_zero = code_grad[c], of_one = code_grad[half + c];
      sum += lower[c] * (of_one - of_zero);
      code_grad[c] = zero * of_zero + one * of_one;
    }
    grad_z[b] = scratch.slope[i * bits + b] * sum;
  }
}

template <typename T>
PERSEID_SIMD_CLONES void dselect_k_backward_block(const DSelectKJob<T>& job,
                                                  const DSelectKGradInput& input, int64_t begin,
                                                  int64_t end, DSelectKScratch<T>& scratch,
                                                  T* grad_logits) {
  const int64_t E = job.shape.num_experts, K = job.shape.num_selectors;
  const auto* const grad_weights = static_cast<const T*>(input.grad_weights);
  const auto* const weights = static_cast<const T*>(input.weights);
  const auto value = [](const double* p) { return p == nullptr ? T{0} : static_cast<T>(*p); };
  const ReachTerms<T> terms{grad_weights != nullptr && !job.options.hard_eval,
                            value(input.grad_entropy_sum), value(input.grad_penalty_sum)};
  for (int64_t t = begin; t < end; ++t) {
    T* const grad_z = grad_logits + t * job.row_size;
    T* const grad_omega = grad_z + job.num_switches;
    const T* const logits = job.logits + t * job.row_size;
    if (!job.is_valid(t)) {
      std::fill_n(grad_z, job.row_size, T{0});
      continue;
    }
    if (read_selectors(logits, static_cast<T>(job.options.gamma), scratch).has_nan) {
      std::fill_n(grad_z, job.row_size, std::numeric_limits<T>::quiet_NaN());
      continue;
    }
    reach_experts(scratch);
    std::fill_n(grad_omega, K, T{0});
    if (grad_weights != nullptr) {
      const bool has_gradient = share_selectors(logits + job.num_switches, scratch);
      alpha_gradients(job, weights + t * E, grad_weights + t * E, scratch);
      if (has_gradient) omega_gradients(scratch, grad_omega);
    }
    for (int64_t i = 0; i < K; ++i) {
      reach_gradients(job, terms, i, scratch);
      bit_gradients(i, scratch, grad_z + i * scratch.num_bits);
    }
  }
}

int64_t blocks_per_thread(const DSelectKShape& shape) {
  return ceil_div(kProductsPerThread,
                  kTokensPerBlock * shape.num_selectors * (2 * shape.num_experts));
}

void write_sums(const std::vector<BlockSums>& blocks, const DSelectKOutput& output) {
  BlockSums total;
  for (const BlockSums& sums : blocks) {
    total.entropy_sum += sums.entropy_sum;
    total.penalty_sum += sums.penalty_sum;
    total.removed_weight += sums.removed_weight;
    total.num_switches += sums.num_switches;
    total.saturated_switches += sums.saturated_switches;
    total.non_finite_tokens += sums.non_finite_tokens;
  }
  if (output.entropy_sum != nullptr) *output.entropy_sum = total.entropy_sum;
  if (output.penalty_sum != nullptr) *output.penalty_sum = total.penalty_sum;
  if (output.removed_weight != nullptr) *output.removed_weight = total.removed_weight;
  if (output.num_switches != nullptr) *output.num_switches = total.num_switches;
  if (output.saturated_switches != nullptr) *output.saturated_switches = total.saturated_switches;
  if (output.non_finite_tokens != nullptr) *output.non_finite_tokens = total.non_finite_tokens;
}

}  // namespace

void dselect_k(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
               const DSelectKInput& input, const DSelectKOutput& output, Stream stream) {
  check_dselect_k("dselect_k", shape, options, input);
  if (stream.device == Device::kCuda) {
    return cuda::dselect_k(shape, options, dtype, input, output, stream);
  }
  const int64_t num_blocks = ceil_div(shape.num_tokens, kTokensPerBlock);
  std::vector<BlockSums> blocks(static_cast<size_t>(num_blocks));
  dispatch_float_dtype(dtype, "dselect_k", [&](auto tag) {
    using T = decltype(tag);
    const DSelectKJob<T> job = make_job<T>(shape, options, input);
    parallel_for(0, num_blocks, blocks_per_thread(shape), [&](int64_t first, int64_t last) {
      DSelectKScratch<T> scratch(shape);
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * kTokensPerBlock;
        dselect_k_block(job, begin, std::min(begin + kTokensPerBlock, shape.num_tokens),
                        static_cast<T*>(output.weights), output.entropy_sum != nullptr, scratch,
                        blocks[block]);
      }
    });
  });
  write_sums(blocks, output);
}

void dselect_k_backward(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
                        const DSelectKInput& input, const DSelectKGradInput& grad,
                        void* grad_logits, Stream stream) {
  constexpr const char* kOperation = "dselect_k_backward";
  check_dselect_k(kOperation, shape, options, input);
  check_dselect_k_grad(kOperation, shape, grad, grad_logits);
  if (stream.device == Device::kCuda) {
    return cuda::dselect_k_backward(shape, options, dtype, input, grad, grad_logits, stream);
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const DSelectKJob<T> job = make_job<T>(shape, options, input);
    const int64_t grain = blocks_per_thread(shape) * kTokensPerBlock;
    parallel_for(0, shape.num_tokens, grain, [&](int64_t begin, int64_t end) {
      DSelectKScratch<T> scratch(shape);
      dselect_k_backward_block(job, grad, begin, end, scratch, static_cast<T*>(grad_logits));
    });
  });
}

}  // namespace perseid::kernels
