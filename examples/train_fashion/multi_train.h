#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "comm/group.h"
#include "examples/train_fashion/multi_data.h"
#include "examples/train_fashion/train.h"

namespace perseid::examples {

enum class ExpertKind : uint8_t {
  kMlp,   ///< 1296 -> 64-ReLU -> 50-ReLU
  kConv,  ///< conv 5x5x10-ReLU-pool -> conv 5x5x20-ReLU-pool -> 720 -> 50-ReLU -> 50-ReLU
};

struct MultiOptions {
  TrainOptions train;
  ExpertKind experts = ExpertKind::kMlp;
};
/// The settings of a protocol: small with MLP experts and 8 epochs, published with convolutions and
/// 200. The gates read the pixels as they are.
MultiOptions multi_defaults(Protocol protocol);

ParameterCount count_parameters(const MultiOptions& options);

/// One task with its gate.
struct TaskScore {
  double accuracy = 0;
  double cross_entropy = 0;
  double experts_per_token = 0;            ///< experts with a weight above 0: those that run
  double max_vio = 0;                      ///< largest load / mean load - 1
  std::vector<int64_t> tokens_per_expert;  ///< [E]
};
struct MultiScore {
  std::array<TaskScore, kNumTasks> tasks;
  /// Rows that experts processed for a sample. An expert that both gates choose for a sample runs
  /// once, so this is at most the sum of experts_per_token.
  double rows_per_sample = 0;

  double mean_cross_entropy() const;
};

/// An epoch, or what train_iters leaves of it.
struct EpochScore {
  int64_t epoch = 0;  ///< from 1 on
  MultiScore train;   ///< over its steps, while the weights moved
  MultiScore validation;
};
/// Called on every rank, after every epoch.
using OnEpoch = std::function<void(const EpochScore&)>;

/// What a run gives; the same on every rank.
struct MultiResult {
  int64_t num_steps = 0;
  std::vector<EpochScore> epochs;
  int64_t best_epoch = 0;  ///< that with the least mean validation cross-entropy
  MultiScore test;         ///< after the best epoch
  SearchResult search;
  SparsityResult sparsity;
  double seconds_per_epoch = 0;  ///< of training, searches included, without validation and test
  std::vector<double> losses;    ///< of every step: (CE + CE) / 2 + losses of the gates
  std::vector<WeightDump> weights;

  const EpochScore& best() const { return epochs[static_cast<size_t>(best_epoch - 1)]; }
};

/// Trains one model for both tasks. Collective over `world`, and independent of its size, as
/// train_domains is. Throws ConfigError for settings out of range, and what MoELayer::forward
/// throws.
MultiResult train_multi(const comm::Group& world, const MultiData& data,
                        const MultiOptions& options, const OnReport& on_report = {},
                        const OnEpoch& on_epoch = {});

}  // namespace perseid::examples
