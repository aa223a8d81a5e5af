#pragma once
#include <torch/nn/module.h>
#include <torch/optim/adam.h>

#include <memory>
#include <vector>

#include "examples/train_fashion/train.h"
#include "gates/gate.h"

namespace perseid::examples {

/// Adam over the parameters of a model, those of its gates with a learning rate of their own:
/// gate_lr_factor times that of the others.
class GateAdam {
 public:
  /// @param model  with `gates` somewhere below it
  /// @param options  lr, adam_eps, gate_lr_factor, lr_decay
  GateAdam(const torch::nn::Module& model, const std::vector<std::shared_ptr<gates::Gate>>& gates,
           const TrainOptions& options);
  torch::optim::Adam& optimizer() { return optimizer_; }
  void zero_grad() { optimizer_.zero_grad(); }
  /// @param progress  of the run, in [0, 1], see learning_rate
  void step(double progress);

 private:
  TrainOptions options_;
  torch::optim::Adam optimizer_;
};

}  // namespace perseid::examples
