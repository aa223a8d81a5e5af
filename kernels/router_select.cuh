#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/launch.cuh"
#include "kernels/ordered_key.h"

// The K largest keys of a row, equal keys by smaller index. A token has kWidth lanes, so a warp has
// 32 / kWidth tokens; lane l of a token has its logits l * kPerLane and following. Each lane sorts
// its own keys without their indices, which takes two instructions for each comparison. Then
// kChoices times the largest head of all lanes is taken off its list. Where a choice stood in its
// lane is looked up once, in the end. Private to this folder.

namespace perseid::kernels {

/// signed_key of ordered_key.h by float arithmetic, in four instructions.
__device__ __forceinline__ int32_t lean_key(float value) {
  const float clean = fmaxf(value + 0.0f, -std::numeric_limits<float>::infinity());
  const auto bits = std::bit_cast<int32_t>(clean);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

/// Keys are integers, or floats that are no NaN; equal floats may differ in the sign of 0.
__device__ __forceinline__ int32_t larger_of(int32_t a, int32_t b) { return a > b ? a : b; }
__device__ __forceinline__ int32_t smaller_of(int32_t a, int32_t b) { return a > b ? b : a; }
__device__ __forceinline__ float larger_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float smaller_of(float a, float b) { return fminf(a, b); }

/// What an empty list shows: smaller than every key, and equal to none of them. larger_of(NaN, x)
/// is x.
template <typename Key>
inline constexpr Key kNoKeyOf = std::is_same_v<Key, float> ? std::numeric_limits<Key>::quiet_NaN()
                                                           : std::numeric_limits<Key>::lowest();

template <typename Key>
__device__ __forceinline__ void order_two(Key& larger, Key& smaller) {
  const Key high = larger_of(larger, smaller);
  smaller = smaller_of(larger, smaller);
  larger = high;
}

/// Batcher's odd-even mergesort of keys[kFirst, kFirst + kCount), largest first: 19 comparisons for
/// 8 keys, 63 for 16.
template <int kFirst, int kCount, int kStride, int kSize, typename Key>
__device__ __forceinline__ void merge_halves(Key (&keys)[kSize]) {
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
template <int kFirst, int kCount, int kSize, typename Key>
__device__ __forceinline__ void sort_keys(Key (&keys)[kSize]) {
  if constexpr (kCount > 1) {
    sort_keys<kFirst, kCount / 2>(keys);
    sort_keys<kFirst + kCount / 2, kCount / 2>(keys);
    merge_halves<kFirst, kCount, 1>(keys);
  }
}

/// best = the kList largest of best and other, sorted as they are.
template <int kList, typename Key>
__device__ __forceinline__ void keep_best(Key (&best)[kList], const Key (&other)[kList]) {
#pragma unroll
  for (int i = 0; i < kList; ++i) best[i] = larger_of(best[i], other[kList - 1 - i]);
#pragma unroll
  for (int stride = kList / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int i = 0; i < kList; ++i) {
      if ((i & stride) == 0) order_two(best[i], best[i + stride]);
    }
  }
}

/// The kList largest of a lane's keys, largest first. read(first, keys) gives kList of them.
template <int kPerLane, int kList, typename Key, typename Read>
__device__ __forceinline__ void sort_lane(Read read, Key (&best)[kList]) {
  read(0, best);
  sort_keys<0, kList>(best);
#pragma unroll
  for (int first = kList; first < kPerLane; first += kList) {
    Key other[kList];
    read(first, other);
    sort_keys<0, kList>(other);
    keep_best(best, other);
  }
}

/// Largest value of a token's lanes, in all of them.
template <int kWidth, typename Key>
__device__ __forceinline__ Key max_of_lanes(Key value) {
  if constexpr (kWidth == kWarpSize && std::is_integral_v<Key>) {
    return __reduce_max_sync(kFullWarp, value);
  } else {
#pragma unroll
    for (int offset = kWidth / 2; offset > 0; offset /= 2) {
      value = larger_of(value, __shfl_xor_sync(kFullWarp, value, offset, kWidth));
    }
    return value;
  }
}

/// How many keys of a lane can become choices.
template <int kChoices, int kPerLane>
inline constexpr int kListSize = kPerLane < kChoices ? kPerLane : kChoices;

/// Lane k of a token's lanes gets the index of choice k < kChoices; other lanes get rubbish. All
/// lanes of the warp take part. kChoices <= kWidth.
/// @param read     read(first, keys): kListSize keys of this lane, from its key `first` on
/// @param read_of  read_of(source, first, keys): those of another lane of the token
template <int kChoices, int kWidth, int kPerLane, typename Key, typename Read, typename ReadOf>
__device__ __forceinline__ int32_t select_choice(Read read, ReadOf read_of) {
  static_assert(kChoices <= kWidth && kPerLane <= 32);
  constexpr int kList = kListSize<kChoices, kPerLane>;
  Key best[kList];
  sort_lane<kPerLane>(read, best);

  const auto lane = static_cast<int>(threadIdx.x) % kWidth;
  const auto first_lane = static_cast<int>(threadIdx.x) % kWarpSize / kWidth * kWidth;
  const unsigned lower_lanes = ((1u << lane) - 1u) << first_lane;
  Key choice = kNoKeyOf<Key>;
  unsigned holders = 0;
#pragma unroll
  for (int k = 0; k < kChoices; ++k) {
    const Key largest = max_of_lanes<kWidth>(best[0]);
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
      const Key next = i + 1 < kList ? best[i + 1] : kNoKeyOf<Key>;
      best[i] = is_taken ? next : best[i];
    }
  }

  const int source = (__ffs(static_cast<int>(holders >> first_lane)) - 1) & (kWidth - 1);
  if constexpr (kPerLane == 1) return source;
  unsigned places = 0;
#pragma unroll
  for (int first = 0; first < kPerLane; first += kList) {
    Key keys[kList];
    read_of(source, first, keys);
#pragma unroll
    for (int i = 0; i < kList; ++i) {
      if (keys[i] == choice) places |= 1u << (first + i);
    }
  }
  // Equal choices of one lane follow each other: the n-th of them is at the n-th of these places.
  const Key choice_before = __shfl_up_sync(kFullWarp, choice, 1, kWidth);
  const int source_before = __shfl_up_sync(kFullWarp, source, 1, kWidth);
  const bool is_repeated = choice_before == choice && source_before == source && lane > 0;
  const unsigned repeated = __ballot_sync(kFullWarp, is_repeated) >> first_lane;
  for (int k = lane; k > 0 && (repeated >> k & 1u) != 0; --k) places &= places - 1;
  return source * kPerLane + __ffs(static_cast<int>(places)) - 1;
}

/// The same with the keys in registers.
template <int kChoices, int kWidth, int kPerLane, typename Key>
__device__ __forceinline__ int32_t select_choice(const Key (&keys)[kPerLane]) {
  constexpr int kList = kListSize<kChoices, kPerLane>;
  return select_choice<kChoices, kWidth, kPerLane, Key>(
      [&](int first, Key(&some)[kList]) {
#pragma unroll
        for (int i = 0; i < kList; ++i) some[i] = keys[first + i];
      },
      [&](int source, int first, Key(&some)[kList]) {
#pragma unroll
        for (int i = 0; i < kList; ++i) {
          some[i] = __shfl_sync(kFullWarp, keys[first + i], source, kWidth);
        }
      });
}

}  // namespace perseid::kernels
