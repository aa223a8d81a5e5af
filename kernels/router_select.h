#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/ordered_key.h"
#include "kernels/simd.h"

// The K largest of one row of keys, in order; equal keys by smaller index. Private to this folder.

namespace perseid::kernels {

/// Rows are padded to whole groups of this many elements, one vector register of float32.
inline constexpr int64_t kLanes = 16;

/// Below the key of every float: padding is never chosen. One above the lowest integer, so that 1 can
/// be taken off.
template <typename T>
inline constexpr SignedKey<T> kLowestKey = std::numeric_limits<SignedKey<T>>::lowest() + 1;

/// Aligned memory in whole lanes; filled with what padding needs, -inf or the lowest key.
template <typename T>
class LaneBuffer {
 public:
  explicit LaneBuffer(int64_t count) : lanes_(static_cast<size_t>(count / kLanes)), size_(count) {
    constexpr T kPadding = std::numeric_limits<T>::has_infinity ? -std::numeric_limits<T>::infinity()
                                                                : std::numeric_limits<T>::lowest() + 1;
    for (Lanes& lanes : lanes_) {
      for (T& value : lanes.values) value = kPadding;
    }
  }
  T* data() { return lanes_.empty() ? nullptr : lanes_[0].values; }
  int64_t size() const { return size_; }

 private:
  struct Lanes {
    alignas(64) T values[kLanes];
  };
  std::vector<Lanes> lanes_;
  int64_t size_;
};

/// Up to this many experts, counting for each key how many go before it (E^2 / 16 comparisons) beats
/// a sorted list, whose branches cannot be predicted.
inline constexpr int64_t kRankedMax = 32;

/// @param keys        [num_keys padded to whole lanes] padded with kLowestKey
/// @param expert_idx  [K + 1] the last one is overwritten
PERSEID_INLINE void select_by_rank(const int32_t* keys, int64_t num_keys, int64_t top_k,
                                   int32_t* expert_idx) {
  alignas(64) int32_t ranks[kRankedMax];
  for (int64_t first = 0; first < num_keys; first += kLanes) {
    const int32_t* const mine = keys + first;
    // One loop for each group of the others, so that each vectorises over `mine`. An equal key with a
    // smaller index goes first.
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      int32_t rank = 0;
      const int32_t below = mine[i] - 1;
      for (int64_t e = 0; e < first; ++e) rank += keys[e] > below;
      ranks[first + i] = rank;
    }
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      int32_t rank = ranks[first + i];
      const int32_t key = mine[i];
      for (int64_t e = 0; e < kLanes; ++e) rank += mine[e] > key - (e < i);
      ranks[first + i] = rank;
    }
    const int64_t next = first + kLanes;
    if (next >= num_keys) break;
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      int32_t rank = ranks[first + i];
      const int32_t key = mine[i];
      for (int64_t e = next; e < num_keys; ++e) rank += keys[e] > key;
      ranks[first + i] = rank;
    }
  }
  for (int64_t e = 0; e < num_keys; ++e) {
    expert_idx[ranks[e] < top_k ? ranks[e] : top_k] = static_cast<int32_t>(e);
  }
}

/// A sorted list of the best so far; most keys fail the one comparison with its last entry.
template <typename Key>
PERSEID_INLINE void select_by_list(const Key* keys, int64_t num_keys, int64_t top_k, Key* best,
                                   int32_t* expert_idx) {
  for (int64_t k = 0; k < top_k; ++k) best[k] = std::numeric_limits<Key>::lowest();
  for (int64_t first = 0; first < num_keys; first += kLanes) {
    Key largest = std::numeric_limits<Key>::lowest();
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < kLanes; ++i) {
      largest = keys[first + i] > largest ? keys[first + i] : largest;
    }
    if (largest <= best[top_k - 1]) continue;
    for (int64_t e = first; e < std::min(first + kLanes, num_keys); ++e) {
      const Key key = keys[e];
      if (key <= best[top_k - 1]) continue;  // equal keys: the earlier index stays in front
      int64_t place = top_k - 1;
      for (; place > 0 && best[place - 1] < key; --place) {
        best[place] = best[place - 1];
        expert_idx[place] = expert_idx[place - 1];
      }
      best[place] = key;
      expert_idx[place] = static_cast<int32_t>(e);
    }
  }
}

template <typename T>
PERSEID_INLINE void select_top_k(const SignedKey<T>* keys, int64_t num_keys, int64_t top_k,
                                 SignedKey<T>* best, int32_t* expert_idx) {
  if constexpr (sizeof(T) == 4) {
    if (num_keys <= kRankedMax) return select_by_rank(keys, num_keys, top_k, expert_idx);
  }
  select_by_list(keys, num_keys, top_k, best, expert_idx);
}

}  // namespace perseid::kernels
