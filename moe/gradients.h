#pragma once
#include <torch/nn/module.h>

#include <vector>

#include "moe/parallel_groups.h"

// Loss convention: the loss of a step is the sum over ranks of local losses, each divided by the
// *global* number of tokens that count. Then gradients of dense parameters (gates, embeddings,
// heads) are summed over all ranks, and gradients of expert parameters over their replicas. Never
// average.

namespace perseid {

/// Parameters below an Experts module that is not replicated(), and all others, in registration
/// order. A tied parameter appears once; one that needs no gradient does not appear.
struct SplitParameters {
  std::vector<at::Tensor> dense;
  std::vector<at::Tensor> expert;
};
SplitParameters split_parameters(const torch::nn::Module& module);

/// Collective. Sums gradients in place: dense ones over groups.world, expert ones over
/// groups.expert_replicas. A parameter without a gradient counts as zero and gets a defined one, so
/// ranks without tokens take part. Sums are formed in rank order, types of 16 bits in float32 and
/// rounded once: the same bits on every rank. Throws ConfigError on every rank if one has a
/// gradient that is not a dense CPU tensor of a supported type.
void sum_gradients(const torch::nn::Module& module, const ParallelGroups& groups);

/// Collective, after sum_gradients. Scales all gradients by min(1, max_norm / (norm + 1e-6)) where
/// norm is the 2-norm over all parameters of all ranks, each counted once. Returns the norm.
/// Sums are double, in a fixed order. Throws Diverged on every rank if the norm is not finite, and
/// leaves the gradients as they are.
/// @param max_norm  > 0, equal on all ranks
double clip_grad_norm(const torch::nn::Module& module, const ParallelGroups& groups,
                      double max_norm);

}  // namespace perseid
