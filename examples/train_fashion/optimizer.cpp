#include "examples/train_fashion/optimizer.h"

#include <algorithm>

namespace perseid::examples {
namespace {

enum : size_t { kModel, kGates };  // parameter groups

std::vector<torch::optim::OptimizerParamGroup> parameter_groups(
    const torch::nn::Module& model, const std::vector<std::shared_ptr<gates::Gate>>& gates) {
  std::vector<at::Tensor> of_gates;
  for (const auto& gate : gates) {
    for (const at::Tensor& parameter : gate->parameters()) of_gates.push_back(parameter);
  }
  std::vector<at::Tensor> others = model.parameters();
  others.erase(std::remove_if(others.begin(), others.end(),
                              [&](const at::Tensor& parameter) {
                                return std::any_of(of_gates.begin(), of_gates.end(),
                                                   [&](const at::Tensor& of_gate) {
                                                     return of_gate.is_same(parameter);
                                                   });
                              }),
               others.end());
  return {torch::optim::OptimizerParamGroup(others), torch::optim::OptimizerParamGroup(of_gates)};
}

}  // namespace

double learning_rate(const TrainOptions& options, double progress) {
  return 1 - progress < options.lr_decay ? options.lr * (1 - progress) / options.lr_decay
                                         : options.lr;
}

GateAdam::GateAdam(const torch::nn::Module& model,
                   const std::vector<std::shared_ptr<gates::Gate>>& gates,
                   const TrainOptions& options)
    : options_(options),
      optimizer_(parameter_groups(model, gates),
                 torch::optim::AdamOptions().eps(options.adam_eps)) {}

void GateAdam::step(double progress) {
  const double rate = learning_rate(options_, progress);
  optimizer_.param_groups()[kModel].options().set_lr(rate);
  optimizer_.param_groups()[kGates].options().set_lr(rate * options_.gate_lr_factor);
  optimizer_.step();
}

}  // namespace perseid::examples
