#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/ordered_key.h"
#include "kernels/simd.h"

// One row of logits as keys, and the K largest of them, in order; equal keys by smaller index.
// Private to this folder.

namespace perseid::kernels {

/// Rows are padded to whole groups of this many elements, one vector register of float32.
inline constexpr int64_t kLanes = 16;

/// Below the key of every float: padding is never chosen. One above the lowest integer, so that 1
/// can be taken off.
template <typename T>
inline constexpr SignedKey<T> kLowestKey = std::numeric_limits<SignedKey<T>>::lowest() + 1;

/// What decides whether the formulas hold for a row of logits.
template <typename T>
struct RowFacts {
  T max;
  bool is_non_finite;  ///< a NaN or an infinity
  bool is_plain;       ///< no NaN and a finite maximum: no exception to the formulas
};

/// @param max_magnitude  the largest, as bits without the sign
template <typename T>
PERSEID_INLINE RowFacts<T> facts_of(SignedKey<T> max_key, UnsignedKey<T> max_magnitude) {
  const T max = value_of_key<T>(max_key);
  return {max, max_magnitude >= kInfinityBits<T>,
          max_magnitude <= kInfinityBits<T> && std::isfinite(max)};
}

/// Calls visit(e, key) for each logit, in a loop that vectorises.
template <typename T, typename Visit>
PERSEID_INLINE RowFacts<T> read_row(const T* z, int64_t count, Visit visit) {
  SignedKey<T> max_key = kLowestKey<T>;
  UnsignedKey<T> max_magnitude = 0;
#pragma omp simd reduction(max : max_key, max_magnitude)
  for (int64_t e = 0; e < count; ++e) {
    const UnsignedKey<T> magnitude =
        std::bit_cast<UnsignedKey<T>>(z[e]) & static_cast<UnsignedKey<T>>(~kSignBit<T>);
    const SignedKey<T> key = signed_key(z[e]);
    visit(e, key);
    max_key = key > max_key ? key : max_key;
    max_magnitude = magnitude > max_magnitude ? magnitude : max_magnitude;
  }
  return facts_of<T>(max_key, max_magnitude);
}

/// Aligned memory in whole lanes; filled with what padding needs, -inf or the lowest key.
template <typename T>
class LaneBuffer {
 public:
  explicit LaneBuffer(int64_t count) : lanes_(static_cast<size_t>(count / kLanes)), size_(count) {
    constexpr T kPadding = std::numeric_limits<T>::has_infinity
                               ? -std::numeric_limits<T>::infinity()
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

/// Working memory of a selection among `num_keys`.
template <typename Key>
struct SelectScratch {
  SelectScratch(int64_t num_keys, int64_t top_k)
      : keys(ceil_div(num_keys, kLanes) * kLanes),
        indices(static_cast<size_t>(num_keys + 1)),
        best(static_cast<size_t>(top_k)) {}
  LaneBuffer<Key> keys;
  std::vector<int32_t> indices;
  std::vector<Key> best;
};

/// ranks[i] = how many keys go before key i: the larger ones, and equal ones of a smaller index.
/// No branches; num_keys^2 / 16 vector comparisons.
/// @param keys  padded to whole lanes with kLowestKey; so is `ranks`
PERSEID_INLINE void rank_keys(const int32_t* keys, int64_t num_keys, int32_t* ranks) {
  for (int64_t first = 0; first < num_keys; first += kLanes) {
    const int32_t* const mine = keys + first;
    // One loop for each group of the others, so that each vectorises over `mine`.
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
}

/// A sorted list of the best so far; most keys fail the one comparison with its last entry.
template <typename Key>
PERSEID_INLINE void select_by_list(const Key* keys, int64_t num_keys, int64_t top_k, Key* best,
                                   int32_t* expert_idx) {
  for (int64_t k = 0; k < top_k; ++k) best[k] = std::numeric_limits<Key>::lowest();
  for (int64_t e = 0; e < num_keys; ++e) {
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

/// More candidates than this are many equal keys, or a very uneven row.
inline constexpr int64_t kCandidatesMax = 64;

/// K <= 16. The largest key of each lane gives 16 keys; the K-th largest of them is a bound that at
/// least K keys reach. Few reach it, and those are ranked. The work does not depend on the values,
/// so no branch is mispredicted; a list over all keys takes two to three times as long.
/// @return false if there are too many candidates
PERSEID_INLINE bool select_by_bound(const int32_t* keys, int64_t num_keys, int64_t top_k,
                                    SelectScratch<int32_t>& scratch, int32_t* expert_idx) {
  alignas(64) int32_t lane_max[kLanes];
  alignas(64) int32_t ranks[kCandidatesMax];
  if (num_keys <= kLanes) {
    rank_keys(keys, num_keys, ranks);
    for (int64_t e = 0; e < num_keys; ++e) {
      expert_idx[std::min<int64_t>(ranks[e], top_k)] = static_cast<int32_t>(e);
    }
    return true;
  }
  std::copy_n(keys, kLanes, lane_max);
  for (int64_t first = kLanes; first < num_keys; first += kLanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const int32_t key = keys[first + i];
      lane_max[i] = key > lane_max[i] ? key : lane_max[i];
    }
  }
  rank_keys(lane_max, kLanes, ranks);
  int32_t bound = std::numeric_limits<int32_t>::max();
  for (int64_t i = 0; i < kLanes; ++i) {
    bound = ranks[i] < top_k && lane_max[i] < bound ? lane_max[i] : bound;
  }

  int32_t* const indices = scratch.indices.data();
  int64_t num_candidates = 0;
  for (int64_t e = 0; e < num_keys; ++e) {
    indices[num_candidates] = static_cast<int32_t>(e);
    num_candidates += keys[e] >= bound;
  }
  if (num_candidates > kCandidatesMax) return false;
  int32_t* const candidates = scratch.keys.data();
  for (int64_t i = 0; i < num_candidates; ++i) candidates[i] = keys[indices[i]];
  for (int64_t i = num_candidates; i % kLanes != 0; ++i) candidates[i] = kLowestKey<float>;
  rank_keys(candidates, num_candidates, ranks);
  for (int64_t i = 0; i < num_candidates; ++i) {
    expert_idx[std::min<int64_t>(ranks[i], top_k)] = indices[i];
  }
  return true;
}

/// @param keys        padded to whole lanes with kLowestKey
/// @param expert_idx  [K + 1] the last one is overwritten
template <typename T>
PERSEID_INLINE void select_top_k(const SignedKey<T>* keys, int64_t num_keys, int64_t top_k,
                                 SelectScratch<SignedKey<T>>& scratch, int32_t* expert_idx) {
  if constexpr (sizeof(T) == 4) {
    if (top_k <= kLanes && select_by_bound(keys, num_keys, top_k, scratch, expert_idx)) return;
  }
  select_by_list(keys, num_keys, top_k, scratch.best.data(), expert_idx);
}

}  // namespace perseid::kernels
