#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "moe/grouped_mlp.h"

// Which inputs a sparsely trained layer uses (QuickSelection, Atashgahi et al. 2022).

namespace perseid {

/// s_i = sum over j of |weight[j, i]|: the strength of input i. Of a sparse layer its active
/// weights count, as the others are 0; pass the effective weight under a soft method. Inputs should
/// have one scale.
/// @param weight  [out, in] of the first layer
/// @return [in] float64, detached, where the weight is
at::Tensor neuron_strength(const at::Tensor& weight);

/// The same of an expert's first matrix, gate and up rows together.
/// @param expert  global id, one of experts.expert_ids()
/// @return [D]
at::Tensor expert_input_strength(const GroupedMLP& experts, int64_t expert);

}  // namespace perseid
