#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/simd.h"

// Loops over types of 16 bits vectorise badly when they hold more than a few operands, as each lane
// changes its width. So such a loop works on float32 tiles in the first-level cache, and these
// functions convert at its edges; for float and double they do nothing. Private to this folder.

namespace perseid::kernels {

/// Columns of one tile.
inline constexpr int64_t kTileMax = 256;

/// Room for one tile of a row of T.
template <typename T, bool kNeedsTile = kIsConverted<T>>
struct Tile {};
template <typename T>
struct Tile<T, true> {
  alignas(64) float values[kTileMax];
};

/// The `count` values at `source` in the type of the arithmetic.
template <typename T>
PERSEID_INLINE const Accumulate<T>* read_tile(const T* source, [[maybe_unused]] int64_t count,
                                              [[maybe_unused]] Tile<T>& tile) {
  if constexpr (kIsConverted<T>) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) tile.values[i] = load(source + i);
    return tile.values;
  } else {
    return source;
  }
}

/// Where a loop writes what write_tile then moves to `target`.
template <typename T>
PERSEID_INLINE Accumulate<T>* begin_tile(T* target, [[maybe_unused]] Tile<T>& tile) {
  if constexpr (kIsConverted<T>) {
    return tile.values;
  } else {
    return target;
  }
}

template <typename T>
PERSEID_INLINE void write_tile([[maybe_unused]] T* target, [[maybe_unused]] int64_t count,
                               [[maybe_unused]] const Tile<T>& tile) {
  if constexpr (kIsConverted<T>) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(target + i, tile.values[i]);
  }
}

/// Asks for the cache lines of values that are needed soon; addresses past the end do no harm.
template <typename T>
PERSEID_INLINE void prefetch_for_read(const T* values, int64_t count) {
  constexpr auto kPerLine = static_cast<int64_t>(64 / sizeof(T));
  for (int64_t i = 0; i < count; i += kPerLine) __builtin_prefetch(values + i, 0);
}
template <typename T>
PERSEID_INLINE void prefetch_for_write(const T* values, int64_t count) {
  constexpr auto kPerLine = static_cast<int64_t>(64 / sizeof(T));
  for (int64_t i = 0; i < count; i += kPerLine) __builtin_prefetch(values + i, 1);
}

}  // namespace perseid::kernels
