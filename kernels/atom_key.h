#pragma once
#include <cstdint>

#include "kernels/ordered_key.h"
#include "kernels/select_atoms.h"

// What orders atoms in a selection. Private to this folder.

namespace perseid::kernels {

/// Score above tie: the atom with the larger key is selected first, in either order.
/// @param scores  of the atoms that `atom` counts; null: all are equal
/// @param index   of the atom for its tie
PERSEID_INLINE uint64_t atom_key(AtomOrder order, const float* scores, RandomKey key, int64_t atom,
                                 uint32_t index) {
  const uint64_t tie = tie_bits(key, index);
  if (scores == nullptr) return tie;
  const float score = scores[atom];
  // Keys of numbers are above 0 in both orders, so NaN comes last.
  if (score != score) return tie;
  const uint32_t ascending = unsigned_key(score);
  const uint32_t bits = order == AtomOrder::kLargest ? ascending : ~ascending;
  return (uint64_t{bits} << 32) | tie;
}

}  // namespace perseid::kernels
