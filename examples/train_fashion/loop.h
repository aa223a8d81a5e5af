#pragma once
#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "comm/group.h"
#include "examples/train_fashion/train.h"
#include "moe/moe_layer.h"

// What the training loops of both tasks have in common.

namespace perseid::examples {

inline constexpr uint64_t kStreamOrder = 1000;  ///< + epoch, below the run seed, see random_order
inline constexpr int64_t kTestBatch = 1000;     ///< images of an evaluation, over all ranks

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start);

/// Throws ConfigError for what only shows with data and ranks.
void check_options(const TrainOptions& options, const comm::Group& world, int64_t num_images);

/// Cross-entropy of the local images, summed; bfloat16 in float32.
/// @param logits  [n, classes]
/// @param labels  [n] int64
at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels);

/// Sums since the last report. Losses are those of this rank, loads already those of all.
class Meter {
 public:
  explicit Meter(const TrainOptions& options);
  /// @param cross_entropy  this rank's share of the mean over the batch
  void add(double cross_entropy, const MoEOutput& output);
  /// Leaves out what passed since `start`: time that was no training.
  void skip_since(Clock::time_point start) { start_ += Clock::now() - start; }
  /// Collective. Loads are those of all gates together.
  StepReport report(int64_t step, int64_t num_steps, const comm::Group& world);

 private:
  std::vector<std::string> names_;
  std::vector<double> local_;  // cross-entropy, then the losses of the gates
  at::Tensor load_;
  int64_t images_per_step_;
  int64_t num_dropped_ = 0;
  int64_t steps_ = 0;
  Clock::time_point start_ = Clock::now();
};

}  // namespace perseid::examples
