#pragma once
#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "comm/group.h"
#include "examples/train_fashion/train.h"
#include "moe/moe_layer.h"

namespace perseid::examples {

/// Sums over steps since the last report; of several gates, loads are added and experts per token
/// are their mean.
class Meter {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Meter(const TrainOptions& options);
  /// @param cross_entropy  local part; the counts of `output` are those of all ranks
  void add(double cross_entropy, const MoEOutput& output);
  /// Leaves out what passed since `start`: time that was no training.
  void skip_since(Clock::time_point start) { start_ += Clock::now() - start; }
  /// Means since the last report, or the start; at least one step. Collective.
  StepReport report(int64_t step, int64_t num_steps, const comm::Group& world);

 private:
  std::vector<std::string> names_;  // of the losses of the gate
  std::vector<double> local_;       // cross-entropy, then the losses of the gate
  at::Tensor load_;
  double images_per_step_;
  double num_gates_ = 1;
  int64_t num_assignments_ = 0;
  int64_t num_dropped_ = 0;
  int64_t steps_ = 0;
  Clock::time_point start_ = Clock::now();
};

}  // namespace perseid::examples
