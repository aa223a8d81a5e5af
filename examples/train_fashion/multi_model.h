#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/sequential.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "examples/train_fashion/multi_data.h"
#include "examples/train_fashion/multi_train.h"
#include "moe/moe_layer.h"

namespace perseid::examples {

inline constexpr int64_t kHidden = 50;  ///< width of experts' outputs and of hidden tower layers

/// Layers in a row. All weights are Glorot uniform, all biases 0, keyed by `key` alone: equal on
/// every rank, whatever else draws random numbers.
class Network : public torch::nn::Module {
 public:
  Network(torch::nn::Sequential layers, uint64_t key);
  at::Tensor forward(const at::Tensor& x) { return layers_->forward(x); }

 private:
  torch::nn::Sequential layers_;
};

/// One expert, [rows, 1296] -> [rows, 50].
std::shared_ptr<Network> make_multi_expert(ExpertKind kind, uint64_t key);

struct MultiOutput {
  std::array<at::Tensor, kNumTasks> logits;  ///< [2] of [n, 10]
  MoEOutput layer;
};

/// Shared experts with a gate for each task, and a tower for each task on what its gate mixes: 50
/// -> 50-ReLU -> 50-ReLU -> 10.
class MultiModel : public torch::nn::Module {
 public:
  /// Collective over `world`.
  MultiModel(const comm::Group& world, const MultiOptions& options);
  /// Collective; also for a rank without samples.
  MultiOutput forward(const MoEInput& input);

  MoELayer& layer() { return *layer_; }
  const std::array<std::shared_ptr<Network>, kNumTasks>& towers() const { return towers_; }

 private:
  std::shared_ptr<MoELayer> layer_;
  std::array<std::shared_ptr<Network>, kNumTasks> towers_;
};

/// What the layer reads, on the device of the options: canvases / 255, [n, 1296], in [0, 2].
MoEInput multi_input(const CanvasBatch& batch, const TrainOptions& options);

/// All parameters, those of experts by global number. Collective.
std::vector<WeightDump> collect_weights(MultiModel& model, const MultiOptions& options);

}  // namespace perseid::examples
