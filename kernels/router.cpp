// route, route_backward: one pass over the logits, row by row. route reads T*E and writes 2*T*K
// elements; route_backward reads and writes T*E. Arithmetic in the type of the logits, sums over
// tokens in double over fixed blocks of tokens that are added in order: the same bits for any
// number of threads. Rows with a NaN or an infinite maximum take the plain path of router_token.h.
#include "kernels/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/math.h"
#include "kernels/parallel.h"
#include "kernels/router_select.h"
#include "kernels/router_token.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kTokensPerBlock = 128;
/// Fewer logits take less time than waking a thread.
constexpr int64_t kLogitsPerThread = int64_t{1} << 13;

int64_t padded(int64_t count) { return ceil_div(count, kLanes) * kLanes; }

template <typename T>
struct RouteJob {
  RouterShape shape;
  RouterOptions options;
  RouterInput input;
  RouterOutput output;
  const T* logits;
  T* weights;
  bool needs_softmax;  ///< of all experts, for a sum, the weights or the selection
  bool needs_sigmoid;  ///< of all experts
};

/// Working memory of one thread. Rows are padded with -inf to whole lanes.
template <typename T>
struct Scratch {
  explicit Scratch(const RouterShape& shape)
      : logits(padded(shape.num_experts)),
        keys(padded(shape.num_experts)),
        exps(padded(shape.num_experts)),
        sigmoids(padded(shape.num_experts)),
        choice_logits(padded(shape.top_k)),
        choice_scores(padded(shape.top_k)),
        expert_idx(static_cast<size_t>(shape.top_k + 1)),
        select(shape.num_experts, shape.top_k) {}
  LaneBuffer<T> logits;
  LaneBuffer<SignedKey<T>> keys;
  LaneBuffer<T> exps;
  LaneBuffer<T> sigmoids;
  LaneBuffer<T> choice_logits;
  LaneBuffer<T> choice_scores;
  std::vector<int32_t> expert_idx;  ///< one more than K: a place for what is not chosen
  SelectScratch<SignedKey<T>> select;
  TokenRoute token;
};

/// Sums over the tokens of one block.
struct BlockSums {
  double* score_sum;  ///< [padded(E)]
  int64_t* tokens_per_expert;
  double lse_square_sum = 0;
  int64_t non_finite_tokens = 0;
};

template <typename T>
struct RowFacts {
  T max;
  bool is_non_finite;
  bool is_plain;  ///< no NaN and a finite maximum
};

/// Copies a row into whole lanes and makes its keys.
template <typename T>
PERSEID_INLINE RowFacts<T> read_row(const T* logits, int64_t num_experts, Scratch<T>& scratch) {
  using Key = UnsignedKey<T>;
  T* const z = scratch.logits.data();
  SignedKey<T>* const keys = scratch.keys.data();
  SignedKey<T> max_key = kLowestKey<T>;
  Key max_magnitude = 0;
#pragma omp simd reduction(max : max_key, max_magnitude)
  for (int64_t e = 0; e < num_experts; ++e) {
    const Key magnitude = std::bit_cast<Key>(logits[e]) & static_cast<Key>(~kSignBit<T>);
    const SignedKey<T> key = signed_key(logits[e]);
    z[e] = logits[e];
    keys[e] = key;
    max_key = key > max_key ? key : max_key;
    max_magnitude = magnitude > max_magnitude ? magnitude : max_magnitude;
  }
  const T max = value_of_key<T>(max_key);
  const bool has_nan = max_magnitude > kInfinityBits<T>;
  return {max, max_magnitude >= kInfinityBits<T>, !has_nan && std::isfinite(max)};
}

/// e^(z - shift) of a padded row, and their sum.
template <typename T>
PERSEID_INLINE T exp_row(const T* z, T shift, int64_t count, T* exps) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < count; ++e) {
    exps[e] = exp_of(z[e] - shift);
    sum += exps[e];
  }
  return sum;
}

template <typename T>
PERSEID_INLINE void sigmoid_row(const T* z, int64_t count, T* sigmoids) {
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) sigmoids[e] = sigmoid(z[e]);
}

/// Shares of softmax(log sigmoid(z)), not yet divided by their sum, which is returned. They are
/// sigmoids, all scaled by e^c with c = max(0, -max z), so that rows of very negative logits
/// neither underflow nor need a logarithm: e^c / (1 + e^-z) = 1 / (e^-c + e^-(z + c)).
template <typename T>
PERSEID_INLINE T sigmoid_shares(const T* z, T max, int64_t count, T* shares) {
  const T c = max < T{0} ? -max : T{0};
  const T floor = exp_of(-c);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < count; ++e) {
    shares[e] = T{1} / (floor + exp_of(-(z[e] + c)));
    sum += shares[e];
  }
  return sum;
}

/// Keys of score + bias; an expert whose logit is -inf stays last.
template <typename T>
PERSEID_INLINE void biased_keys(const T* z, const T* scores, T scale, const float* bias,
                                int64_t num_experts, SignedKey<T>* keys) {
  const SignedKey<T> masked = signed_key(-std::numeric_limits<T>::infinity());
#pragma omp simd
  for (int64_t e = 0; e < num_experts; ++e) {
    const SignedKey<T> key = signed_key(scores[e] * scale + static_cast<T>(bias[e]));
    keys[e] = z[e] >= std::numeric_limits<T>::lowest() ? key : masked;
  }
}

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
PERSEID_INLINE void choice_weights(const RouteJob<T>& job, Scratch<T>& scratch, T exp_sum,
                                   T* weights) {
  const int64_t top_k = job.shape.top_k;
  const int64_t count = scratch.choice_logits.size();
  const int32_t* const expert_idx = scratch.expert_idx.data();
  T* const logits = scratch.choice_logits.data();
  T* const scores = scratch.choice_scores.data();
  T scale = static_cast<T>(job.options.route_scale);
  if (job.options.score_function == ScoreFunction::kSigmoid) {
    gather_choices(scratch.logits.data(), expert_idx, top_k, logits);
    sigmoid_row(logits, count, scores);
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

/// A row by definition: its NaN and infinities follow the rules of router.h.
template <typename T>
void route_exception(const RouteJob<T>& job, int64_t t, Scratch<T>& scratch, BlockSums& sums) {
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
}

template <typename T>
PERSEID_INLINE void add_shares(const T* shares, T scale, int64_t count, double* sum) {
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) sum[e] += static_cast<double>(shares[e] * scale);
}

template <typename T>
PERSEID_INLINE void route_row(const RouteJob<T>& job, int64_t t, Scratch<T>& scratch,
                              BlockSums& sums) {
  const int64_t num_experts = job.shape.num_experts;
  const int64_t count = scratch.logits.size();
  const bool is_sigmoid = job.options.score_function == ScoreFunction::kSigmoid;
  int32_t* const expert_idx = scratch.expert_idx.data();
  const T* const z = scratch.logits.data();
  const RowFacts<T> facts = read_row(job.logits + t * num_experts, num_experts, scratch);
  sums.non_finite_tokens += facts.is_non_finite;
  if (!facts.is_plain) return route_exception(job, t, scratch, sums);

  T exp_sum = 1;
  if (job.needs_softmax) exp_sum = exp_row(z, facts.max, count, scratch.exps.data());
  if (job.needs_sigmoid) sigmoid_row(z, count, scratch.sigmoids.data());
  if (job.input.expert_bias != nullptr) {
    biased_keys(z, is_sigmoid ? scratch.sigmoids.data() : scratch.exps.data(),
                is_sigmoid ? T{1} : T{1} / exp_sum, job.input.expert_bias, num_experts,
                scratch.keys.data());
  }
  select_top_k<T>(scratch.keys.data(), num_experts, job.shape.top_k, scratch.select, expert_idx);
  if (job.input.expert_bias != nullptr) {
    sort_by_logit(z, job.shape.top_k, expert_idx);
    // Biases of -inf can leave only masked experts, whose softmax has no finite maximum.
    if (!std::isfinite(z[expert_idx[0]])) return route_exception(job, t, scratch, sums);
  }
  if (job.weights != nullptr) {
    choice_weights(job, scratch, exp_sum, job.weights + t * job.shape.top_k);
  }
  if (job.output.lse_square_sum != nullptr) {
    const double lse = static_cast<double>(facts.max) + std::log(static_cast<double>(exp_sum));
    sums.lse_square_sum += lse * lse;
  }
  if (job.output.score_sum != nullptr) {
    T* const shares = is_sigmoid ? scratch.sigmoids.data() : scratch.exps.data();
    const T sum = is_sigmoid ? sigmoid_shares(z, facts.max, count, shares) : exp_sum;
    add_shares(shares, T{1} / sum, count, sums.score_sum);
  }
}

template <typename T>
PERSEID_SIMD_CLONES void route_block(const RouteJob<T>& job, int64_t begin, int64_t end,
                                     Scratch<T>& scratch, BlockSums& sums) {
  const int64_t top_k = job.shape.top_k;
  for (int64_t t = begin; t < end; ++t) {
    const bool is_valid = job.input.valid == nullptr || job.input.valid[t] != 0;
    if (is_valid) {
      route_row(job, t, scratch, sums);
    } else if (job.weights != nullptr) {
      std::fill_n(job.weights + t * top_k, top_k, T{0});
    }
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t e = is_valid ? scratch.expert_idx[k] : -1;
      if (is_valid) ++sums.tokens_per_expert[e];
      if (job.output.expert_idx != nullptr) job.output.expert_idx[t * top_k + k] = e;
    }
  }
}

template <typename T>
void route_all(const RouteJob<T>& job) {
  const int64_t num_tokens = job.shape.num_tokens, num_experts = job.shape.num_experts;
  const int64_t num_blocks = ceil_div(num_tokens, kTokensPerBlock);
  const int64_t stride = padded(num_experts);
  std::vector<double> score_sums(static_cast<size_t>(num_blocks * stride), 0.0);
  std::vector<int64_t> counts(static_cast<size_t>(num_blocks * num_experts), 0);
  std::vector<BlockSums> blocks(static_cast<size_t>(num_blocks));
  const int64_t grain = ceil_div(kLogitsPerThread, kTokensPerBlock * num_experts);
  parallel_for(0, num_blocks, grain, [&](int64_t block_begin, int64_t block_end) {
    Scratch<T> scratch(job.shape);
    for (int64_t block = block_begin; block < block_end; ++block) {
      BlockSums& sums = blocks[block];
      sums.score_sum = score_sums.data() + block * stride;
      sums.tokens_per_expert = counts.data() + block * num_experts;
      const int64_t begin = block * kTokensPerBlock;
      route_block(job, begin, std::min(begin + kTokensPerBlock, num_tokens), scratch, sums);
    }
  });

  const RouterOutput& output = job.output;
  for (int64_t e = 0; e < num_experts; ++e) {
    double score_sum = 0;
    int64_t tokens = 0;
    for (const BlockSums& sums : blocks) {
      score_sum += sums.score_sum[e];
      tokens += sums.tokens_per_expert[e];
    }
    if (output.score_sum != nullptr)
      static_cast<T*>(output.score_sum)[e] = static_cast<T>(score_sum);
    if (output.tokens_per_expert != nullptr) output.tokens_per_expert[e] = tokens;
  }
  double lse_square_sum = 0;
  int64_t non_finite_tokens = 0;
  for (const BlockSums& sums : blocks) {
    lse_square_sum += sums.lse_square_sum;
    non_finite_tokens += sums.non_finite_tokens;
  }
  if (output.lse_square_sum != nullptr) {
    *static_cast<T*>(output.lse_square_sum) = static_cast<T>(lse_square_sum);
  }
  if (output.non_finite_tokens != nullptr) *output.non_finite_tokens = non_finite_tokens;
}

}  // namespace

void route(const RouterShape& shape, const RouterOptions& options, DType dtype,
           const RouterInput& input, const RouterOutput& output, Stream stream) {
  require_device(stream, "route");
  check_router("route", shape, options, input);
  dispatch_float_dtype(dtype, "route", [&](auto tag) {
    using T = decltype(tag);
    const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
    const bool has_bias = input.expert_bias != nullptr;
    RouteJob<T> job{shape,
                    options,
                    input,
                    output,
                    static_cast<const T*>(input.logits),
                    static_cast<T*>(output.weights),
                    false,
                    false};
    job.needs_softmax =
        output.lse_square_sum != nullptr ||
        (is_softmax && (output.score_sum != nullptr || has_bias || !options.normalize));
    job.needs_sigmoid = !is_softmax && has_bias;
    route_all(job);
  });
}

}  // namespace perseid::kernels
