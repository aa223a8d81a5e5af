// route_backward: reads and writes T*E elements, row by row; rows are dealt to threads. A row costs
// E exponentials if a term reaches all experts (softmax before the selection, or a loss), else K.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/math.h"
#include "kernels/parallel.h"
#include "kernels/router.h"
#include "kernels/router_scores.h"
#include "kernels/router_select.h"
#include "kernels/router_token.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kLogitsPerThread = int64_t{1} << 13;

template <typename T>
struct BackwardJob {
  RouterShape shape;
  RouterOptions options;
  RouterInput input;
  const T* logits;
  const int32_t* expert_idx;
  const T* grad_weights;
  const T* grad_score_sum;
  const T* grad_lse_square_sum;
  const T* grad_score_shares;
  T* grad_logits;
};

/// Working memory of one thread.
template <typename T>
struct Scratch {
  explicit Scratch(const RouterShape& shape)
      : exps(static_cast<size_t>(shape.num_experts)),
        terms(static_cast<size_t>(shape.num_experts)),
        grad_shares(static_cast<size_t>(shape.num_experts)),
        choices(static_cast<size_t>(shape.top_k)) {}
  std::vector<T> exps;
  std::vector<T> terms;        ///< gradients of the scores, expert by expert
  std::vector<T> grad_shares;  ///< of the score sum and of the token's own shares
  std::vector<T> choices;      ///< scores of the choices
};

/// No NaN and a finite maximum: no exception to the formulas.
template <typename T>
PERSEID_INLINE bool is_plain(const T* z, int64_t count, T& max) {
  using Key = UnsignedKey<T>;
  SignedKey<T> max_key = kLowestKey<T>;
  Key max_magnitude = 0;
#pragma omp simd reduction(max : max_key, max_magnitude)
  for (int64_t e = 0; e < count; ++e) {
    const Key magnitude = std::bit_cast<Key>(z[e]) & static_cast<Key>(~kSignBit<T>);
    const SignedKey<T> key = signed_key(z[e]);
    max_key = key > max_key ? key : max_key;
    max_magnitude = magnitude > max_magnitude ? magnitude : max_magnitude;
  }
  max = value_of_key<T>(max_key);
  return max_magnitude <= kInfinityBits<T> && std::isfinite(max);
}

PERSEID_INLINE bool is_expert(int32_t e, int64_t num_experts) { return e >= 0 && e < num_experts; }

/// Softmax over all experts: p_e (h_e - sum of p h + 2 lse dlse), where h is the gradient of p_e.
template <typename T>
PERSEID_INLINE void softmax_terms(const T* z, T max, const T* terms, T grad_lse, int64_t count,
                                  T* exps, T* grad_logits) {
  T sum = 0, mean = 0;
#pragma omp simd reduction(+ : sum, mean)
  for (int64_t e = 0; e < count; ++e) {
    const T x = exp_of(z[e] - max);
    exps[e] = x;
    sum += x;
    mean += x * terms[e];
  }
  const T scale = T{1} / sum;
  const T shift = grad_lse == T{0} ? T{0} : T{2} * static_cast<T>(max + std::log(sum)) * grad_lse;
  const T offset = shift - mean * scale;
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) grad_logits[e] = exps[e] * scale * (terms[e] + offset);
}

/// The shares of other scores: q_e (g_e - sum of q g) dlog s_e / dz_e, q as in router_scores.h.
template <typename T>
PERSEID_INLINE void add_share_terms(ScoreFunction score_function, const T* z, T max, const T* grad,
                                    int64_t count, T* shares, T* grad_logits) {
  const T sum = share_row(score_function, z, max, count, shares);
  T mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t e = 0; e < count; ++e) mean += shares[e] * grad[e];
  mean /= sum;
  if (score_function == ScoreFunction::kSigmoid) {
#pragma omp simd
    for (int64_t e = 0; e < count; ++e) {
      grad_logits[e] += shares[e] / sum * (grad[e] - mean) * sigmoid(-z[e]);
    }
  } else {
#pragma omp simd
    for (int64_t e = 0; e < count; ++e) {
      grad_logits[e] += shares[e] / sum * (grad[e] - mean) * sqrt_softplus(z[e]).log_slope;
    }
  }
}

/// Weights that depend on the choices alone; adds to the entries of the choices.
template <typename T>
PERSEID_INLINE void add_choice_terms(const BackwardJob<T>& job, const T* z,
                                     const int32_t* expert_idx, const T* grad_weights, T* scores,
                                     T* grad_logits) {
  const int64_t num_experts = job.shape.num_experts, top_k = job.shape.top_k;
  const ScoreFunction score_function = job.options.score_function;
  const bool is_softmax = score_function == ScoreFunction::kSoftmax;
  const T scale = static_cast<T>(job.options.route_scale);
  T max = -std::numeric_limits<T>::infinity();
  for (int64_t k = 0; k < top_k; ++k) {
    const bool is_chosen = is_expert(expert_idx[k], num_experts);
    scores[k] = is_chosen ? z[expert_idx[k]] : -std::numeric_limits<T>::infinity();
    max = std::max(max, scores[k]);
  }
  if (is_softmax) {
    if (!std::isfinite(max)) return;  // no choice, or only masked ones
#pragma omp simd
    for (int64_t k = 0; k < top_k; ++k) scores[k] = exp_of(scores[k] - max);
  } else {
    score_row(score_function, scores, top_k, scores);
  }
  T sum = is_softmax ? T{0} : T{1e-20};
  for (int64_t k = 0; k < top_k; ++k) sum += scores[k];
  T mean = 0;
  for (int64_t k = 0; k < top_k; ++k) {
    if (is_expert(expert_idx[k], num_experts)) mean += scores[k] / sum * grad_weights[k];
  }
  for (int64_t k = 0; k < top_k; ++k) {
    const int32_t e = expert_idx[k];
    if (!is_expert(e, num_experts)) continue;
    T term = grad_weights[k];
    if (job.options.normalize) term = (term - mean) / sum;
    grad_logits[e] += scale * term * choice_slope(score_function, scores[k], z[e]);
  }
}

template <typename T>
PERSEID_INLINE void backward_row(const BackwardJob<T>& job, int64_t t, Scratch<T>& scratch) {
  const int64_t num_experts = job.shape.num_experts, top_k = job.shape.top_k;
  const bool is_softmax = job.options.score_function == ScoreFunction::kSoftmax;
  const T* const z = job.logits + t * num_experts;
  T* const grad_logits = job.grad_logits + t * num_experts;
  const int32_t* const expert_idx =
      job.grad_weights == nullptr ? nullptr : job.expert_idx + t * top_k;
  const T* const grad_weights =
      job.grad_weights == nullptr ? nullptr : job.grad_weights + t * top_k;
  const T* grad_shares = job.grad_score_sum;
  if (job.grad_score_shares != nullptr) {
    const T* const own = job.grad_score_shares + t * num_experts;
    T* const sum = scratch.grad_shares.data();
    for (int64_t e = 0; e < num_experts; ++e) {
      sum[e] = own[e] + (grad_shares == nullptr ? T{0} : grad_shares[e]);
    }
    grad_shares = sum;
  }
  T max;
  if (!is_plain(z, num_experts, max)) {
    const TokenGrad<T> grad{expert_idx, grad_weights, grad_shares, job.grad_lse_square_sum};
    return route_token_backward(job.shape, job.options, z, grad, grad_logits);
  }

  const bool is_all_weights = is_softmax && !job.options.normalize && grad_weights != nullptr;
  const bool is_all_shares = is_softmax && grad_shares != nullptr;
  if (is_all_weights || is_all_shares || job.grad_lse_square_sum != nullptr) {
    T* const terms = scratch.terms.data();
    if (is_all_shares) {
      std::copy_n(grad_shares, num_experts, terms);
    } else {
      std::fill_n(terms, num_experts, T{0});
    }
    for (int64_t k = 0; is_all_weights && k < top_k; ++k) {
      if (!is_expert(expert_idx[k], num_experts)) continue;
      terms[expert_idx[k]] += static_cast<T>(job.options.route_scale) * grad_weights[k];
    }
    const T grad_lse = job.grad_lse_square_sum == nullptr ? T{0} : *job.grad_lse_square_sum;
    softmax_terms(z, max, terms, grad_lse, num_experts, scratch.exps.data(), grad_logits);
  } else {
    std::fill_n(grad_logits, num_experts, T{0});
  }
  if (!is_softmax && grad_shares != nullptr) {
    add_share_terms(job.options.score_function, z, max, grad_shares, num_experts,
                    scratch.exps.data(), grad_logits);
  }
  if (grad_weights != nullptr && !is_all_weights) {
    add_choice_terms(job, z, expert_idx, grad_weights, scratch.choices.data(), grad_logits);
  }
}

template <typename T>
PERSEID_SIMD_CLONES void backward_rows(const BackwardJob<T>& job, int64_t begin, int64_t end,
                                       Scratch<T>& scratch) {
  for (int64_t t = begin; t < end; ++t) {
    if (job.input.valid != nullptr && job.input.valid[t] == 0) {
      std::fill_n(job.grad_logits + t * job.shape.num_experts, job.shape.num_experts, T{0});
    } else {
      backward_row(job, t, scratch);
    }
  }
}

}  // namespace

void route_backward(const RouterShape& shape, const RouterOptions& options, DType dtype,
                    const RouterInput& input, const RouterGradInput& grad, void* grad_logits,
                    Stream stream) {
  constexpr const char* kOperation = "route_backward";
  check_router(kOperation, shape, options, input);
  require_buffer(kOperation, "grad_logits", grad_logits, shape.num_tokens * shape.num_experts);
  if (grad.grad_weights != nullptr) {
    require_buffer(kOperation, "expert_idx", grad.expert_idx, shape.num_tokens * shape.top_k);
  }
  if (stream.device == Device::kCuda) {
    return cuda::route_backward(shape, options, dtype, input, grad, grad_logits, stream);
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const BackwardJob<T> job{shape,
                             options,
                             input,
                             static_cast<const T*>(input.logits),
                             grad.expert_idx,
                             static_cast<const T*>(grad.grad_weights),
                             static_cast<const T*>(grad.grad_score_sum),
                             static_cast<const T*>(grad.grad_lse_square_sum),
                             static_cast<const T*>(grad.grad_score_shares),
                             static_cast<T*>(grad_logits)};
    const int64_t grain = ceil_div(kLogitsPerThread, shape.num_experts);
    parallel_for(0, shape.num_tokens, grain, [&](int64_t begin, int64_t end) {
      Scratch<T> scratch(shape);
      backward_rows(job, begin, end, scratch);
    });
  });
}

}  // namespace perseid::kernels
