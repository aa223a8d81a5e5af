#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/launch.cuh"
#include "kernels/ordered_key.h"

// The K largest keys of a row that the registers of one warp hold, equal keys by smaller index. A
// token has kWidth lanes, so a warp has 32 / kWidth tokens; lane l of a token holds its logits
// l * kPerLane and following. Each lane sorts its own keys without their indices, which takes two
// instructions for each comparison. Then kChoices times the largest head of all lanes is taken off
// its list. Where the choice stood in its lane is looked up once, in the end. Private to this
// folder.

namespace perseid::kernels {

/// Below the key of every float.
inline constexpr int32_t kNoKey = std::numeric_limits<int32_t>::lowest();

/// signed_key of ordered_key.h by float arithmetic, in four instructions.
__device__ __forceinline__ int32_t lean_key(float value) {
  const float clean = fmaxf(value + 0.0f, -std::numeric_limits<float>::infinity());
  const auto bits = std::bit_cast<int32_t>(clean);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

__device__ __forceinline__ void order_two(int32_t& larger, int32_t& smaller) {
  const int32_t high = larger > smaller ? larger : smaller;
  smaller = larger > smaller ? smaller : larger;
  larger = high;
}

/// Batcher's odd-even mergesort of keys[kFirst, kFirst + kCount), largest first: 19 comparisons for
/// 8 keys, 63 for 16.
template <int kFirst, int kCount, int kStride, int kSize>
__device__ __forceinline__ void merge_halves(int32_t (&keys)[kSize]) {
  constexpr int kNext = 2 * kStride;
  if constexpr (kNext < kCount) {
    merge_halves<kFirst, kCount, kNext>(keys);
    merge_halves<kFirst + kStride, kCount, kNext>(keys);
#pragma unroll
    for (int i = kFirst + kStride; i + kStride < kFirst + kCount; i += kNext) {
      order_two(keys[i], keys[i + kStride]);
    }
  } else {
    order_two(keys[kFirst], keys[kFirst + kStride]);
  }
}
template <int kFirst, int kCount, int kSize>
__device__ __forceinline__ void sort_keys(int32_t (&keys)[kSize]) {
  if constexpr (kCount > 1) {
    sort_keys<kFirst, kCount / 2>(keys);
    sort_keys<kFirst + kCount / 2, kCount / 2>(keys);
    merge_halves<kFirst, kCount, 1>(keys);
  }
}

/// best = the kList largest of best and other, sorted as they are.
template <int kList>
__device__ __forceinline__ void keep_best(int32_t (&best)[kList], const int32_t (&other)[kList]) {
#pragma unroll
  for (int i = 0; i < kList; ++i) {
    const int32_t key = other[kList - 1 - i];
    best[i] = best[i] > key ? best[i] : key;
  }
#pragma unroll
  for (int stride = kList / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int i = 0; i < kList; ++i) {
      if ((i & stride) == 0) order_two(best[i], best[i + stride]);
    }
  }
}

/// The kList largest of a lane's keys, largest first.
template <int kPerLane, int kList>
__device__ __forceinline__ void sort_lane(const int32_t (&keys)[kPerLane], int32_t (&best)[kList]) {
#pragma unroll
  for (int i = 0; i < kList; ++i) best[i] = keys[i];
  sort_keys<0, kList>(best);
#pragma unroll
  for (int first = kList; first < kPerLane; first += kList) {
    int32_t other[kList];
#pragma unroll
    for (int i = 0; i < kList; ++i) other[i] = keys[first + i];
    sort_keys<0, kList>(other);
    keep_best(best, other);
  }
}

/// Largest value of a token's lanes, in all of them.
template <int kWidth>
__device__ __forceinline__ int32_t max_of_lanes(int32_t value) {
  if constexpr (kWidth == kWarpSize) {
    return __reduce_max_sync(kFullWarp, value);
  } else {
#pragma unroll
    for (int offset = kWidth / 2; offset > 0; offset /= 2) {
      const int32_t other = __shfl_xor_sync(kFullWarp, value, offset, kWidth);
      value = value > other ? value : other;
    }
    return value;
  }
}

/// Lane k of a token's lanes gets the index of choice k < kChoices; other lanes get rubbish. All
/// lanes of the warp take part. kChoices <= kWidth.
template <int kChoices, int kWidth, int kPerLane>
__device__ __forceinline__ int32_t select_choice(const int32_t (&keys)[kPerLane]) {
  static_assert(kChoices <= kWidth && kPerLane <= 32);
  constexpr int kList = kPerLane < kChoices ? kPerLane : kChoices;
  int32_t best[kList];
  sort_lane(keys, best);

  const auto lane = static_cast<int>(threadIdx.x) % kWidth;
  const auto first_lane = static_cast<int>(threadIdx.x) % kWarpSize / kWidth * kWidth;
  const unsigned lower_lanes = ((1u << lane) - 1u) << first_lane;
  int32_t choice = kNoKey;
  unsigned holders = 0;
#pragma unroll
  for (int k = 0; k < kChoices; ++k) {
    const int32_t largest = max_of_lanes<kWidth>(best[0]);
    const bool is_head = best[0] == largest;
    const unsigned heads = __ballot_sync(kFullWarp, is_head);
    if (lane == k) {
      choice = largest;
      holders = heads;
    }
    // The lowest lane holds the smaller indices, so it gives its head.
    const bool is_taken = is_head && (heads & lower_lanes) == 0;
#pragma unroll
    for (int i = 0; i < kList && i + k + 1 < kChoices; ++i) {
      const int32_t next = i + 1 < kList ? best[i + 1] : kNoKey;
      best[i] = is_taken ? next : best[i];
    }
  }

  const int source = __ffs(static_cast<int>(holders >> first_lane)) - 1;
  if constexpr (kPerLane == 1) return source;
  unsigned places = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (__shfl_sync(kFullWarp, keys[i], source, kWidth) == choice) places |= 1u << i;
  }
  // Equal choices of one lane follow each other: the n-th of them is at the n-th of these places.
  const int32_t choice_before = __shfl_up_sync(kFullWarp, choice, 1, kWidth);
  const int source_before = __shfl_up_sync(kFullWarp, source, 1, kWidth);
  const bool is_repeated = choice_before == choice && source_before == source && lane > 0;
  const unsigned repeated = __ballot_sync(kFullWarp, is_repeated) >> first_lane;
  for (int k = lane; k > 0 && (repeated >> k & 1u) != 0; --k) places &= places - 1;
  return source * kPerLane + __ffs(static_cast<int>(places)) - 1;
}

}  // namespace perseid::kernels
