#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace torch::optim {
class Optimizer;
}

// Internal: what an optimizer of LibTorch keeps for each entry of a parameter.

namespace perseid {

class CompressedStates;

struct OptimizerStates {
  std::vector<at::Tensor> momentum;       ///< averages of gradients
  std::vector<at::Tensor> second_moment;  ///< averages of squares
};

/// Throws ConfigError unless it is SGD, Adam or AdamW.
void require_known(const torch::optim::Optimizer& optimizer);

bool holds(const torch::optim::Optimizer& optimizer, const at::Tensor& parameter);

/// Of the group that holds it; it must be held.
double learning_rate_of(const torch::optim::Optimizer& optimizer, const at::Tensor& parameter);

/// The tensors themselves; none before the parameter's first step.
OptimizerStates states_of(torch::optim::Optimizer& optimizer, const at::Tensor& parameter);

/// The optimizer's part with compressed states; null for LibTorch's own optimizers.
CompressedStates* compressed_states(torch::optim::Optimizer& optimizer);

}  // namespace perseid
