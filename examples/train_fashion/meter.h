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
  /// A loss of a gate or of an order of experts. Several gates may have losses of one name.
  struct Loss {
    std::string name;
    int64_t number = 0;  ///< among those of its name
    double local = 0;
    int64_t steps = 0;  ///< that it was part of: an order has one in its soft stage alone
  };
  Loss& loss_of(const std::string& name, int64_t number);

  double cross_entropy_ = 0;  // local
  std::vector<Loss> losses_;
  at::Tensor load_;
  double images_per_step_;
  double num_gates_ = 1;
  int64_t num_assignments_ = 0;
  int64_t num_dropped_ = 0;
  int64_t steps_ = 0;
  Clock::time_point start_ = Clock::now();
};

}  // namespace perseid::examples
