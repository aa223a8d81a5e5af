#pragma once
#include <cstdint>

#include "kernels/random.h"
#include "kernels/select_atoms.h"
#include "kernels/stream.h"

// The selection of select_atoms over several arrays, which may lie on several machines: the steps
// of a radix select that each does alone. Whoever sums the histograms in between (moe/
// sparse_select.h) gets exactly k of all.

namespace perseid::kernels {

/// Some atoms of a selection: atom a of it is atom first_atom + a of all.
struct AtomPart {
  const float* scores = nullptr;         ///< [num_atoms] read at candidates only; null: all equal
  const uint64_t* candidates = nullptr;  ///< [num_mask_words]
  int64_t num_atoms = 0;                 ///< fewer than 2^32
  /// Ties go by tie_bits(key, first_atom + a modulo 2^32): with more than 2^32 atoms in all, two
  /// parts may have one key in common; within a part keys are unique.
  uint64_t first_atom = 0;
};

/// The keys whose bits from `shift` on are `prefix`; at first all.
struct KeyRange {
  uint64_t prefix = 0;
  int shift = 64;
};

inline constexpr int kKeyDigitBits = 8;
inline constexpr int64_t kKeyDigits = int64_t{1} << kKeyDigitBits;

/// Adds the candidates of the range to histogram[their next 8 bits]. The larger key is selected
/// first.
/// @param histogram  [kKeyDigits]
/// For the host: on kCuda it throws ConfigError.
void count_key_digits(const AtomPart& part, AtomOrder order, RandomKey key, KeyRange range,
                      int64_t* histogram, Stream stream = {});

/// Marks candidates whose key is above `limit`, or equal to it if takes_limit.
/// @param selected  [num_mask_words] written whole; must not overlap candidates
/// For the host: on kCuda it throws ConfigError.
void mark_keys(const AtomPart& part, AtomOrder order, RandomKey key, uint64_t limit,
               bool takes_limit, uint64_t* selected, Stream stream = {});

}  // namespace perseid::kernels
