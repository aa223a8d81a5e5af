#pragma once
#include <ATen/core/Tensor.h>

// Internal: tensors for kernels/ragged.h. No graph.

namespace perseid::gates {

struct RaggedTable {
  at::Tensor token_offsets;  ///< [T+1] int32
  at::Tensor expert_idx;     ///< [A] int32
  at::Tensor weights;        ///< [A] in the type of the table
  at::Tensor positions;      ///< [A] int64 t * E + expert, undefined unless asked for
};

/// The pairs of a table [T, E], float32 or float64, that are above 0 or NaN, in the order of
/// Routing. Throws ConfigError if there are 2^31 or more.
RaggedTable ragged_of(const at::Tensor& table, bool with_positions);

/// [T, E] with values [A] at those pairs and 0 elsewhere.
at::Tensor dense_of(const at::Tensor& token_offsets, const at::Tensor& expert_idx,
                    const at::Tensor& values, int64_t num_experts);

}  // namespace perseid::gates
