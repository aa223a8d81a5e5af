#pragma once
#include <bit>
#include <cstdint>

#include "kernels/simd.h"

// Sets as bits: element i is bit i % 64 of word i / 64. Private to this folder.

namespace perseid::kernels {

/// Bits of word `word` that belong to [begin, end).
PERSEID_INLINE uint64_t word_of_range(const uint64_t* bits, int64_t word, int64_t begin,
                                      int64_t end) {
  uint64_t result = bits[word];
  if (word * 64 < begin) result &= ~uint64_t{0} << (begin % 64);
  if (end - word * 64 < 64) result &= (uint64_t{1} << (end % 64)) - 1;
  return result;
}

/// body(i) for the elements of [begin, end) that are in the set, ascending.
template <typename Body>
PERSEID_INLINE void for_each_set(const uint64_t* bits, int64_t begin, int64_t end, Body&& body) {
  for (int64_t word = begin / 64; word * 64 < end; ++word) {
    uint64_t left = word_of_range(bits, word, begin, end);
    for (; left != 0; left &= left - 1) body(word * 64 + std::countr_zero(left));
  }
}

inline int64_t count_set(const uint64_t* bits, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t word = begin / 64; word * 64 < end; ++word) {
    count += std::popcount(word_of_range(bits, word, begin, end));
  }
  return count;
}

}  // namespace perseid::kernels
