#include "examples/train_fashion/meter.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

#include "comm/collectives.h"

namespace perseid::examples {

Meter::Meter(const TrainOptions& options)
    : load_(at::zeros({options.num_experts}, at::kLong)),
      images_per_step_(static_cast<double>(options.global_batch_size)) {}

void Meter::add(double cross_entropy, const MoEOutput& output) {
  cross_entropy_ += cross_entropy;
  for (auto loss = output.losses.begin(); loss != output.losses.end(); ++loss) {
    const auto number = std::count_if(
        output.losses.begin(), loss,
        [loss](const gates::NamedLoss& earlier) { return earlier.name == loss->name; });
    Loss& sum = loss_of(loss->name, number);
    sum.local += loss->raw.item<double>();
    ++sum.steps;
  }
  for (const gates::GateStats& gate : output.stats.gates) {
    load_ += gate.tokens_per_expert;
    num_assignments_ += gate.num_assignments;
  }
  num_gates_ = static_cast<double>(output.stats.gates.size());
  num_dropped_ += output.stats.num_dropped;
  ++steps_;
}

Meter::Loss& Meter::loss_of(const std::string& name, int64_t number) {
  const auto found = std::find_if(losses_.begin(), losses_.end(), [&](const Loss& loss) {
    return loss.name == name && loss.number == number;
  });
  if (found != losses_.end()) return *found;
  return losses_.emplace_back(Loss{name, number});
}

StepReport Meter::report(int64_t step, int64_t num_steps, const comm::Group& world) {
  std::vector<double> sums{cross_entropy_};
  for (const Loss& loss : losses_) sums.push_back(loss.local);
  comm::all_reduce(sums.data(), static_cast<int64_t>(sums.size()), comm::ReduceOp::kSum, world,
                   {"report", -1, step});
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  const auto steps = static_cast<double>(steps_);
  StepReport report;
  report.step = step;
  report.num_steps = num_steps;
  report.cross_entropy = sums[0] / steps;
  for (size_t i = 0; i < losses_.size(); ++i) {
    if (losses_[i].steps == 0) continue;
    report.gate_losses.push_back(
        {losses_[i].name, sums[1 + i] / static_cast<double>(losses_[i].steps)});
  }
  report.tokens_per_expert.assign(load_.const_data_ptr<int64_t>(),
                                  load_.const_data_ptr<int64_t>() + load_.numel());
  report.experts_per_token =
      static_cast<double>(num_assignments_) / (steps * images_per_step_ * num_gates_);
  report.max_vio = max_vio(load_);
  report.num_dropped = num_dropped_;
  report.step_ms = 1e3 * seconds / steps;
  report.tokens_per_second = steps * images_per_step_ / seconds;
  cross_entropy_ = 0;
  for (Loss& loss : losses_) loss = Loss{loss.name, loss.number};
  load_.zero_();
  num_assignments_ = 0;
  num_dropped_ = 0;
  steps_ = 0;
  start_ = Clock::now();
  return report;
}

}  // namespace perseid::examples
