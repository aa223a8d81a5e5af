#include "moe/optimizer_states.h"

#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include "kernels/error.h"
#include "moe/sparse_optimizer.h"

namespace perseid {
namespace {

template <typename State>
void add_moments(const State& state, OptimizerStates& result) {
  result.momentum.push_back(state.exp_avg());
  result.second_moment.push_back(state.exp_avg_sq());
  if (state.max_exp_avg_sq().defined()) result.second_moment.push_back(state.max_exp_avg_sq());
}

}  // namespace

void require_known(const torch::optim::Optimizer& optimizer) {
  const bool is_known = dynamic_cast<const torch::optim::SGD*>(&optimizer) != nullptr ||
                        dynamic_cast<const torch::optim::Adam*>(&optimizer) != nullptr ||
                        dynamic_cast<const torch::optim::AdamW*>(&optimizer) != nullptr;
  require(is_known, "sparsifier", "optimizer", "unknown",
          "has states that cannot be masked; choose torch::optim::SGD, Adam or AdamW");
}

bool holds(const torch::optim::Optimizer& optimizer, const at::Tensor& parameter) {
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& held : group.params()) {
      if (held.is_same(parameter)) return true;
    }
  }
  return false;
}

double learning_rate_of(const torch::optim::Optimizer& optimizer, const at::Tensor& parameter) {
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& held : group.params()) {
      if (held.is_same(parameter)) return group.options().get_lr();
    }
  }
  PERSEID_INVARIANT(!"held");
  return 0;
}

OptimizerStates states_of(torch::optim::Optimizer& optimizer, const at::Tensor& parameter) {
  OptimizerStates result;
  const auto found = optimizer.state().find(parameter.unsafeGetTensorImpl());
  if (found == optimizer.state().end()) return result;
  torch::optim::OptimizerParamState* const state = found->second.get();
  if (const auto* sgd = dynamic_cast<torch::optim::SGDParamState*>(state)) {
    if (sgd->momentum_buffer().defined()) result.momentum.push_back(sgd->momentum_buffer());
  } else if (const auto* adam = dynamic_cast<torch::optim::AdamParamState*>(state)) {
    add_moments(*adam, result);
  } else if (const auto* adamw = dynamic_cast<torch::optim::AdamWParamState*>(state)) {
    add_moments(*adamw, result);
  }
  return result;
}

CompressedStates* compressed_states(torch::optim::Optimizer& optimizer) {
  return dynamic_cast<CompressedStates*>(&optimizer);
}

}  // namespace perseid
