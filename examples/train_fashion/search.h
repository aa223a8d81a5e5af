#pragma once
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "examples/train_fashion/train.h"
#include "moe/moe_layer.h"
#include "moe/permutation_search.h"

namespace perseid::examples {

/// What the layer of a run gets: the search of the options with the seed of the run. The gate
/// `single` has no order to search.
gates::PermutationOptions permutation_options(const TrainOptions& options);

/// The search over the order in which outputs of gates meet experts, for the training loops of both
/// tasks. Held batches are training images, drawn once from the run seed: the same on any number of
/// ranks, cut into shards as the batch of a step is. Without a search in the options nothing is
/// done. The relaxation of kSinkhorn is work of the layer and the optimiser.
class OrderSearch {
 public:
  /// Local part of the cross-entropy of a batch: the sum over ranks is the mean over the images of
  /// all ranks. Losses of gates are left out.
  /// @param images  of this rank; may be none
  using HeldLoss = std::function<at::Tensor(std::span<const int64_t> images)>;

  /// @param model  with `layer` in it or equal to it; both outlive the search
  OrderSearch(torch::nn::Module& model, MoELayer& layer, const TrainOptions& options,
              int64_t num_images, HeldLoss held_loss);

  /// To be called at the start of every step: searches if kSwap is due. Collective.
  void before_step(int64_t step);
  /// Scrambles the trained order in SearchOptions::scramble trials, each searched from anew. The
  /// trained order is back at the end. Collective.
  void repair();
  /// So far, with the present order.
  SearchResult result() const;

 private:
  PermutationReport search_now(int64_t max_evaluations);
  void scramble(const std::vector<at::Tensor>& trained, int64_t trial);

  torch::nn::Module& model_;
  MoELayer& layer_;
  const TrainOptions options_;
  const int64_t num_steps_;
  const int64_t interval_;
  const HeldLoss held_loss_;
  std::vector<std::vector<int64_t>> held_;  ///< images of this rank, batch by batch
  SearchResult result_;
};

}  // namespace perseid::examples
