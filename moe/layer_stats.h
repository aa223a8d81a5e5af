#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "comm/group.h"
#include "moe/moe_layer.h"

// Internal: statistics of a layer over its ranks.

namespace perseid {

/// Sums over ranks of statistics and of the sums that losses need, each kind in one buffer.
void sum_over_ranks(MoEStats& stats, std::vector<at::Tensor>& loss_sums, const comm::Group& world,
                    comm::CallSite site);

}  // namespace perseid
