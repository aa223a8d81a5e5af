// route in float32 with K <= 16 and E <= 1024, whatever is asked for: other scores than the
// softmax, a bias, shares, and the sums over tokens, all from the registers that hold the row (see
// router.cu). Each block adds what its tokens give in shared memory, in double and in one order; a
// last kernel adds the blocks. Counts are integer atomics. Reads T*E*4 B, writes T*K*8 B, and
// T*E*4 B for the shares. Deterministic.
#include <algorithm>

#include "kernels/prim.cuh"
#include "kernels/router_job.cuh"
#include "kernels/router_math.h"
#include "kernels/router_row.cuh"

namespace perseid::kernels {
namespace {

/// Two blocks for each slot of 132 multiprocessors of two such blocks; more only add parts.
constexpr int64_t kBlocksMax = 528;
constexpr int kExpertsPerBlock = 32;
constexpr int kPartLanes = 16;

/// A token's row in its lanes, and what holds for the whole row.
template <int kPerLane>
struct Row {
  float logits[kPerLane];
  float terms[kPerLane];  ///< softmax_term, 0 past the end; if wanted
  float max;              ///< NaN counts as -inf
  float sum;              ///< of the terms
  bool is_non_finite;
};

template <int kWidth, int kPerLane>
__device__ __forceinline__ void describe_row(int num_experts, int first, bool wants_terms,
                                             int32_t (&keys)[kPerLane], Row<kPerLane>& row) {
  int32_t max_key = kNoKeyOf<int32_t>;
  bool is_non_finite = false;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys[i] = lean_key(row.logits[i]);
    max_key = keys[i] > max_key ? keys[i] : max_key;
    is_non_finite = is_non_finite || (first + i < num_experts &&
                                      (is_nan(row.logits[i]) || is_infinite(row.logits[i])));
  }
  row.is_non_finite = is_non_finite;
  row.max = value_of_key<float>(max_of_lanes<kWidth>(max_key));
  row.sum = 1.0f;
  if (!wants_terms) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    row.terms[i] = first + i < num_experts ? softmax_term(row.logits[i], row.max) : 0.0f;
    sum += row.terms[i];
  }
  row.sum = sum_of_lanes<kWidth>(sum);
}

/// Keys of score + bias.
template <int kWidth, int kPerLane>
__device__ __forceinline__ void bias_keys(const RouterJob<float>& job, int first,
                                          const Row<kPerLane>& row, int32_t (&keys)[kPerLane]) {
  const auto num_experts = static_cast<int>(job.num_experts);
  const bool is_softmax = job.score_function == ScoreFunction::kSoftmax;
  float scale = 1.0f;
  if (is_softmax) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += is_nan(row.terms[i]) ? 0.0f : row.terms[i];
    scale = 1.0f / sum_of_lanes<kWidth>(sum);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (first + i >= num_experts) continue;  // its key is that of -inf
    const float score =
        is_softmax ? row.terms[i] * scale : score_of(job.score_function, row.logits[i]);
    keys[i] = biased_key(row.logits[i], score, job.expert_bias[first + i]);
  }
}

/// Where a choice goes: choices are in the order of their logits, but a bias has selected them by
/// another.
template <int kWidth>
__device__ __forceinline__ int place_of_choice(int32_t key, int32_t choice, int top_k) {
  int place = 0;
  for (int k = 0; k < top_k; ++k) {
    const int32_t other_key = __shfl_sync(kFullWarp, key, k, kWidth);
    const int32_t other = __shfl_sync(kFullWarp, choice, k, kWidth);
    place += other_key > key || (other_key == key && other < choice);
  }
  return place;
}

template <int kWidth, int kPerLane, int kChoices>
__device__ __forceinline__ float choice_weight(const RouterJob<float>& job,
                                               const Row<kPerLane>& row, float logit, int32_t key,
                                               bool is_choice) {
  const bool is_softmax = job.score_function == ScoreFunction::kSoftmax;
  if (is_softmax && !job.normalize) {
    // A row of -inf shares among its choices.
    const bool is_uniform = row.max == -std::numeric_limits<float>::infinity() && !is_nan(row.sum);
    const float sum = is_uniform ? static_cast<float>(job.top_k) : row.sum;
    return softmax_term(logit, row.max) * (job.route_scale / sum);
  }
  const int32_t max_key = max_of_lanes<kWidth>(is_choice ? key : kNoKeyOf<int32_t>);
  const float max = value_of_key<float>(max_key);
  const float term = is_choice ? choice_term(job.score_function, job.normalize, logit, max) : 0.0f;
  float sum = 1.0f;
  if (job.normalize) sum = sum_of_lanes<kChoices>(term) + (is_softmax ? 0.0f : 1e-20f);
  return term * (job.route_scale / sum);
}

/// Adds the shares of a row to its lane's sums and writes them.
template <int kWidth, int kPerLane>
__device__ __forceinline__ void add_shares(const RouterJob<float>& job, int first, bool is_valid,
                                           Row<kPerLane>& row, float* shares, double* sums) {
  const auto num_experts = static_cast<int>(job.num_experts);
  float sum = row.sum;
  if (job.score_function != ScoreFunction::kSoftmax) {
    const float c = share_shift(row.max), floor = exp_of(-c);
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float term = share_term(job.score_function, row.logits[i], row.max, c, floor);
      row.terms[i] = first + i < num_experts ? term : 0.0f;
      part += row.terms[i];
    }
    sum = sum_of_lanes<kWidth>(part);
  }
  const float scale = 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (first + i >= num_experts) continue;
    const float share = is_valid ? row.terms[i] * scale : 0.0f;
    if (shares != nullptr) shares[first + i] = share;
    sums[i * kWidth] += static_cast<double>(share);
  }
}

/// @param kIsPlain  softmax without a bias, and rows that fill the registers and allow wide
/// accesses
template <int kWidth, int kPerLane, int kChoices, bool kIsPlain>
__device__ __forceinline__ void route_rows(RouterJob<float> job) {
  constexpr int kTokens = kRouterThreads / kWidth;
  constexpr int kSlots = kWidth * kPerLane;
  if constexpr (kIsPlain) {  // what the compiler then knows
    job.score_function = ScoreFunction::kSoftmax;
    job.expert_bias = nullptr;
    job.num_experts = kSlots;
  }
  using BlockReduce = prim::BlockReduce<double, kRouterThreads>;
  __shared__ double sums[kTokens * kSlots];  // slot i * kWidth + lane: no two lanes of one bank
  __shared__ int counts[kSlots];
  __shared__ typename BlockReduce::TempStorage storage;

  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWidth, first = lane * kPerLane;
  const auto num_experts = static_cast<int>(job.num_experts), top_k = static_cast<int>(job.top_k);
  const bool is_softmax = job.score_function == ScoreFunction::kSoftmax;
  const bool has_bias = job.expert_bias != nullptr;
  const bool wants_shares = job.score_sum != nullptr || job.score_shares != nullptr;
  const bool wants_terms =
      job.lse_square_sum != nullptr || (is_softmax && (wants_shares || has_bias || !job.normalize));
  for (int i = thread; i < kTokens * kSlots; i += kRouterThreads) sums[i] = 0.0;
  for (int i = thread; i < kSlots; i += kRouterThreads) counts[i] = 0;
  __syncthreads();

  ScalarSums scalars;
  const int64_t stride = int64_t{gridDim.x} * kTokens;
  for (int64_t begin = int64_t{blockIdx.x} * kTokens; begin < job.num_tokens; begin += stride) {
    // All lanes go on, the last token again: they exchange values.
    const int64_t own = begin + thread / kWidth;
    const bool is_inside = own < job.num_tokens;
    const int64_t token = is_inside ? own : job.num_tokens - 1;
    const bool is_valid = is_inside && (job.valid == nullptr || job.valid[token] != 0);
    const float* const logits = job.logits + token * job.num_experts;

    Row<kPerLane> row;
    int32_t keys[kPerLane];
    read_lane<kIsPlain>(logits, num_experts, first, row.logits);
    describe_row<kWidth>(num_experts, first, wants_terms, keys, row);
    if (has_bias) bias_keys<kWidth>(job, first, row, keys);
    const int32_t choice = select_choice<kChoices, kWidth>(keys);
    const bool is_choice = lane < top_k;
    const float logit = is_choice ? logits[choice] : 0.0f;
    const int32_t key = lean_key(logit);
    const int place = has_bias ? place_of_choice<kWidth>(key, choice, top_k) : lane;
    const float weight = choice_weight<kWidth, kPerLane, kChoices>(job, row, logit, key, is_choice);
    if (is_inside && is_choice) {
      const int64_t at = token * job.top_k + place;
      if (job.expert_idx != nullptr) job.expert_idx[at] = is_valid ? choice : -1;
      if (job.weights != nullptr) job.weights[at] = is_valid ? weight : 0.0f;
      if (is_valid) {
        scalars.entropy += static_cast<double>(entropy_term(weight));
        if (job.tokens_per_expert != nullptr) atomicAdd(&counts[choice], 1);
      }
    }
    const unsigned group = kWidth == kWarpSize ? kFullWarp : (1u << kWidth % kWarpSize) - 1u;
    const unsigned broken =
        __ballot_sync(kFullWarp, row.is_non_finite) >> (thread % kWarpSize - lane) & group;
    if (is_valid && lane == 0) {
      if (broken != 0) scalars.non_finite += 1.0;
      if (job.lse_square_sum != nullptr) {
        const double lse = log_sum_exp_of(row.max, row.sum);
        scalars.lse_square += lse * lse;
      }
    }
    if (wants_shares) {
      float* const shares = job.score_shares != nullptr && is_inside
                                ? job.score_shares + token * job.num_experts
                                : nullptr;
      add_shares<kWidth>(job, first, is_valid, row, shares, sums + thread / kWidth * kSlots + lane);
    }
  }

  __syncthreads();
  for (int i = thread; i < kSlots; i += kRouterThreads) {
    const int expert = i % kWidth * kPerLane + i / kWidth;
    if (expert >= num_experts) continue;
    double sum = 0.0;
    for (int j = 0; j < kTokens; ++j) sum += sums[j * kSlots + i];
    if (job.score_sum != nullptr) {
      job.score_parts[int64_t{blockIdx.x} * num_experts + expert] = sum;
    }
    // Counts are by expert, not by slot.
    if (counts[expert] != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(job.tokens_per_expert + expert),
                static_cast<unsigned long long>(counts[expert]));
    }
  }
  const double values[3] = {scalars.lse_square, scalars.entropy, scalars.non_finite};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const double sum = BlockReduce(storage).Sum(values[i]);
    if (thread == 0) job.scalar_parts[int64_t{blockIdx.x} * 3 + i] = sum;
    __syncthreads();
  }
}

// ---- kernels -----------------------------------------------------------------------------------
/// Registers: 80. Shared: 9344. Rows of up to 256 logits.
template <int kWidth, int kPerLane, int kChoices, bool kIsPlain>
__global__ void __launch_bounds__(kRouterThreads) route_sums_kernel(RouterJob<float> job) {
  route_rows<kWidth, kPerLane, kChoices, kIsPlain>(job);
}
/// Registers: 168. Shared: 37120. Longer rows.
template <int kWidth, int kPerLane, int kChoices, bool kIsPlain>
__global__ void __launch_bounds__(kRouterThreads) route_long_sums_kernel(RouterJob<float> job) {
  route_rows<kWidth, kPerLane, kChoices, kIsPlain>(job);
}

/// Registers: 40. Shared: 4352. Blocks of 32 experts, whose parts 16 threads each add, then one;
/// the last block has the other sums.
template <typename T>
__global__ void __launch_bounds__(kExpertsPerBlock* kPartLanes)
    finish_sums_kernel(RouterJob<T> job, int64_t parts) {
  constexpr int kThreads = kExpertsPerBlock * kPartLanes;
  __shared__ double sums[kThreads];
  const auto thread = static_cast<int>(threadIdx.x);
  const bool is_last = blockIdx.x + 1 == gridDim.x;
  // The last block has three columns, which are padded to 32 as well.
  const double* const source = is_last ? job.scalar_parts : job.score_parts;
  const int64_t columns = is_last ? 3 : job.num_experts;
  const int64_t column =
      (is_last ? 0 : int64_t{blockIdx.x} * kExpertsPerBlock) + thread % kExpertsPerBlock;
  const bool is_wanted = column < columns && (is_last || job.score_sum != nullptr);
  double sum = 0.0;
  for (int64_t part = thread / kExpertsPerBlock; is_wanted && part < parts; part += kPartLanes) {
    sum += source[part * columns + column];
  }
  sums[thread] = sum;
  __syncthreads();
  if (thread >= kExpertsPerBlock || !is_wanted) return;
  for (int i = 1; i < kPartLanes; ++i) sum += sums[i * kExpertsPerBlock + thread];
  if (!is_last) {
    job.score_sum[column] = static_cast<T>(sum);
  } else if (column == 0 && job.lse_square_sum != nullptr) {
    *job.lse_square_sum = static_cast<T>(sum);
  } else if (column == 1 && job.entropy_sum != nullptr) {
    *job.entropy_sum = sum;
  } else if (column == 2 && job.non_finite_tokens != nullptr) {
    *job.non_finite_tokens = static_cast<int64_t>(sum);
  }
}

}  // namespace

// ---- launch ------------------------------------------------------------------------------------
template <typename T>
void finish_sums(const RouterJob<T>& job, int64_t parts, const Stream& stream) {
  const int64_t blocks = job.score_sum == nullptr ? 0 : ceil_div(job.num_experts, kExpertsPerBlock);
  launch("route", &finish_sums_kernel<T>, blocks + 1, kExpertsPerBlock * kPartLanes, stream, job,
         parts);
}
template void finish_sums(const RouterJob<float>&, int64_t, const Stream&);
template void finish_sums(const RouterJob<double>&, int64_t, const Stream&);

template <int kExperts, int kChoices>
void launch_sums(RouterJob<float>& job, const Stream& stream) {
  constexpr int kWidth = kExperts < kWarpSize ? kExperts : kWarpSize;
  constexpr int kPerLane = kExperts / kWidth;
  const int64_t blocks = std::min(ceil_div(job.num_tokens, kRouterThreads / kWidth), kBlocksMax);
  const DeviceMemory parts = make_parts(blocks, stream, job);
  const auto launch_one = [&]<bool kIsPlain>() {
    // The others exist for 2, 8 and 16 choices, which saves much time to compile.
    constexpr int kAtLeast = kIsPlain ? kChoices : kChoices <= 2 ? 2 : kChoices <= 8 ? 8 : 16;
    constexpr int kMade = kAtLeast < kWidth ? kAtLeast : kWidth;
    if constexpr (kPerLane <= 8) {
      launch("route", &route_sums_kernel<kWidth, kPerLane, kMade, kIsPlain>, blocks, kRouterThreads,
             stream, job);
    } else {
      launch("route", &route_long_sums_kernel<kWidth, kPerLane, kMade, kIsPlain>, blocks,
             kRouterThreads, stream, job);
    }
  };
  const bool is_plain = job.score_function == ScoreFunction::kSoftmax &&
                        job.expert_bias == nullptr && job.num_experts == kExperts &&
                        reinterpret_cast<uintptr_t>(job.logits) % 16 == 0;
  if (is_plain) {
    launch_one.template operator()<true>();
  } else {
    launch_one.template operator()<false>();
  }
  if (job.has_sums()) finish_sums(job, blocks, stream);
}
template <int kExperts>
void launch_row(RouterJob<float>& job, const Stream& stream) {
  if constexpr (kExperts < kRegisterExperts) {
    if (job.num_experts > kExperts) return launch_row<2 * kExperts>(job, stream);
  }
  dispatch_choices<kExperts>(job.top_k,
                             [&]<int kChoices>() { launch_sums<kExperts, kChoices>(job, stream); });
}

void route_with_sums(RouterJob<float>& job, const Stream& stream) { launch_row<2>(job, stream); }

}  // namespace perseid::kernels
