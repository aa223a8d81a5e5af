#pragma once
#include <bit>
#include <cstdint>

#include "kernels/ordered_key.h"
#include "kernels/select_atoms.h"

// What orders atoms in a selection. Private to this folder.

namespace perseid::kernels {

/// Of the bits of a score: the larger key comes first in the order. NaN is 0, all others are above.
PERSEID_INLINE uint32_t score_key(AtomOrder order, uint32_t bits) {
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > kInfinityBits<float>) return 0;
  if (order == AtomOrder::kLargestMagnitude) return magnitude * 2 + 1;
  if (order == AtomOrder::kSmallestMagnitude) return ~(magnitude * 2);
  const uint32_t ascending = unsigned_key(std::bit_cast<float>(bits));
  return order == AtomOrder::kLargest ? ascending : ~ascending;
}

/// Score above tie: the atom with the larger key is selected first, in every order.
/// @param scores  of the atoms that `atom` counts; null: all are equal
/// @param index   of the atom for its tie
PERSEID_INLINE uint64_t atom_key(AtomOrder order, const float* scores, RandomKey key, int64_t atom,
                                 uint32_t index) {
  const uint64_t tie = tie_bits(key, index);
  if (scores == nullptr) return tie;
  return (uint64_t{score_key(order, std::bit_cast<uint32_t>(scores[atom]))} << 32) | tie;
}

}  // namespace perseid::kernels
