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

/// select_k of each row: min(k, num_cols) of every one.
/// @param values   [num_rows, num_cols] float32 or float64
/// @param is_kept  [num_rows, num_cols] written whole
/// Linear. The same set for any thread count. For the host: on kCuda it throws ConfigError.
void select_k_rows(const void* values, int64_t num_rows, int64_t num_cols, int64_t k, DType dtype,
                   uint8_t* is_kept, Stream stream = {});
void select_k_rows_reference(const void* values, int64_t num_rows, int64_t num_cols, int64_t k,
                             DType dtype, uint8_t* is_kept);

}  // namespace perseid::kernels
