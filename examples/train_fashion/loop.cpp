#include "examples/train_fashion/loop.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>

#include "comm/collectives.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

constexpr const char* kOperation = "train_fashion";

}  // namespace

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void check_options(const TrainOptions& options, const comm::Group& world, int64_t num_images) {
  require(options.global_batch_size >= 1 && options.global_batch_size <= num_images, kOperation,
          "global_batch_size", options.global_batch_size,
          "is out of range; choose 1 to " + std::to_string(num_images) + ", the training images");
  require(options.idle_ranks >= 0 && options.idle_ranks < world.size(), kOperation, "idle_ranks",
          options.idle_ranks,
          "must leave one of " + std::to_string(world.size()) + " ranks with images; choose 0 to " +
              std::to_string(world.size() - 1));
  require(options.log_interval >= 1, kOperation, "log_interval", options.log_interval,
          "must be at least 1");
  const auto require_rate = [](const char* argument, double rate) {
    require(std::isfinite(rate) && rate > 0, kOperation, argument, rate, "must be above 0");
  };
  require_rate("lr", options.lr);
  require_rate("gate_lr_factor", options.gate_lr_factor);
  require(options.lr_decay >= 0 && options.lr_decay <= 1, kOperation, "lr_decay", options.lr_decay,
          "is a share of the run; choose 0 to 1");
}

at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels) {
  const at::Tensor wide = logits.scalar_type() == at::kBFloat16 ? logits.to(at::kFloat) : logits;
  return at::cross_entropy_loss(wide, labels, {}, at::Reduction::Sum);
}

Meter::Meter(const TrainOptions& options)
    : load_(at::zeros({options.num_experts}, at::kLong)),
      images_per_step_(options.global_batch_size) {}

void Meter::add(double cross_entropy, const MoEOutput& output) {
  if (local_.empty()) {
    for (const gates::NamedLoss& loss : output.losses) names_.push_back(loss.name);
    local_.assign(1 + names_.size(), 0);
  }
  local_[0] += cross_entropy;
  for (size_t i = 0; i < names_.size(); ++i) local_[1 + i] += output.losses[i].raw.item<double>();
  for (const gates::GateStats& gate : output.stats.gates) load_ += gate.tokens_per_expert;
  num_dropped_ += output.stats.num_dropped;
  ++steps_;
}

StepReport Meter::report(int64_t step, int64_t num_steps, const comm::Group& world) {
  comm::all_reduce(local_.data(), static_cast<int64_t>(local_.size()), comm::ReduceOp::kSum, world,
                   {"report", -1, step});
  const double seconds = seconds_since(start_);
  const auto steps = static_cast<double>(steps_);
  StepReport report;
  report.step = step;
  report.num_steps = num_steps;
  report.cross_entropy = local_[0] / steps;
  for (size_t i = 0; i < names_.size(); ++i) {
    report.gate_losses.push_back({names_[i], local_[1 + i] / steps});
  }
  report.tokens_per_expert.assign(load_.const_data_ptr<int64_t>(),
                                  load_.const_data_ptr<int64_t>() + load_.numel());
  report.max_vio = max_vio(load_);
  report.num_dropped = num_dropped_;
  report.step_ms = 1e3 * seconds / steps;
  report.tokens_per_second = steps * static_cast<double>(images_per_step_) / seconds;
  std::fill(local_.begin(), local_.end(), 0);
  load_.zero_();
  num_dropped_ = 0;
  steps_ = 0;
  start_ = Clock::now();
  return report;
}

}  // namespace perseid::examples
