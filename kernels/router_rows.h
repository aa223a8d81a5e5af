#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/checks.h"
#include "kernels/router_groups.h"
#include "kernels/router_scores.h"
#include "kernels/router_select.h"
#include "kernels/router_token.h"

// route() of one token, its experts in lanes. Private to this folder.

namespace perseid::kernels {

inline int64_t padded(int64_t count) { return ceil_div(count, kLanes) * kLanes; }

template <typename T>
struct RouteJob {
  RouterShape shape;
  RouterOptions options;
  RouterInput input;
  RouterOutput output;
  const T* logits;
  T* weights;
  T* score_shares;
  bool needs_softmax;  ///< of all experts, for a sum, the weights or the selection
  bool needs_scores;   ///< other scores of all experts
};

/// Working memory of one thread. Rows are padded with -inf to whole lanes.
template <typename T>
struct RowScratch {
  RowScratch(const RouterShape& shape, const RouterOptions& options)
      : logits(padded(shape.num_experts)),
        keys(padded(shape.num_experts)),
        exps(padded(shape.num_experts)),
        scores(padded(shape.num_experts)),
        choice_logits(padded(shape.top_k)),
        choice_scores(padded(shape.top_k)),
        expert_idx(static_cast<size_t>(shape.top_k + 1)),
        select(shape.num_experts, shape.top_k),
        group_score_keys(padded(shape.num_experts)),
        zero_bias(static_cast<size_t>(shape.num_experts), 0.0F),
        groups(options.num_groups, options.topk_groups) {}
  LaneBuffer<T> logits;
  LaneBuffer<SignedKey<T>> keys;
  LaneBuffer<T> exps;
  LaneBuffer<T> scores;
  LaneBuffer<T> choice_logits;
  LaneBuffer<T> choice_scores;
  std::vector<int32_t> expert_idx;  ///< one more than K: a place for what is not chosen
  SelectScratch<SignedKey<T>> select;
  LaneBuffer<SignedKey<T>> group_score_keys;
  std::vector<float> zero_bias;
  GroupScratch<T> groups;
  TokenRoute token;
};

/// Sums over the tokens of one block.
struct BlockSums {
  double* score_sum;  ///< [padded(E)]
  int64_t* tokens_per_expert;
  double lse_square_sum = 0;
  double entropy_sum = 0;
  int64_t non_finite_tokens = 0;
};

/// Larger logits first, then smaller ids: the order of choices that a bias has selected.
template <typename T>
PERSEID_INLINE void sort_by_logit(const T* z, int64_t top_k, int32_t* expert_idx) {
  for (int64_t k = 1; k < top_k; ++k) {
    const int32_t e = expert_idx[k];
    int64_t place = k;
    for (; place > 0; --place) {
      const int32_t other = expert_idx[place - 1];
      if (z[other] > z[e] || (z[other] == z[e] && other < e)) break;
      expert_idx[place] = other;
    }
    expert_idx[place] = e;
  }
}

template <typename T>
PERSEID_INLINE void gather_choices(const T* row, const int32_t* expert_idx, int64_t top_k,
                                   T* choices) {
  for (int64_t k = 0; k < top_k; ++k) choices[k] = row[expert_idx[k]];
}

template <typename T>
PERSEID_INLINE void choice_weights(const RouteJob<T>& job, RowScratch<T>& scratch, T exp_sum,
                                   T* weights) {
  const int64_t top_k = job.shape.top_k;
  const int64_t count = scratch.choice_logits.size();
  const int32_t* const expert_idx = scratch.expert_idx.data();
  T* const logits = scratch.choice_logits.data();
  T* const scores = scratch.choice_scores.data();
  T scale = static_cast<T>(job.options.route_scale);
  if (job.options.score_function != ScoreFunction::kSoftmax) {
    gather_choices(scratch.logits.data(), expert_idx, top_k, logits);
    score_row(job.options.score_function, logits, count, scores);
    if (job.options.normalize) {
      T sum = 0;
      for (int64_t k = 0; k < top_k; ++k) sum += scores[k];
      scale /= sum + T{1e-20};
    }
  } else if (job.options.normalize) {
    gather_choices(scratch.logits.data(), expert_idx, top_k, logits);
    scale /= exp_row(logits, logits[0], count, scores);  // the first choice has the largest logit
  } else {
    gather_choices(scratch.exps.data(), expert_idx, top_k, scores);
    scale /= exp_sum;
  }
  for (int64_t k = 0; k < top_k; ++k) weights[k] = scores[k] * scale;
}

/// The square of log(sum of e^z) from the maximum and the sum of e^(z - max).
template <typename T>
PERSEID_INLINE double square_of_lse(T max, T exp_sum) {
  const double lse = static_cast<double>(max) + std::log(static_cast<double>(exp_sum));
  return lse * lse;
}

/// A row by definition: its NaN and infinities follow the rules of router.h.
template <typename T>
void route_exception(const RouteJob<T>& job, int64_t t, RowScratch<T>& scratch, BlockSums& sums) {
  const int64_t top_k = job.shape.top_k;
  TokenRoute& token = scratch.token;
  route_token(job.shape, job.options, job.logits + t * job.shape.num_experts, job.input.expert_bias,
              token);
  for (int64_t k = 0; k < top_k; ++k) {
    scratch.expert_idx[k] = token.expert_idx[k];
    if (job.weights != nullptr) job.weights[t * top_k + k] = static_cast<T>(token.weights[k]);
  }
  for (int64_t e = 0; e < job.shape.num_experts; ++e) sums.score_sum[e] += token.score_shares[e];
  sums.lse_square_sum += token.lse * token.lse;
  if (job.score_shares != nullptr) {
    std::copy(token.score_shares.begin(), token.score_shares.end(),
              job.score_shares + t * job.shape.num_experts);
  }
}

template <typename T>
PERSEID_INLINE void route_row(const RouteJob<T>& job, int64_t t, RowScratch<T>& scratch,
                              BlockSums& sums) {
  const int64_t num_experts = job.shape.num_experts;
  const int64_t count = scratch.logits.size();
  const ScoreFunction score_function = job.options.score_function;
  const bool is_softmax = score_function == ScoreFunction::kSoftmax;
  const bool has_bias = job.input.expert_bias != nullptr;
  const bool has_groups = job.options.num_groups > 1;
  int32_t* const expert_idx = scratch.expert_idx.data();
  const T* const logits = job.logits + t * num_experts;
  T* const z = scratch.logits.data();
  SignedKey<T>* const keys = scratch.keys.data();
  const auto keep = [&](int64_t e, SignedKey<T> key) __attribute__((always_inline)) {
    z[e] = logits[e];  // into whole lanes
    keys[e] = key;
  };
  const RowFacts<T> facts = read_row(logits, num_experts, keep);
  sums.non_finite_tokens += facts.is_non_finite;
  if (!facts.is_plain) return route_exception(job, t, scratch, sums);

  T exp_sum = 1;
  if (job.needs_softmax) exp_sum = exp_row(z, facts.max, count, scratch.exps.data());
  if (job.needs_scores) score_row(score_function, z, count, scratch.scores.data());
  const T* const scores = is_softmax ? scratch.exps.data() : scratch.scores.data();
  const T score_scale = is_softmax ? T{1} / exp_sum : T{1};
  if (has_bias) {
    biased_keys(z, scores, score_scale, job.input.expert_bias, num_experts, scratch.keys.data());
  }
  if (has_groups) {
    const SignedKey<T>* score_keys = scratch.keys.data();
    const bool is_sum_of_two = has_bias || !is_softmax;
    if (is_sum_of_two && !has_bias) {
      biased_keys(z, scores, score_scale, scratch.zero_bias.data(), num_experts,
                  scratch.group_score_keys.data());
      score_keys = scratch.group_score_keys.data();
    }
    mask_groups<T>(score_keys, num_experts, job.options.num_groups, job.options.topk_groups,
                   is_sum_of_two, scratch.groups, scratch.keys.data());
  }
  select_top_k<T>(scratch.keys.data(), num_experts, job.shape.top_k, scratch.select, expert_idx);
  if (has_bias) sort_by_logit(z, job.shape.top_k, expert_idx);
  if (has_bias || has_groups) {
    // Biases of -inf and groups can leave only masked experts: their softmax has no finite maximum.
    if (!std::isfinite(z[expert_idx[0]])) return route_exception(job, t, scratch, sums);
  }
  if (job.weights != nullptr) {
    choice_weights(job, scratch, exp_sum, job.weights + t * job.shape.top_k);
  }
  if (job.output.lse_square_sum != nullptr) {
    sums.lse_square_sum += square_of_lse(facts.max, exp_sum);
  }
  if (job.output.score_sum != nullptr || job.score_shares != nullptr) {
    T* const shares = is_softmax ? scratch.exps.data() : scratch.scores.data();
    const T sum = is_softmax ? exp_sum : share_row(score_function, z, facts.max, count, shares);
    add_shares(shares, T{1} / sum, count, sums.score_sum);
    if (job.score_shares != nullptr) {
      T* const out = job.score_shares + t * num_experts;
      for (int64_t e = 0; e < num_experts; ++e) out[e] = shares[e] * (T{1} / sum);
    }
  }
}

}  // namespace perseid::kernels
