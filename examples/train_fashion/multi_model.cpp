#include "examples/train_fashion/multi_model.h"

#include <ATen/Functions.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/pooling.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "comm/collectives.h"
#include "examples/train_fashion/model.h"
#include "examples/train_fashion/search.h"
#include "kernels/random.h"
#include "moe/module_experts.h"

namespace perseid::examples {
namespace {

namespace nn = torch::nn;

// Keys of initial values below the run seed.
constexpr uint64_t kStreamExperts = 1;
constexpr uint64_t kStreamTowers = 2;

uint64_t network_key(const TrainOptions& options, uint64_t stream, size_t number) {
  return kernels::random_key(options.seed).with(stream).with(number).value;
}

std::shared_ptr<Network> make_tower(uint64_t key) {
  return std::make_shared<Network>(
      nn::Sequential(nn::Linear(kHidden, kHidden), nn::ReLU(), nn::Linear(kHidden, kHidden),
                     nn::ReLU(), nn::Linear(kHidden, kNumClasses)),
      key);
}

int64_t num_parameters(const nn::Module& module) {
  int64_t count = 0;
  for (const at::Tensor& parameter : module.parameters()) count += parameter.numel();
  return count;
}

/// Experts that one gate selects for a sample; of DSelect-k and COMET, once they have become hard.
int64_t selected_experts(const TrainOptions& options) {
  switch (options.gate) {
    case GateKind::kDense:
      return options.num_experts;
    case GateKind::kTopK:
    case GateKind::kDSelectK:
    case GateKind::kComet:
      return options.top_k;
    case GateKind::kSingle:
    case GateKind::kHash:
    case GateKind::kOracle:
      break;
  }
  return 1;
}

}  // namespace

Network::Network(nn::Sequential layers, uint64_t key) : layers_(std::move(layers)) {
  register_module("layers", layers_);
  uint64_t number = 0;
  for (at::Tensor& parameter : layers_->parameters()) {
    const at::Tensor values = parameter.data();
    const kernels::RandomKey values_key = kernels::RandomKey{key}.with(number++);
    if (parameter.dim() == 1) {
      values.zero_();
      continue;
    }
    // [out, in, ...]: each element of the other dimensions is a connection.
    const int64_t per_output = parameter.numel() / parameter.size(0);
    const int64_t per_input = parameter.numel() / parameter.size(1);
    const double bound = std::sqrt(6.0 / static_cast<double>(per_output + per_input));
    kernels::fill_uniform(values.data_ptr(), values.numel(), kernels::DType::kFloat32, -bound,
                          bound, values_key);
  }
}

std::shared_ptr<Network> make_multi_expert(ExpertKind kind, uint64_t key) {
  if (kind == ExpertKind::kMlp) {
    return std::make_shared<Network>(nn::Sequential(nn::Linear(kCanvasPixels, 64), nn::ReLU(),
                                                    nn::Linear(64, kHidden), nn::ReLU()),
                                     key);
  }
  // 36 -> 32 -> 16 -> 12 -> 6 pixels a side
  return std::make_shared<Network>(
      nn::Sequential(nn::Unflatten(nn::UnflattenOptions(1, {1, kCanvasSide, kCanvasSide})),
                     nn::Conv2d(nn::Conv2dOptions(1, 10, 5)), nn::ReLU(), nn::MaxPool2d(2),
                     nn::Conv2d(nn::Conv2dOptions(10, 20, 5)), nn::ReLU(), nn::MaxPool2d(2),
                     nn::Flatten(), nn::Linear(20 * 6 * 6, kHidden), nn::ReLU(),
                     nn::Linear(kHidden, kHidden), nn::ReLU()),
      key);
}

MultiModel::MultiModel(const comm::Group& world, const MultiOptions& options)
    : nn::Module("multi_model") {
  const TrainOptions& train = options.train;
  const ParallelGroups groups = make_parallel_groups(world, train.ep_size);
  const auto placement =
      ExpertPlacement::contiguous(train.num_experts, groups.expert_parallel.size());
  const at::ScalarType dtype = tensor_type(train.dtype);

  // Experts are ordinary modules; the layer calls each with the samples that any gate gave it.
  auto experts = std::make_shared<ModuleExperts>(
      ModuleExpertsOptions(kCanvasPixels, kHidden),
      [&](int64_t expert) {
        return nn::AnyModule(make_multi_expert(
            options.experts, network_key(train, kStreamExperts, static_cast<size_t>(expert))));
      },
      placement, groups.expert_parallel.rank());
  convert_parameters(*experts, dtype);

  std::vector<std::shared_ptr<gates::Gate>> gates;
  for (size_t task = 0; task < kNumTasks; ++task) {
    gates.push_back(make_gate(train, kCanvasPixels, static_cast<int64_t>(task)));
    convert_parameters(*gates.back(), dtype == at::kDouble ? at::kDouble : at::kFloat);
  }
  MoELayerOptions layer_options;
  layer_options.capacity.capacity_factor = train.capacity_factor;
  layer_options.permutation = permutation_options(train);
  layer_ = register_module("layer", std::make_shared<MoELayer>(std::move(gates), std::move(experts),
                                                               placement, groups, layer_options));
  if (dtype == at::kDouble) convert_permutations(*layer_);
  for (size_t task = 0; task < kNumTasks; ++task) {
    towers_[task] = register_module("tower_" + std::to_string(task),
                                    make_tower(network_key(train, kStreamTowers, task)));
    convert_parameters(*towers_[task], dtype);
  }
  to(tensor_device(train));
}

MultiOutput MultiModel::forward(const MoEInput& input) {
  MultiOutput output;
  output.layer = layer_->forward(input);
  for (size_t task = 0; task < kNumTasks; ++task) {
    output.logits[task] = towers_[task]->forward(output.layer.outputs[task]);
  }
  return output;
}

MoEInput multi_input(const CanvasBatch& batch, const TrainOptions& options) {
  // from_blob wants a mutable pointer; nothing here writes through it.
  const at::Tensor pixels =
      at::from_blob(const_cast<int16_t*>(batch.pixels.data()),
                    {static_cast<int64_t>(batch.classes[0].size()), kCanvasPixels}, at::kShort);
  return pixels.to(tensor_device(options)).to(tensor_type(options.dtype)).div_(255);
}

ParameterCount count_parameters(const MultiOptions& options) {
  const TrainOptions& train = options.train;
  const auto tasks = static_cast<int64_t>(kNumTasks);
  const int64_t of_expert = num_parameters(*make_multi_expert(options.experts, 0));
  const int64_t of_task =
      num_parameters(*make_tower(0)) + num_parameters(*make_gate(train, kCanvasPixels));
  const int64_t met = train.gate == GateKind::kSingle
                          ? 1
                          : std::min(train.num_experts, tasks * selected_experts(train));
  return {tasks * of_task + train.num_experts * of_expert, tasks * of_task + met * of_expert};
}

std::vector<WeightDump> collect_weights(MultiModel& model, const MultiOptions& options) {
  std::vector<WeightDump> dumps;
  for (size_t task = 0; task < kNumTasks; ++task) {
    const std::string number = std::to_string(task);
    for (const auto& parameter : model.layer().gates()[task]->named_parameters()) {
      dumps.push_back(dump_of("gate_" + number + "." + parameter.key(), parameter.value()));
    }
    for (const auto& parameter : model.towers()[task]->named_parameters()) {
      dumps.push_back(dump_of("tower_" + number + "." + parameter.key(), parameter.value()));
    }
  }
  add_permutations(model.layer(), dumps);
  const auto mine = model.layer().experts()->named_parameters();
  const std::shared_ptr<Network> pattern = make_multi_expert(options.experts, 0);
  for (int64_t expert = 0; expert < options.train.num_experts; ++expert) {
    const std::string number = std::to_string(expert);
    for (const auto& parameter : pattern->named_parameters()) {
      const at::Tensor* held = mine.find("expert_" + number + "." + parameter.key());
      WeightDump dump = dump_of("experts." + number + "." + parameter.key(),
                                held != nullptr ? *held : at::zeros_like(parameter.value()));
      // One rank of the group holds the expert, so the sum collects it.
      comm::all_reduce(dump.values.data(), static_cast<int64_t>(dump.values.size()),
                       comm::ReduceOp::kSum, model.layer().groups().expert_parallel,
                       {"collect_weights"});
      dumps.push_back(std::move(dump));
    }
  }
  return dumps;
}

}  // namespace perseid::examples
