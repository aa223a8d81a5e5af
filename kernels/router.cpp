// route: one pass over the logits, row by row or, for few experts, some rows side by side. Reads
// T*E and writes 2*T*K elements. Arithmetic in the type of the logits, sums over tokens in double
// over fixed blocks of tokens that are added in order: the same bits for any number of threads.
// Rows with a NaN or an infinite maximum take the plain path of router_token.h.
#include "kernels/router.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <type_traits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"
#include "kernels/router_lanes.h"
#include "kernels/router_rows.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kTokensPerBlock = 128;
/// Fewer logits take less time than waking a thread.
constexpr int64_t kLogitsPerThread = int64_t{1} << 14;

template <typename T>
PERSEID_INLINE void skip_token(const RouteJob<T>& job, int64_t t) {
  const int64_t num_experts = job.shape.num_experts, top_k = job.shape.top_k;
  if (job.output.expert_idx != nullptr) std::fill_n(job.output.expert_idx + t * top_k, top_k, -1);
  if (job.weights != nullptr) std::fill_n(job.weights + t * top_k, top_k, T{0});
  if (job.score_shares != nullptr) {
    std::fill_n(job.score_shares + t * num_experts, num_experts, T{0});
  }
}

/// Counts and writes the choices of a token, choice k at expert_idx[k * step].
template <typename T>
PERSEID_INLINE void take_choices(const RouteJob<T>& job, int64_t t, const int32_t* expert_idx,
                                 int64_t step, BlockSums& sums) {
  const int64_t top_k = job.shape.top_k;
  for (int64_t k = 0; k < top_k; ++k) {
    const int32_t e = expert_idx[k * step];
    ++sums.tokens_per_expert[e];
    if (job.output.expert_idx != nullptr) job.output.expert_idx[t * top_k + k] = e;
  }
}

template <typename T>
PERSEID_INLINE void sum_entropy(const RouteJob<T>& job, int64_t begin, int64_t end,
                                BlockSums& sums) {
  if (job.output.entropy_sum == nullptr) return;
  const int64_t top_k = job.shape.top_k;
  sums.entropy_sum = entropy_of(job.weights + begin * top_k, (end - begin) * top_k);
}

/// One thread's working memory for tokens in lanes.
struct LaneScratch {
  explicit LaneScratch(const RouterShape& shape)
      : rows(shape.num_experts, shape.top_k), score_sums(shape.num_experts * kLanes) {}
  LaneRows rows;
  LaneBuffer<double> score_sums;  ///< of a block, by expert and lane
};

/// What route_row writes for the token in one lane.
PERSEID_INLINE void write_lane(const RouteJob<float>& job, int64_t t, int64_t lane,
                               float share_scale, LaneRows& rows, BlockSums& sums) {
  const int64_t num_experts = job.shape.num_experts, top_k = job.shape.top_k;
  take_choices(job, t, rows.choice_idx.data() + lane, kLanes, sums);
  const float *const weights = rows.choices.data() + lane, *const exps = rows.exps.data() + lane;
  for (int64_t k = 0; job.weights != nullptr && k < top_k; ++k) {
    job.weights[t * top_k + k] = weights[k * kLanes];
  }
  for (int64_t e = 0; job.score_shares != nullptr && e < num_experts; ++e) {
    job.score_shares[t * num_experts + e] = exps[e * kLanes] * share_scale;
  }
  if (job.output.lse_square_sum != nullptr) {
    sums.lse_square_sum += square_of_lse(rows.max[lane], rows.exp_sum[lane]);
  }
}

/// route_row for kLanes tokens at a time, one in each lane. What a token gets does not depend on
/// those beside it.
PERSEID_SIMD_CLONES void route_lanes(const RouteJob<float>& job, int64_t begin, int64_t end,
                                     RowScratch<float>& scratch, LaneScratch& lanes,
                                     BlockSums& sums) {
  const int64_t num_experts = job.shape.num_experts;
  LaneRows& rows = lanes.rows;
  double* const score_sums = lanes.score_sums.data();
  std::fill_n(score_sums, num_experts * kLanes, 0.0);
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min(kLanes, end - first);
    const uint32_t valid = valid_lanes(job.input, first, count);
    read_lanes(job.logits + first * num_experts, num_experts, count, valid, rows);
    sums.non_finite_tokens += std::popcount(rows.non_finite);
    if (job.needs_softmax) exp_lanes(num_experts, rows);
    select_lanes(num_experts, job.shape.top_k, rows);
    if (job.weights != nullptr) weigh_lanes(job.options, job.shape.top_k, rows);
    alignas(64) float share_scales[kLanes] = {};
    if (job.output.score_sum != nullptr || job.score_shares != nullptr) {
      for (int64_t l = 0; l < kLanes; ++l) {
        share_scales[l] = has_lane(rows.plain, l) ? 1.0F / rows.exp_sum[l] : 0.0F;
      }
      for (int64_t e = 0; e < num_experts; ++e) {
        const float* const exps = rows.exps.data() + e * kLanes;
        double* const sum = score_sums + e * kLanes;
#pragma omp simd
        for (int64_t l = 0; l < kLanes; ++l) {
          sum[l] += static_cast<double>(exps[l] * share_scales[l]);
        }
      }
    }
    for (int64_t l = 0; l < count; ++l) {
      if (has_lane(rows.plain, l)) {
        write_lane(job, first + l, l, share_scales[l], rows, sums);
      } else if (has_lane(valid, l)) {
        route_exception(job, first + l, scratch, sums);
        take_choices(job, first + l, scratch.expert_idx.data(), 1, sums);
      } else {
        skip_token(job, first + l);
      }
    }
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t l = 0; l < kLanes; ++l) sums.score_sum[e] += score_sums[e * kLanes + l];
  }
  sum_entropy(job, begin, end, sums);
}

template <typename T>
PERSEID_SIMD_CLONES void route_rows(const RouteJob<T>& job, int64_t begin, int64_t end,
                                    RowScratch<T>& scratch, BlockSums& sums) {
  for (int64_t t = begin; t < end; ++t) {
    if (is_valid(job.input, t)) {
      route_row(job, t, scratch, sums);
      take_choices(job, t, scratch.expert_idx.data(), 1, sums);
    } else {
      skip_token(job, t);
    }
  }
  sum_entropy(job, begin, end, sums);
}

template <typename T>
void route_block(const RouteJob<T>& job, int64_t begin, int64_t end, RowScratch<T>& scratch,
                 LaneScratch* lanes, BlockSums& sums) {
  if constexpr (std::is_same_v<T, float>) {
    if (lanes != nullptr) return route_lanes(job, begin, end, scratch, *lanes, sums);
  }
  route_rows(job, begin, end, scratch, sums);
}

/// A bias or groups make other keys than the logits: such rows are read one by one.
template <typename T>
bool uses_lanes(const RouteJob<T>& job) {
  return fits_lanes<T>(job.shape, job.options) && job.input.expert_bias == nullptr &&
         job.options.num_groups == 1;
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
    RowScratch<T> scratch(job.shape, job.options);
    std::optional<LaneScratch> lanes;
    if (uses_lanes(job)) lanes.emplace(job.shape);
    for (int64_t block = block_begin; block < block_end; ++block) {
      BlockSums& sums = blocks[block];
      sums.score_sum = score_sums.data() + block * stride;
      sums.tokens_per_expert = counts.data() + block * num_experts;
      const int64_t begin = block * kTokensPerBlock;
      route_block(job, begin, std::min(begin + kTokensPerBlock, num_tokens), scratch,
                  lanes ? &*lanes : nullptr, sums);
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
  double lse_square_sum = 0, entropy_sum = 0;
  int64_t non_finite_tokens = 0;
  for (const BlockSums& sums : blocks) {
    lse_square_sum += sums.lse_square_sum;
    entropy_sum += sums.entropy_sum;
    non_finite_tokens += sums.non_finite_tokens;
  }
  if (output.lse_square_sum != nullptr) {
    *static_cast<T*>(output.lse_square_sum) = static_cast<T>(lse_square_sum);
  }
  if (output.entropy_sum != nullptr) *output.entropy_sum = entropy_sum;
  if (output.non_finite_tokens != nullptr) *output.non_finite_tokens = non_finite_tokens;
}

}  // namespace

void route(const RouterShape& shape, const RouterOptions& options, DType dtype,
           const RouterInput& input, const RouterOutput& output, Stream stream) {
  check_router("route", shape, options, input);
  if (stream.device == Device::kCuda) {
    return cuda::route(shape, options, dtype, input, output, stream);
  }
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
                    static_cast<T*>(output.score_shares),
                    false,
                    false};
    job.needs_softmax =
        output.lse_square_sum != nullptr ||
        (is_softmax && (output.score_sum != nullptr || output.score_shares != nullptr || has_bias ||
                        !options.normalize));
    job.needs_scores = !is_softmax && (has_bias || options.num_groups > 1);
    route_all(job);
  });
}

}  // namespace perseid::kernels
