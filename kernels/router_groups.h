#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/ordered_key.h"
#include "kernels/router_select.h"

// Group-limited routing (DeepSeek) on the keys of one row. Private to this folder.

namespace perseid::kernels {

/// Working memory of a choice among groups.
template <typename T>
struct GroupScratch {
  GroupScratch(int64_t num_groups, int64_t topk_groups)
      : keys(ceil_div(num_groups, kLanes) * kLanes),
        chosen(static_cast<size_t>(topk_groups + 1)),
        is_kept(static_cast<size_t>(num_groups)),
        select(num_groups, topk_groups) {}
  LaneBuffer<SignedKey<T>> keys;
  std::vector<int32_t> chosen;
  std::vector<uint8_t> is_kept;
  SelectScratch<SignedKey<T>> select;
};

/// Key of a group: its largest key, or that of the sum of its two largest values. An infinite sum
/// of both signs counts as -inf.
template <typename T>
PERSEID_INLINE SignedKey<T> group_key(const SignedKey<T>* keys, int64_t group_size,
                                      bool is_sum_of_two) {
  SignedKey<T> first = kLowestKey<T>, second = kLowestKey<T>;
  for (int64_t e = 0; e < group_size; ++e) {
    const SignedKey<T> smaller = std::min(keys[e], first);
    first = std::max(keys[e], first);
    second = std::max(smaller, second);
  }
  if (!is_sum_of_two) return first;
  return signed_key(value_of_key<T>(first) + value_of_key<T>(second));
}

/// Takes the experts outside the best groups out of the selection: below -inf, so that they are not
/// chosen even where the best groups hold nothing finite.
/// @param score_keys  [E] what ranks the groups; may be `keys`
template <typename T>
PERSEID_INLINE void mask_groups(const SignedKey<T>* score_keys, int64_t num_experts,
                                int64_t num_groups, int64_t topk_groups, bool is_sum_of_two,
                                GroupScratch<T>& scratch, SignedKey<T>* keys) {
  const int64_t group_size = num_experts / num_groups;
  for (int64_t g = 0; g < num_groups; ++g) {
    scratch.keys.data()[g] = group_key<T>(score_keys + g * group_size, group_size, is_sum_of_two);
  }
  select_top_k<T>(scratch.keys.data(), num_groups, topk_groups, scratch.select,
                  scratch.chosen.data());
  std::fill(scratch.is_kept.begin(), scratch.is_kept.end(), uint8_t{0});
  for (int64_t i = 0; i < topk_groups; ++i) scratch.is_kept[scratch.chosen[i]] = 1;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (scratch.is_kept[g] == 0) std::fill_n(keys + g * group_size, group_size, kLowestKey<T>);
  }
}

}  // namespace perseid::kernels
