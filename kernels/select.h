#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

namespace perseid::kernels {

/// Marks exactly min(k, count) of the values: the largest, equal values by smaller index; -0 equals
/// +0, and NaN counts as -inf, so it is taken only when nothing else is left.
/// @param values   [count] float32 or float64
/// @param is_kept  [count] 1 for a marked value, else 0; written whole
/// Linear in count (radix select), not a sort. k < 0 is a ConfigError.
void select_k(const void* values, int64_t count, int64_t k, DType dtype, uint8_t* is_kept,
              Stream stream = {});
void select_k_reference(const void* values, int64_t count, int64_t k, DType dtype,
                        uint8_t* is_kept);

}  // namespace perseid::kernels
