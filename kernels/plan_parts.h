#pragma once
#include <cstdint>

#include "kernels/simd.h"

// What the CPU's and the GPU's side of kernels/plan.h share. Private to this folder.

namespace perseid::kernels {

/// Rows of an expert that are summed before their sum is added to the expert's.
inline constexpr int64_t kChunkRows = 32;

/// The n in [0, num_rows) with offsets[n] <= entry < offsets[n+1].
template <typename Offset>
PERSEID_INLINE int64_t row_of_offset(const Offset* offsets, int64_t num_rows, int64_t entry) {
  int64_t low = 0, high = num_rows - 1;  // the last n with offsets[n] <= entry
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= entry) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace perseid::kernels
