#pragma once
#include <cstdint>

#include "kernels/random.h"
#include "kernels/stream.h"

// The selection of sparse training: an exact number of positions by score, where many scores are
// equal. Sets of positions (atoms) are bits: atom a is bit a % 64 of word a / 64, and bits behind
// the last atom are 0.

namespace perseid::kernels {

/// Words that hold the bits of `num_atoms` atoms.
constexpr int64_t num_mask_words(int64_t num_atoms) { return (num_atoms + 63) / 64; }

/// Cell c is the atoms c * atoms_per_cell .. (c + 1) * atoms_per_cell - 1.
struct AtomCells {
  int64_t num_cells = 1;
  int64_t atoms_per_cell = 0;
  constexpr int64_t num_atoms() const { return num_cells * atoms_per_cell; }
};

enum class AtomOrder : uint8_t {
  kLargest,
  kSmallest,
  kLargestMagnitude,  ///< scores count without their sign
  kSmallestMagnitude,
};

/// Of all cells together.
struct AtomCounts {
  int64_t num_selected = 0;
  int64_t num_candidates = 0;
  int64_t num_nan = 0;       ///< candidates whose score is NaN
  int64_t num_infinite = 0;  ///< candidates whose score is infinite
};

/// Mix of 32 bits without collisions, so that no two atoms share one. (Two rounds of Wellons'
/// lowbias32, with one half of the key before each.)
constexpr uint32_t tie_bits(RandomKey key, uint32_t atom) {
  const uint32_t halves[2] = {static_cast<uint32_t>(key.value),
                              static_cast<uint32_t>(key.value >> 32)};
  uint32_t x = atom;
  for (const uint32_t half : halves) {
    x ^= half;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
  }
  return x;
}

/// Marks exactly min(k[c], candidates of c) candidates of each cell c: those that come first in the
/// order, equal scores by tie_bits. -0 equals +0. NaN comes last in every order: it is
/// taken only when nothing else is left. The same set for any thread count.
/// Linear in the number of atoms (radix select in large cells, nth_element in small ones).
/// @param cells       fewer than 2^32 atoms
/// @param scores      [num_atoms] read at candidates only; null: all are equal, so that each subset
///                    of the candidates is as likely as any other
/// @param candidates  [num_mask_words]
/// @param k           [num_cells] 0 or more
/// @param selected    [num_mask_words] written whole; must not overlap candidates
/// On kCuda the host waits for the arrays, does the work and copies the result back.
AtomCounts select_atoms(const AtomCells& cells, AtomOrder order, const float* scores,
                        const uint64_t* candidates, const int64_t* k, RandomKey key,
                        uint64_t* selected, Stream stream = {});
AtomCounts select_atoms_reference(const AtomCells& cells, AtomOrder order, const float* scores,
                                  const uint64_t* candidates, const int64_t* k, RandomKey key,
                                  uint64_t* selected);

/// The same where scores are those of the candidates alone, one after the other: nothing as large
/// as num_atoms is needed.
/// @param scores  [number of candidates] by rising atom
/// For the host: on kCuda it throws ConfigError.
AtomCounts select_listed_atoms(const AtomCells& cells, AtomOrder order, const float* scores,
                               const uint64_t* candidates, const int64_t* k, RandomKey key,
                               uint64_t* selected, Stream stream = {});

/// counts[c] = bits of cell c.
/// @param bits    [num_mask_words]
/// @param counts  [num_cells]
/// For the host: on kCuda it throws ConfigError.
void count_atoms(const AtomCells& cells, const uint64_t* bits, int64_t* counts, Stream stream = {});

}  // namespace perseid::kernels
