#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "moe/sparse_mask.h"

namespace perseid {

/// Smaller dense experts of the active units, in their order, then units of 0.
struct CompactExperts {
  at::Tensor up_proj;    ///< [L, 2F' or F', D]
  at::Tensor down_proj;  ///< [L, d_out, F']
  at::Tensor units;      ///< [L, F'] int64 which unit each was; -1: none
};
/// What Structure::coupled_neurons() leaves of the experts of a GroupedMLP without biases, as a
/// GroupedMLP of d_ff F' would hold it: the same outputs with fewer FLOPs, and no indices. F' is
/// the largest number of active units of an expert, rounded up to `multiple` but at most F.
/// @param up_proj    [L, 2F or F, D]
/// @param down_proj  [L, d_out, F]
/// @param active     [L] masks [1, F], of Sparsifier::neurons
CompactExperts compact_experts(const at::Tensor& up_proj, const at::Tensor& down_proj, bool gated,
                               const std::vector<PackedMask>& active, int64_t multiple = 16);

}  // namespace perseid
