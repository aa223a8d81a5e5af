#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Ragged rows from a dense table of weights [T, E], for gates that are sparse by value, and back.
// Two calls, so that the caller allocates in between: ragged_offsets counts, ragged_rows fills.

namespace perseid::kernels {

struct RaggedShape {
  int64_t num_tokens = 0;   ///< T >= 0
  int64_t num_experts = 0;  ///< E >= 1, below 2^31
};

/// First pass: writes token_offsets [T+1], row t being pairs token_offsets[t] .. [t+1]-1, and
/// returns their number A. A pair is kept if its weight is above 0 or NaN.
/// @param weights  [T, E] float32 or float64
/// Throws ConfigError if A is 2^31 or more. On kCuda the host waits for A.
int64_t ragged_offsets(const RaggedShape& shape, DType dtype, const void* weights,
                       int32_t* token_offsets, Stream stream = {});
int64_t ragged_offsets_reference(const RaggedShape& shape, DType dtype, const void* weights,
                                 int32_t* token_offsets);

/// Outputs; a null pointer is not written.
struct RaggedOutput {
  int32_t* expert_idx = nullptr;  ///< [A] weight descending, equal weights by smaller id, NaN last
  void* values = nullptr;         ///< [A] the weights, in their type
  int64_t* positions = nullptr;   ///< [A] t * E + expert_idx: where the weight is in the table
};

/// Second pass, with the offsets of the first. Reads T*E weights, writes A of each output.
void ragged_rows(const RaggedShape& shape, DType dtype, const void* weights,
                 const int32_t* token_offsets, const RaggedOutput& output, Stream stream = {});
void ragged_rows_reference(const RaggedShape& shape, DType dtype, const void* weights,
                           const int32_t* token_offsets, const RaggedOutput& output);

/// The way back: table[t, expert_idx[a]] = values[a] for the pairs a of row t, and 0 elsewhere.
/// @param expert_idx  [A] no expert twice in a row
/// @param values      [A] in `dtype`
/// @param table       [T, E] written whole
void ragged_to_dense(const RaggedShape& shape, DType dtype, const int32_t* token_offsets,
                     const int32_t* expert_idx, const void* values, void* table,
                     Stream stream = {});

/// Offsets of rows from their lengths, in place, and the sum of the lengths.
/// @param token_offsets  [T+1]; on entry elements 1 .. T are the lengths of rows 0 .. T-1
/// Throws ConfigError if the sum is 2^31 or more. Host memory only.
int64_t lengths_to_offsets(int32_t* token_offsets, int64_t num_tokens);

}  // namespace perseid::kernels
