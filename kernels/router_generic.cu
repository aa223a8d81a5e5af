// route for any E, K and groups, in float32 and float64. A warp takes one row after the other and
// keeps nothing in registers: it reads the row again for each of the K choices, the largest key
// that comes after the last one, or from K = 16 on for each pair of bits of the K-th largest key.
// Keys that are not the logit's own, and the choices, lie in memory of the warp. About K*E/32 loads
// of a warp for each token, or 8 to 16 times E/32, from the first-level cache. Sums as in
// router_sums.cu, with one part for each warp. Arithmetic in the type of the logits. Deterministic.
#include <algorithm>

#include "kernels/router_job.cuh"
#include "kernels/router_math.h"
#include "kernels/router_places.cuh"
#include "kernels/router_radix.cuh"
#include "kernels/router_row.cuh"

namespace perseid::kernels {
namespace {

constexpr int kWarps = kRouterThreads / kWarpSize;
constexpr int64_t kBlocksMax = 264;
/// Where Transformer Engine changes from scans to a radix selection (fused router, release 2.18).
constexpr int64_t kRadixTopKMin = 16;

/// Memory of all warps.
template <typename T>
struct WarpSpace {
  SignedKey<T>* keys;        ///< [warps, E] if there is a bias or groups
  SignedKey<T>* group_keys;  ///< [warps, groups]
  int32_t* is_kept;          ///< [warps, groups]
  int32_t* choices;          ///< [warps, K]
  int32_t* found;            ///< [warps, K] from kRadixTopKMin on
};

template <typename T>
__device__ __forceinline__ T sum_of_warp(T value) {
  return sum_of_lanes<kWarpSize>(value);
}

/// What holds for a whole row.
template <typename T>
struct Facts {
  T max;        ///< NaN counts as -inf
  T sum;        ///< of softmax_term
  T clean_sum;  ///< of those that are no NaN
  bool is_non_finite;
};

template <typename T>
__device__ __forceinline__ Facts<T> describe_row(const T* row, int64_t num_experts) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  Facts<T> facts;
  SignedKey<T> max_key = std::numeric_limits<SignedKey<T>>::lowest();
  bool is_non_finite = false;
  for (int64_t e = lane; e < num_experts; e += kWarpSize) {
    const T z = row[e];
    const SignedKey<T> key = signed_key(z);
    max_key = key > max_key ? key : max_key;
    is_non_finite = is_non_finite || is_nan(z) || is_infinite(z);
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const SignedKey<T> other = __shfl_xor_sync(kFullWarp, max_key, offset);
    max_key = other > max_key ? other : max_key;
  }
  facts.max = value_of_key<T>(max_key);
  facts.is_non_finite = __any_sync(kFullWarp, is_non_finite) != 0;
  T sum = 0, clean_sum = 0;
  for (int64_t e = lane; e < num_experts; e += kWarpSize) {
    const T term = softmax_term(row[e], facts.max);
    sum += term;
    clean_sum += is_nan(term) ? T{0} : term;
  }
  facts.sum = sum_of_warp(sum);
  facts.clean_sum = sum_of_warp(clean_sum);
  return facts;
}

/// Keys of score + bias.
template <typename T>
__device__ __forceinline__ void write_score_keys(const RouterJob<T>& job, const T* row,
                                                 const Facts<T>& facts, SignedKey<T>* keys) {
  const bool is_softmax = job.score_function == ScoreFunction::kSoftmax;
  const T scale = T{1} / facts.clean_sum;
  for (int64_t e = threadIdx.x % kWarpSize; e < job.num_experts; e += kWarpSize) {
    const T z = row[e];
    const T score =
        is_softmax ? softmax_term(z, facts.max) * scale : score_of(job.score_function, z);
    keys[e] = biased_key(z, score, job.expert_bias == nullptr ? 0.0f : job.expert_bias[e]);
  }
  __syncwarp();
}

/// Marks the best groups, by their largest key or by the sum of their two largest values; an
/// infinite sum of both signs counts as -inf.
template <typename T>
__device__ __forceinline__ void choose_groups(const RouterJob<T>& job, const SignedKey<T>* keys,
                                              bool is_sum_of_two, SignedKey<T>* group_keys,
                                              int32_t* is_kept) {
  using Key = SignedKey<T>;
  const int64_t group_size = job.num_experts / job.num_groups;
  for (int64_t g = threadIdx.x % kWarpSize; g < job.num_groups; g += kWarpSize) {
    Key first = std::numeric_limits<Key>::lowest(), second = first;
    for (int64_t e = g * group_size; e < (g + 1) * group_size; ++e) {
      const Key smaller = keys[e] < first ? keys[e] : first;
      first = keys[e] > first ? keys[e] : first;
      second = smaller > second ? smaller : second;
    }
    group_keys[g] =
        is_sum_of_two ? signed_key(value_of_key<T>(first) + value_of_key<T>(second)) : first;
    is_kept[g] = 0;
  }
  __syncwarp();
  Place<Key> group = first_place<Key>();
  for (int64_t i = 0; i < job.topk_groups; ++i) {
    group = next_place(job.num_groups, group, [&](int64_t g) { return group_keys[g]; });
    if (threadIdx.x % kWarpSize == 0) is_kept[group.index] = 1;
  }
  __syncwarp();
}

/// Writes the keys of the selection, unless they are those of the logits themselves.
template <typename T>
__device__ __forceinline__ void write_keys(const RouterJob<T>& job, const T* row,
                                           const Facts<T>& facts, int64_t warp,
                                           const WarpSpace<T>& space) {
  SignedKey<T>* const keys = space.keys + warp * job.num_experts;
  const bool has_bias = job.expert_bias != nullptr, has_groups = job.has_groups();
  const bool is_sum_of_two = has_bias || job.score_function != ScoreFunction::kSoftmax;
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const auto write_logit_keys = [&] {
    for (int64_t e = lane; e < job.num_experts; e += kWarpSize) keys[e] = signed_key(row[e]);
    __syncwarp();
  };
  if (is_sum_of_two) {
    write_score_keys(job, row, facts, keys);
  } else {
    write_logit_keys();
  }
  if (!has_groups) return;
  int32_t* const is_kept = space.is_kept + warp * job.num_groups;
  choose_groups(job, keys, is_sum_of_two, space.group_keys + warp * job.num_groups, is_kept);
  if (!has_bias) write_logit_keys();
  const int64_t group_size = job.num_experts / job.num_groups;
  // Below -inf: not chosen even where the best groups hold nothing finite.
  for (int64_t e = lane; e < job.num_experts; e += kWarpSize) {
    if (is_kept[e / group_size] == 0) keys[e] = std::numeric_limits<SignedKey<T>>::lowest() + 1;
  }
  __syncwarp();
}

template <typename T>
__device__ __forceinline__ void choose_experts(const RouterJob<T>& job, const T* row,
                                               const SignedKey<T>* keys, int32_t* found,
                                               int32_t* choices) {
  const auto key_at = [&](int64_t e) { return keys == nullptr ? signed_key(row[e]) : keys[e]; };
  if (job.top_k >= kRadixTopKMin) {
    return select_by_radix<SignedKey<T>>(job.num_experts, job.top_k, key_at, found, choices);
  }
  Place<SignedKey<T>> choice = first_place<SignedKey<T>>();
  for (int64_t k = 0; k < job.top_k; ++k) {
    choice = next_place(job.num_experts, choice, key_at);
    if (threadIdx.x % kWarpSize == 0) choices[k] = static_cast<int32_t>(choice.index);
  }
  __syncwarp();
}

/// Where choice k goes: choices are in the order of their logits.
template <typename T>
__device__ __forceinline__ int64_t place_of_choice(const RouterJob<T>& job, const T* row,
                                                   const int32_t* choices, int64_t k) {
  if (job.expert_bias == nullptr) return k;
  const Place<SignedKey<T>> mine{signed_key(row[choices[k]]), choices[k]};
  int64_t place = 0;
  for (int64_t i = 0; i < job.top_k; ++i) {
    const Place<SignedKey<T>> other{signed_key(row[choices[i]]), choices[i]};
    place += other.is_before(mine);
  }
  return place;
}

/// Writes ids and weights and adds what the choices give to the sums.
template <typename T>
__device__ __forceinline__ void write_choices(const RouterJob<T>& job, int64_t token, const T* row,
                                              const Facts<T>& facts, const int32_t* choices,
                                              ScalarSums& scalars) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool is_softmax = job.score_function == ScoreFunction::kSoftmax;
  const bool is_of_all = is_softmax && !job.normalize;
  T max = facts.max, sum = facts.sum;
  if (is_of_all) {
    // A row of -inf shares among its choices.
    if (max == -std::numeric_limits<T>::infinity() && !is_nan(sum)) sum = static_cast<T>(job.top_k);
  } else {
    SignedKey<T> max_key = std::numeric_limits<SignedKey<T>>::lowest();
    for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
      const SignedKey<T> key = signed_key(row[choices[k]]);
      max_key = key > max_key ? key : max_key;
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const SignedKey<T> other = __shfl_xor_sync(kFullWarp, max_key, offset);
      max_key = other > max_key ? other : max_key;
    }
    max = value_of_key<T>(max_key);
    sum = 0;
    for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
      sum += choice_term(job.score_function, job.normalize, row[choices[k]], max);
    }
    sum = sum_of_warp(sum) + (is_softmax ? T{0} : T{1e-20});
    if (!job.normalize) sum = 1;
  }
  const T scale = job.route_scale / sum;
  for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
    const int32_t e = choices[k];
    const T weight = choice_term(job.score_function, job.normalize, row[e], max) * scale;
    const int64_t at = token * job.top_k + place_of_choice(job, row, choices, k);
    if (job.expert_idx != nullptr) job.expert_idx[at] = e;
    if (job.weights != nullptr) job.weights[at] = weight;
    scalars.entropy += static_cast<double>(entropy_term(weight));
    if (job.tokens_per_expert != nullptr) {
      atomicAdd(reinterpret_cast<unsigned long long*>(job.tokens_per_expert + e), 1ull);
    }
  }
}

/// Adds the shares of a row to the warp's part of the sums and writes them.
template <typename T>
__device__ __forceinline__ void add_shares(const RouterJob<T>& job, const T* row,
                                           const Facts<T>& facts, T* shares, double* part) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const T c = share_shift(facts.max), floor = exp_of(-c);
  const auto term = [&](int64_t e) {
    return share_term(job.score_function, row[e], facts.max, c, floor);
  };
  T sum = facts.sum;
  if (job.score_function != ScoreFunction::kSoftmax) {
    sum = 0;
    for (int64_t e = lane; e < job.num_experts; e += kWarpSize) sum += term(e);
    sum = sum_of_warp(sum);
  }
  const T scale = T{1} / sum;
  for (int64_t e = lane; e < job.num_experts; e += kWarpSize) {
    const T share = term(e) * scale;
    if (shares != nullptr) shares[e] = share;
    if (part != nullptr) part[e] += static_cast<double>(share);
  }
}

template <typename T>
__device__ __forceinline__ void write_invalid(const RouterJob<T>& job, int64_t token) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
    if (job.expert_idx != nullptr) job.expert_idx[token * job.top_k + k] = -1;
    if (job.weights != nullptr) job.weights[token * job.top_k + k] = T{0};
  }
  for (int64_t e = lane; job.score_shares != nullptr && e < job.num_experts; e += kWarpSize) {
    job.score_shares[token * job.num_experts + e] = T{0};
  }
}

// ---- kernel ------------------------------------------------------------------------------------
/// Registers: 96.
template <typename T>
__global__ void __launch_bounds__(kRouterThreads, 4)
    route_generic_kernel(RouterJob<T> job, WarpSpace<T> space) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  double* const part =
      job.score_sum == nullptr ? nullptr : job.score_parts + warp * job.num_experts;
  for (int64_t e = lane; part != nullptr && e < job.num_experts; e += kWarpSize) part[e] = 0.0;
  int32_t* const choices = space.choices + warp * job.top_k;
  ScalarSums scalars;
  for (int64_t token = warp; token < job.num_tokens; token += int64_t{gridDim.x} * kWarps) {
    if (job.valid != nullptr && job.valid[token] == 0) {
      write_invalid(job, token);
      continue;
    }
    const T* const row = job.logits + token * job.num_experts;
    const Facts<T> facts = describe_row(row, job.num_experts);
    const SignedKey<T>* keys = nullptr;
    if (space.keys != nullptr) {
      write_keys(job, row, facts, warp, space);
      keys = space.keys + warp * job.num_experts;
    }
    choose_experts(job, row, keys, space.found + warp * job.top_k, choices);
    write_choices(job, token, row, facts, choices, scalars);
    if (lane == 0) {
      const double lse = log_sum_exp_of(facts.max, facts.sum);
      scalars.lse_square += lse * lse;
      if (facts.is_non_finite) scalars.non_finite += 1.0;
    }
    if (job.score_sum != nullptr || job.score_shares != nullptr) {
      add_shares(job, row, facts,
                 job.score_shares == nullptr ? nullptr : job.score_shares + token * job.num_experts,
                 part);
    }
    __syncwarp();  // the next row overwrites what other lanes still read
  }
  const double entropy = sum_of_warp(scalars.entropy);
  if (lane == 0) {
    double* const sums = job.scalar_parts + warp * 3;
    sums[0] = scalars.lse_square;
    sums[1] = entropy;
    sums[2] = scalars.non_finite;
  }
}

}  // namespace

// ---- launch ------------------------------------------------------------------------------------
template <typename T>
void route_generic(RouterJob<T>& job, const Stream& stream) {
  const int64_t blocks = std::min(ceil_div(job.num_tokens, kWarps), kBlocksMax);
  const int64_t warps = blocks * kWarps;
  const DeviceMemory parts = make_parts(warps, stream, job);
  const bool has_keys = job.expert_bias != nullptr || job.has_groups();
  const int64_t num_keys = has_keys ? job.num_experts : 0;
  const int64_t num_groups = job.has_groups() ? job.num_groups : 0;
  const DeviceMemory keys(warps * (num_keys + num_groups) * int64_t{sizeof(T)}, stream);
  const int64_t num_found = job.top_k >= kRadixTopKMin ? job.top_k : 0;
  const DeviceMemory places(warps * (num_groups + job.top_k + num_found) * int64_t{sizeof(int32_t)},
                            stream);
  WarpSpace<T> space{};
  space.keys = has_keys ? keys.as<SignedKey<T>>() : nullptr;
  space.group_keys = keys.as<SignedKey<T>>() + warps * num_keys;
  space.choices = places.as<int32_t>();
  space.found = space.choices + warps * job.top_k;
  space.is_kept = space.found + warps * num_found;
  launch("route", &route_generic_kernel<T>, blocks, kRouterThreads, stream, job, space);
  if (job.has_sums()) finish_sums(job, warps, stream);
}
template void route_generic(RouterJob<float>&, const Stream&);
template void route_generic(RouterJob<double>&, const Stream&);

}  // namespace perseid::kernels
