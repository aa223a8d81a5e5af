#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace perseid::gates {

/// What a gate decides for the tokens of this rank: for each token a row of (expert, weight) pairs,
/// the assignments. Rows may have any length, also 0. Inside a row: weight descending, equal
/// weights by smaller expert id, no expert twice; the position in the row is the assignment's
/// *choice*.
struct Routing {
  int64_t num_tokens = 0;  ///< T
  /// K > 0: every token has exactly K assignments and `token_offsets` is undefined. 0: ragged.
  int64_t top_k = 0;
  at::Tensor token_offsets;  ///< [T+1] int32, row t is assignments token_offsets[t] .. [t+1]-1
  at::Tensor expert_idx;     ///< [A] int32, global expert ids in [0, E)
  at::Tensor weights;        ///< [A] float32 (float64 in float64 programs), differentiable
  at::Tensor scores;         ///< optional [T, E], for metrics; may be undefined

  int64_t num_assignments() const { return expert_idx.size(0); }
};

/// Routing with exactly K experts per token from tables of a custom gate; sorts each row.
/// @param expert_idx  [T, K] any integer type, no id twice in a row
/// @param weights     [T, K] differentiable
Routing routing_from_table(const at::Tensor& expert_idx, const at::Tensor& weights,
                           int64_t num_experts);

/// Ragged routing from dense weights: keeps exactly the pairs with weight > 0 (NaN is kept, so that
/// it is seen). For gates that are sparse by value.
/// @param weights  [T, E] >= 0, differentiable
Routing routing_from_dense(const at::Tensor& weights);

/// Ragged routing of the pairs that are selected, whatever their weight: for gates that select by
/// index. A NaN is the last of its row.
/// @param weights      [T, E] differentiable
/// @param is_selected  [T, E] bool
Routing routing_from_mask(const at::Tensor& weights, const at::Tensor& is_selected);

/// The same routing without the tokens that are not valid: their rows become empty.
/// @param valid  [T] bool
Routing without_invalid(const Routing& routing, const at::Tensor& valid);

/// The same routing with expert e named map[e], its rows in order again.
/// @param map  [E] int32 on the device of the routing, E experts; not checked
Routing renumbered(const Routing& routing, const at::Tensor& map);

/// [T+1] int32 offsets, also where they are implicit.
at::Tensor explicit_offsets(const Routing& routing);

/// [T, E] weights with zeros where there is no pair: for references, metrics and tests.
/// Differentiable.
at::Tensor dense_weights(const Routing& routing, int64_t num_experts);

/// Throws ConfigError unless shapes, types and ids are legal. Reads the data; for data on a GPU the
/// host waits.
void validate(const Routing& routing, int64_t num_experts, const char* operation);
/// The part of it that reads no data: shapes and types.
void validate_shapes(const Routing& routing, int64_t num_experts, const char* operation);
/// All of it for data on the host; on a GPU, where the host would have to wait for the data, only
/// shapes and types.
void validate_without_wait(const Routing& routing, int64_t num_experts, const char* operation);
/// The part of it that is about rows and ids, not about weights: these may be undefined.
void validate_rows(const Routing& routing, int64_t num_experts, const char* operation);
/// What is left of that without reading data.
void validate_row_shapes(const Routing& routing, int64_t num_experts, const char* operation);

}  // namespace perseid::gates
