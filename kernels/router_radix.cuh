#pragma once
#include <cstdint>
#include <type_traits>

#include "kernels/launch.cuh"
#include "kernels/warp.cuh"

// The K largest of a row of keys of any length, by one warp: for K where looking for one after the
// other takes longer. Private to this folder.

namespace perseid::kernels {

/// Every selected key is above the bound, or is at the bound and among the first `at_bound` there.
/// Keys are compared in the bits of `mask` alone.
template <typename Bits>
struct RadixBound {
  Bits mask = 0;
  Bits bound = 0;
  int64_t at_bound = 0;
};

/// Finds the bound bit pair by bit pair, the highest first, until as many keys agree with it as are
/// still wanted. A pass reads all keys.
/// @param bits_at  the key of an index as an unsigned integer of the same order
template <typename Bits, typename BitsAt>
__device__ __forceinline__ RadixBound<Bits> radix_bound(int64_t count, int64_t top_k,
                                                        BitsAt bits_at) {
  RadixBound<Bits> result;
  result.at_bound = top_k;
  PERSEID_ROLLED
  for (int shift = 8 * int{sizeof(Bits)} - 2; shift >= 0; shift -= 2) {
    int32_t from_1 = 0, from_2 = 0, from_3 = 0, all = 0;  // keys that agree, by their next digit
    PERSEID_ROLLED
    for (int64_t i = TokenWarp::lane(); i < count; i += kWarpSize) {
      const Bits bits = bits_at(i);
      const bool agrees = (bits & result.mask) == result.bound;
      const auto digit = static_cast<int>(bits >> shift) & 3;
      all += agrees;
      from_1 += agrees && digit >= 1;
      from_2 += agrees && digit >= 2;
      from_3 += agrees && digit == 3;
    }
    all = __reduce_add_sync(kFullWarp, all);
    from_1 = __reduce_add_sync(kFullWarp, from_1);
    from_2 = __reduce_add_sync(kFullWarp, from_2);
    from_3 = __reduce_add_sync(kFullWarp, from_3);
    const int64_t wanted = result.at_bound;
    const int digit = from_3 >= wanted ? 3 : from_2 >= wanted ? 2 : from_1 >= wanted ? 1 : 0;
    const int32_t above = digit == 3 ? 0 : digit == 2 ? from_3 : digit == 1 ? from_2 : from_1;
    const int32_t from = digit == 3 ? from_3 : digit == 2 ? from_2 : digit == 1 ? from_1 : all;
    result.mask |= Bits{3} << shift;
    result.bound |= static_cast<Bits>(digit) << shift;
    result.at_bound = wanted - above;
    if (from - above == result.at_bound) break;
  }
  return result;
}

/// Writes the K largest keys in order, equal ones by smaller index.
/// @param found   [K] working memory of the warp
/// @param places  [K] indices, in the memory of the warp
template <typename Key, typename KeyAt>
__device__ __forceinline__ void select_by_radix(int64_t count, int64_t top_k, KeyAt key_at,
                                                int32_t* found, int32_t* places) {
  using Bits = std::make_unsigned_t<Key>;
  const auto bits_at = [&](int64_t i) {
    return static_cast<Bits>(key_at(i)) ^ (Bits{1} << (8 * sizeof(Bits) - 1));
  };
  const RadixBound<Bits> bound = radix_bound<Bits>(count, top_k, bits_at);
  const int lane = TokenWarp::lane();
  const unsigned below = (1u << lane) - 1;
  int64_t num_found = 0, num_at_bound = 0;
  PERSEID_ROLLED
  for (int64_t first = 0; first < count; first += kWarpSize) {
    const bool exists = first + lane < count;
    const Bits bits = exists ? bits_at(first + lane) & bound.mask : Bits{0};
    const unsigned at_bound = __ballot_sync(kFullWarp, exists && bits == bound.bound);
    const int64_t rank = num_at_bound + __popc(at_bound & below);
    const bool is_selected =
        exists && (bits > bound.bound || (bits == bound.bound && rank < bound.at_bound));
    const unsigned selected = __ballot_sync(kFullWarp, is_selected);
    if (is_selected) {
      found[num_found + __popc(selected & below)] = static_cast<int32_t>(first + lane);
    }
    num_found += __popc(selected);
    num_at_bound += __popc(at_bound);
  }
  __syncwarp();
  // In `found` indices ascend, so that of equal keys the one found first goes first.
  PERSEID_ROLLED
  for (int64_t k = lane; k < top_k; k += kWarpSize) {
    const Key mine = key_at(found[k]);
    int64_t place = 0;
    PERSEID_ROLLED
    for (int64_t i = 0; i < top_k; ++i) {
      const Key other = key_at(found[i]);
      place += other > mine || (other == mine && i < k);
    }
    places[place] = found[k];
  }
  __syncwarp();
}

}  // namespace perseid::kernels
