#pragma once
#include <cstdint>
#include <limits>

#include "kernels/launch.cuh"

// The order of keys in memory, one after the other: for rows of any length. Private to this folder.

namespace perseid::kernels {

/// What comes next among keys that are ordered by size, then by index.
template <typename Key>
struct Place {
  Key key;
  int64_t index;
  __device__ bool is_before(const Place& other) const {
    return key > other.key || (key == other.key && index < other.index);
  }
};

/// The first of the `count` keys that comes after `last`.
template <typename Key, typename KeyAt>
__device__ __forceinline__ Place<Key> next_place(int64_t count, const Place<Key>& last,
                                                 KeyAt key_at) {
  Place<Key> best{std::numeric_limits<Key>::lowest(), count};
  for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    const Place<Key> mine{key_at(i), i};
    if (last.is_before(mine) && mine.is_before(best)) best = mine;
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Place<Key> other{__shfl_xor_sync(kFullWarp, best.key, offset),
                           __shfl_xor_sync(kFullWarp, best.index, offset)};
    if (other.is_before(best)) best = other;
  }
  return best;
}
template <typename Key>
__device__ __forceinline__ Place<Key> first_place() {
  return {std::numeric_limits<Key>::max(), -1};
}

}  // namespace perseid::kernels
