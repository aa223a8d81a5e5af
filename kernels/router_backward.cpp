// route_backward: reads and writes T*E elements, row by row or, for few experts, some rows side by
// side; rows are dealt to threads. A row costs E exponentials if a term reaches all experts
// (softmax before the selection, or a loss), else K.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/math.h"
#include "kernels/parallel.h"
#include "kernels/router.h"
#include "kernels/router_lanes.h"
#include "kernels/router_scores.h"
#include "kernels/router_select.h"
#include "kernels/router_token.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kLogitsPerThread = int64_t{1} << 14;

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

/// Weights with a softmax over all experts, whose terms reach all of them.
PERSEID_INLINE bool has_softmax_weights(const RouterOptions& options) {
  return options.score_function == ScoreFunction::kSoftmax && !options.normalize;
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
  const auto pass = [](int64_t, SignedKey<T>) __attribute__((always_inline)){};
  const RowFacts<T> facts = read_row(z, num_experts, pass);
  const T max = facts.max;
  if (!facts.is_plain) {
    const TokenGrad<T> grad{expert_idx, grad_weights, grad_shares, job.grad_lse_square_sum};
    return route_token_backward(job.shape, job.options, z, grad, grad_logits);
  }

  const bool is_all_weights = has_softmax_weights(job.options) && grad_weights != nullptr;
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

// ---- tokens in lanes, see router_lanes.h
struct LaneScratch {
  explicit LaneScratch(const RouterShape& shape)
      : rows(shape.num_experts, shape.top_k),
        grad_weights(shape.top_k * kLanes),
        terms(shape.num_experts * kLanes),
        grad_logits(shape.num_experts * kLanes) {}
  LaneRows rows;
  LaneBuffer<float> grad_weights;  ///< [K] then the gradients of the choices' logits
  LaneBuffer<float> terms;         ///< [E] gradients of the scores
  LaneBuffer<float> grad_logits;   ///< [E]
};

/// The choices of the tokens, their logits and the gradients of their weights. What is no choice
/// has expert 0, logit -inf and gradient 0.
PERSEID_INLINE void read_choices(const BackwardJob<float>& job, int64_t first,
                                 LaneScratch& scratch) {
  const int64_t num_experts = job.shape.num_experts, top_k = job.shape.top_k;
  int32_t* const choice_idx = scratch.rows.choice_idx.data();
  float* const choices = scratch.rows.choices.data();
  float* const grads = scratch.grad_weights.data();
  std::fill_n(choice_idx, top_k * kLanes, 0);
  std::fill_n(choices, top_k * kLanes, -std::numeric_limits<float>::infinity());
  std::fill_n(grads, top_k * kLanes, 0.0F);
  for (int64_t l = 0; l < kLanes; ++l) {
    if (!has_lane(scratch.rows.plain, l)) continue;
    const int64_t start = (first + l) * top_k;
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t e = job.expert_idx[start + k];
      if (!is_expert(e, num_experts)) continue;
      choice_idx[k * kLanes + l] = e;
      choices[k * kLanes + l] = scratch.rows.logits.data()[e * kLanes + l];
      grads[k * kLanes + l] = job.grad_weights[start + k];
    }
  }
}

/// softmax_terms for tokens in lanes.
PERSEID_INLINE void softmax_lanes(const BackwardJob<float>& job, LaneScratch& scratch) {
  const int64_t num_experts = job.shape.num_experts, top_k = job.shape.top_k;
  LaneRows& rows = scratch.rows;
  float *const terms = scratch.terms.data(), *const grad_logits = scratch.grad_logits.data();
  for (int64_t e = 0; e < num_experts; ++e) {
    std::fill_n(terms + e * kLanes, kLanes,
                job.grad_score_sum == nullptr ? 0.0F : job.grad_score_sum[e]);
  }
  if (job.grad_weights != nullptr && has_softmax_weights(job.options)) {
    const auto route_scale = static_cast<float>(job.options.route_scale);
    for (int64_t i = 0; i < top_k * kLanes; ++i) {
      terms[rows.choice_idx.data()[i] * kLanes + i % kLanes] +=
          route_scale * scratch.grad_weights.data()[i];
    }
  }
  exp_lanes(num_experts, rows);
  const float* const exps = rows.exps.data();
  alignas(64) float scale[kLanes], offset[kLanes] = {};
  for (int64_t e = 0; e < num_experts; ++e) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) offset[l] += exps[e * kLanes + l] * terms[e * kLanes + l];
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    scale[l] = 1.0F / rows.exp_sum[l];
    offset[l] *= -scale[l];
  }
  if (job.grad_lse_square_sum != nullptr) {
    for (int64_t l = 0; l < kLanes; ++l) {
      offset[l] += 2.0F * (rows.max[l] + std::log(rows.exp_sum[l])) * *job.grad_lse_square_sum;
    }
  }
  for (int64_t e = 0; e < num_experts; ++e) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t i = e * kLanes + l;
      grad_logits[i] = exps[i] * scale[l] * (terms[i] + offset[l]);
    }
  }
}

/// add_choice_terms for tokens in lanes and normalized softmax weights.
PERSEID_INLINE void add_choice_lanes(const BackwardJob<float>& job, LaneScratch& scratch) {
  const int64_t top_k = job.shape.top_k;
  const auto route_scale = static_cast<float>(job.options.route_scale);
  float *const scores = scratch.rows.choices.data(), *const grads = scratch.grad_weights.data();
  alignas(64) float max[kLanes], sum[kLanes] = {}, mean[kLanes] = {};
  std::copy_n(scores, kLanes, max);
  for (int64_t k = 1; k < top_k; ++k) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) max[l] = std::max(max[l], scores[k * kLanes + l]);
  }
  for (int64_t k = 0; k < top_k; ++k) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      // -inf of no choice or only masked ones: every score is 0.
      const float shift = max[l] >= std::numeric_limits<float>::lowest() ? max[l] : 0.0F;
      const float score = exp_of(scores[k * kLanes + l] - shift);
      scores[k * kLanes + l] = score;
      sum[l] += score;
      mean[l] += score * grads[k * kLanes + l];
    }
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    sum[l] = sum[l] > 0.0F ? sum[l] : 1.0F;
    mean[l] /= sum[l];
  }
  for (int64_t k = 0; k < top_k; ++k) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t i = k * kLanes + l;
      grads[i] = route_scale * ((grads[i] - mean[l]) / sum[l]) * scores[i];
    }
  }
  float* const grad_logits = scratch.grad_logits.data();
  for (int64_t i = 0; i < top_k * kLanes; ++i) {
    grad_logits[scratch.rows.choice_idx.data()[i] * kLanes + i % kLanes] += grads[i];
  }
}

/// backward_row for kLanes tokens at a time.
PERSEID_SIMD_CLONES void backward_lanes(const BackwardJob<float>& job, int64_t begin, int64_t end,
                                        LaneScratch& scratch) {
  const int64_t num_experts = job.shape.num_experts, top_k = job.shape.top_k;
  const bool has_weights = job.grad_weights != nullptr;
  const bool is_all_weights = has_weights && has_softmax_weights(job.options);
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min(kLanes, end - first);
    const uint32_t valid = valid_lanes(job.input, first, count);
    read_lanes(job.logits + first * num_experts, num_experts, count, valid, scratch.rows);
    if (has_weights) read_choices(job, first, scratch);
    if (is_all_weights || job.grad_score_sum != nullptr || job.grad_lse_square_sum != nullptr) {
      softmax_lanes(job, scratch);
    } else {
      std::fill_n(scratch.grad_logits.data(), num_experts * kLanes, 0.0F);
    }
    if (has_weights && !is_all_weights) add_choice_lanes(job, scratch);

    for (int64_t l = 0; l < count; ++l) {
      const int64_t t = first + l;
      float* const grad_logits = job.grad_logits + t * num_experts;
      if (has_lane(scratch.rows.plain, l)) {
        const float* const lane = scratch.grad_logits.data() + l;
        for (int64_t e = 0; e < num_experts; ++e) grad_logits[e] = lane[e * kLanes];
      } else if (has_lane(valid, l)) {
        const TokenGrad<float> grad{has_weights ? job.expert_idx + t * top_k : nullptr,
                                    has_weights ? job.grad_weights + t * top_k : nullptr,
                                    job.grad_score_sum, job.grad_lse_square_sum};
        route_token_backward(job.shape, job.options, job.logits + t * num_experts, grad,
                             grad_logits);
      } else {
        std::fill_n(grad_logits, num_experts, 0.0F);
      }
    }
  }
}

template <typename T>
PERSEID_SIMD_CLONES void backward_rows(const BackwardJob<T>& job, int64_t begin, int64_t end,
                                       Scratch<T>& scratch) {
  for (int64_t t = begin; t < end; ++t) {
    if (is_valid(job.input, t)) {
      backward_row(job, t, scratch);
    } else {
      std::fill_n(job.grad_logits + t * job.shape.num_experts, job.shape.num_experts, T{0});
    }
  }
}

/// Gradients of score shares differ by token: such rows are read one by one.
template <typename T>
void backward_range(const BackwardJob<T>& job, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<T, float>) {
    if (fits_lanes<T>(job.shape, job.options) && job.grad_score_shares == nullptr) {
      LaneScratch scratch(job.shape);
      return backward_lanes(job, begin, end, scratch);
    }
  }
  Scratch<T> scratch(job.shape);
  backward_rows(job, begin, end, scratch);
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
    parallel_for(0, shape.num_tokens, grain,
                 [&](int64_t begin, int64_t end) { backward_range(job, begin, end); });
  });
}

}  // namespace perseid::kernels
