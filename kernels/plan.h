#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Integers of a routing plan that stay on the device that made them, and the sums of rows that go
// with them. Counts are below 2^31. On kCuda all arrays are in device memory and nothing waits.

namespace perseid::kernels {

/// place_of[order[r]] = r.
/// @param order     [R] a permutation of 0 .. R-1, such as counting_sort's when no key is lost
/// @param place_of  [R] may not overlap `order`
void invert_order(const int32_t* order, int64_t num_rows, int32_t* place_of, Stream stream = {});

/// The ragged row that each sorted place comes from: row_of[r] is the n with row_offsets[n] <=
/// order[r] < row_offsets[n+1] or, if `row_offsets` is null, order[r] / fixed.
/// @param order        [R] entries, each in [0, row_offsets[num_rows])
/// @param row_offsets  [num_rows + 1] ascending; rows may be empty
/// @param fixed        entries per row, above 0, if `row_offsets` is null
/// @param row_of       [R] may be `order` itself
void row_of_sorted(const int32_t* order, int64_t num_places, const int32_t* row_offsets,
                   int64_t num_rows, int64_t fixed, int32_t* row_of, Stream stream = {});

/// ends[l] = offsets[l + 1], in the type that grouped products take.
/// @param offsets  [num_experts + 1] the last below 2^31, which is not checked
/// @param ends     [num_experts]
void expert_ends(const int64_t* offsets, int64_t num_experts, int32_t* ends, Stream stream = {});

/// out[l, :] = sum of rows offsets[l] .. offsets[l+1]-1, 0 for an expert without rows: the gradient
/// of an expert's bias. Sums are formed in float32 (float64 for fp64) and rounded once: 32 rows of
/// an expert in their order, then these sums in their order. So CPU and GPU give the same bits.
/// @param rows     [num_rows, width] of `dtype`
/// @param offsets  [num_experts + 1] ascending, the last at most num_rows
/// @param out      [num_experts, width] of `dtype`
/// Reads num_rows * width elements once.
void sum_by_expert(const void* rows, int64_t num_rows, int64_t width, const int64_t* offsets,
                   int64_t num_experts, void* out, DType dtype, Stream stream = {});
/// Sums in float64.
void sum_by_expert_reference(const void* rows, int64_t width, const int64_t* offsets,
                             int64_t num_experts, void* out, DType dtype);

}  // namespace perseid::kernels
