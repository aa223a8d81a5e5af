#include "examples/train_fashion/meter.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

#include "comm/collectives.h"

namespace perseid::examples {

Meter::Meter(const TrainOptions& options)
    : load_(at::zeros({options.num_experts}, at::kLong)),
      images_per_step_(static_cast<double>(options.global_batch_size)) {}

void Meter::add(double cross_entropy, const MoEOutput& output) {
  if (local_.empty()) {
    for (const gates::NamedLoss& loss : output.losses) names_.push_back(loss.name);
    local_.assign(1 + names_.size(), 0);
  }
  local_[0] += cross_entropy;
  for (size_t i = 0; i < names_.size(); ++i) local_[1 + i] += output.losses[i].raw.item<double>();
  for (const gates::GateStats& gate : output.stats.gates) {
    load_ += gate.tokens_per_expert;
    num_assignments_ += gate.num_assignments;
  }
  num_gates_ = static_cast<double>(output.stats.gates.size());
  num_dropped_ += output.stats.num_dropped;
  ++steps_;
}

StepReport Meter::report(int64_t step, int64_t num_steps, const comm::Group& world) {
  comm::all_reduce(local_.data(), static_cast<int64_t>(local_.size()), comm::ReduceOp::kSum, world,
                   {"report", -1, step});
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
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
  report.experts_per_token =
      static_cast<double>(num_assignments_) / (steps * images_per_step_ * num_gates_);
  report.max_vio = max_vio(load_);
  report.num_dropped = num_dropped_;
  report.step_ms = 1e3 * seconds / steps;
  report.tokens_per_second = steps * images_per_step_ / seconds;
  std::fill(local_.begin(), local_.end(), 0);
  load_.zero_();
  num_assignments_ = 0;
  num_dropped_ = 0;
  steps_ = 0;
  start_ = Clock::now();
  return report;
}

}  // namespace perseid::examples
