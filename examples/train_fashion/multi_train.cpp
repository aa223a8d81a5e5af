#include "examples/train_fashion/multi_train.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <span>
#include <utility>

#include "comm/collectives.h"
#include "examples/train_fashion/evaluate.h"
#include "examples/train_fashion/loop.h"
#include "examples/train_fashion/meter.h"
#include "examples/train_fashion/multi_model.h"
#include "examples/train_fashion/optimizer.h"
#include "examples/train_fashion/search.h"
#include "examples/train_fashion/shard.h"
#include "examples/train_fashion/sparsity.h"
#include "moe/gradients.h"

namespace perseid::examples {
namespace {

using Clock = Meter::Clock;

/// A copy: the graph of a loss outlives the batch.
at::Tensor class_tensor(const std::vector<int64_t>& classes) {
  return at::from_blob(const_cast<int64_t*>(classes.data()), {static_cast<int64_t>(classes.size())},
                       at::kLong)
      .clone();
}

/// Adds up what batches give. Losses and hits are those of this rank, counts already those of all.
class ScoreSums {
 public:
  void add(const std::array<at::Tensor, kNumTasks>& cross_entropy_sums, const MultiOutput& output,
           const CanvasBatch& batch) {
    for (size_t task = 0; task < kNumTasks; ++task) {
      const at::Tensor& logits = output.logits[task];
      const at::Tensor classes = class_tensor(batch.classes[task]).to(logits.device());
      local_[2 * task] += cross_entropy_sums[task].item<double>();
      local_[2 * task + 1] += logits.detach().argmax(1).eq(classes).sum().item<double>();
    }
    if (stats_.gates.empty()) {
      stats_ = output.layer.stats;
    } else {
      stats_ += output.layer.stats;
    }
  }

  /// Collective.
  MultiScore finish(const comm::Group& world) {
    comm::all_reduce(local_.data(), static_cast<int64_t>(local_.size()), comm::ReduceOp::kSum,
                     world, {"score"});
    const auto samples = static_cast<double>(stats_.num_tokens);
    MultiScore score;
    for (size_t task = 0; task < kNumTasks; ++task) {
      const gates::GateStats& gate = stats_.gates[task];
      const int64_t* loads = gate.tokens_per_expert.const_data_ptr<int64_t>();
      score.tasks[task] = {local_[2 * task + 1] / samples, local_[2 * task] / samples,
                           static_cast<double>(gate.num_assignments) / samples,
                           max_vio(gate.tokens_per_expert),
                           std::vector<int64_t>(loads, loads + gate.tokens_per_expert.numel())};
    }
    score.rows_per_sample = static_cast<double>(stats_.rows_processed) / samples;
    return score;
  }

 private:
  std::array<double, 2 * kNumTasks> local_{};  // cross-entropy and hits, task by task
  MoEStats stats_;
};

std::array<at::Tensor, kNumTasks> cross_entropy_sums(const MultiOutput& output,
                                                     const CanvasBatch& batch) {
  std::array<at::Tensor, kNumTasks> sums;
  for (size_t task = 0; task < kNumTasks; ++task) {
    const at::Tensor& logits = output.logits[task];
    sums[task] = cross_entropy_sum(logits, class_tensor(batch.classes[task]).to(logits.device()));
  }
  return sums;
}

/// Collective.
MultiScore score_of(MultiModel& model, const ImagePairs& pairs, const TrainOptions& options) {
  const c10::NoGradGuard no_grad;
  model.eval();
  const comm::Group& world = model.layer().groups().world;
  std::vector<int64_t> samples(static_cast<size_t>(pairs.size()));
  std::iota(samples.begin(), samples.end(), int64_t{0});
  ScoreSums sums;
  for (int64_t begin = 0; begin < pairs.size(); begin += kTestBatch) {
    const Shard shard =
        shard_of(std::min(kTestBatch, pairs.size() - begin), world, options.idle_ranks);
    const CanvasBatch batch =
        draw_batch(pairs, std::span(samples).subspan(static_cast<size_t>(begin + shard.begin),
                                                     static_cast<size_t>(shard.size)));
    const MultiOutput output = model.forward(multi_input(batch, options));
    sums.add(cross_entropy_sums(output, batch), output, batch);
  }
  model.train();
  return sums.finish(world);
}

/// Training of one model, epoch by epoch.
class Trainer {
 public:
  Trainer(const comm::Group& world, const MultiData& data, const MultiOptions& options,
          const OnReport& on_report)
      : data_(data),
        options_(options.train),
        on_report_(on_report),
        world_(world),
        shard_(shard_of(options_.global_batch_size, world, options_.idle_ranks)),
        num_steps_(examples::num_steps(options_, data.train.size())),
        steps_per_epoch_(data.train.size() / options_.global_batch_size),
        model_(world, options),
        optimizer_(model_, model_.layer().gates(), options_),
        sparse_(model_.layer(), optimizer_, options_, num_steps_),
        meter_(options_),
        search_(model_, model_.layer(), options_, data.train.size(),
                [this](std::span<const int64_t> samples) { return held_loss(samples); }) {
    model_.train();
  }

  /// Collective. The steps of the next epoch, as far as there are any left.
  MultiScore train_epoch() {
    const auto start = Clock::now();
    const auto epoch = static_cast<uint64_t>(step_ / steps_per_epoch_);
    const std::vector<int64_t> order =
        random_order(data_.train.size(), options_.seed, kStreamOrder + epoch);
    ScoreSums sums;
    for (int64_t i = 0; i < steps_per_epoch_ && step_ < num_steps_; ++i) {
      const auto first = static_cast<size_t>(i * options_.global_batch_size + shard_.begin);
      search_orders();
      train_step(draw_batch(data_.train,
                            std::span(order).subspan(first, static_cast<size_t>(shard_.size))),
                 sums);
    }
    seconds_ += std::chrono::duration<double>(Clock::now() - start).count();
    return sums.finish(world_);
  }

  /// Collective. With the weights as they are.
  MultiScore evaluate(const ImagePairs& pairs) {
    const auto start = Clock::now();
    const MultiScore score = score_of(model_, pairs, options_);
    meter_.skip_since(start);
    return score;
  }

  /// Collective, after the training.
  SearchResult finish_search() {
    search_.repair();
    return search_.result();
  }

  const SparseExperts& sparse() const { return sparse_; }

  bool finished() const { return step_ == num_steps_; }
  MultiModel& model() { return model_; }
  double seconds_per_epoch() const {
    return seconds_ * static_cast<double>(steps_per_epoch_) / static_cast<double>(step_);
  }
  /// Collective.
  std::vector<double> losses() const {
    std::vector<double> all = losses_;
    comm::all_reduce(all.data(), static_cast<int64_t>(all.size()), comm::ReduceOp::kSum, world_,
                     {"losses"});
    return all;
  }

 private:
  void search_orders() {
    const auto start = Clock::now();
    search_.before_step(step_);
    meter_.skip_since(start);
  }

  at::Tensor held_loss(std::span<const int64_t> samples) {
    const CanvasBatch batch = draw_batch(data_.train, samples);
    return mean_loss(cross_entropy_sums(model_.forward(multi_input(batch, options_)), batch));
  }

  /// This rank's part of the loss of a batch, from sums over its samples.
  at::Tensor mean_loss(const std::array<at::Tensor, kNumTasks>& of_tasks) const {
    return (of_tasks[0] + of_tasks[1]) / (2 * options_.global_batch_size);
  }

  void train_step(const CanvasBatch& batch, ScoreSums& sums) {
    MoEInput input = multi_input(batch, options_);
    input.step = step_;
    input.progress = static_cast<double>(step_) / static_cast<double>(num_steps_);

    // The loss is the sum over ranks of local losses, each over the samples of the whole batch.
    const MultiOutput output = model_.forward(input);
    const std::array<at::Tensor, kNumTasks> of_tasks = cross_entropy_sums(output, batch);
    const at::Tensor cross_entropy = mean_loss(of_tasks);
    const at::Tensor loss = cross_entropy + output.layer.loss();
    optimizer_.zero_grad();
    sparse_.before_step(step_);
    loss.backward();
    sum_gradients(model_, model_.layer().groups());
    sparse_.after_backward(step_);
    optimizer_.step(input.progress);
    sparse_.after_step(step_);
    model_.layer().after_step(output.layer.stats);

    ++step_;
    losses_.push_back(loss.item<double>());
    sums.add(of_tasks, output, batch);
    meter_.add(cross_entropy.item<double>(), output.layer);
    if (step_ == 1 || finished() || step_ % options_.log_interval == 0) {
      StepReport report = meter_.report(step_, num_steps_, world_);
      report.search = search_.result();
      if (on_report_) on_report_(report);
    }
  }

  const MultiData& data_;
  const TrainOptions options_;
  const OnReport& on_report_;
  const comm::Group world_;
  const Shard shard_;
  const int64_t num_steps_;
  const int64_t steps_per_epoch_;
  MultiModel model_;
  GateAdam optimizer_;
  SparseExperts sparse_;
  Meter meter_;
  OrderSearch search_;
  int64_t step_ = 0;
  double seconds_ = 0;
  std::vector<double> losses_;  // this rank's share
};

}  // namespace

MultiOptions multi_defaults(Protocol protocol) {
  const bool small = protocol == Protocol::kSmall;
  MultiOptions options;
  options.experts = small ? ExpertKind::kMlp : ExpertKind::kConv;
  TrainOptions& train = options.train;
  train.num_experts = small ? 6 : 5;
  train.balance_coeff = 0;
  train.entropy_coeff = .01;
  train.entropy_ramp = 0;
  train.input_norm = false;
  train.lr = 5e-4;
  train.adam_eps = 1e-7;
  train.gate_lr_factor = 1;
  train.lr_decay = 0;
  train.global_batch_size = small ? 256 : 512;
  train.epochs = small ? 8 : 200;
  return options;
}

double MultiScore::mean_cross_entropy() const {
  return (tasks[0].cross_entropy + tasks[1].cross_entropy) / 2;
}

MultiResult train_multi(const comm::Group& world, const MultiData& data,
                        const MultiOptions& options, const OnReport& on_report,
                        const OnEpoch& on_epoch) {
  check_options(options.train, world, data.train.size());
  Trainer trainer(world, data, options, on_report);
  MultiResult result;
  while (!trainer.finished()) {
    EpochScore score;
    score.epoch = static_cast<int64_t>(result.epochs.size()) + 1;
    score.train = trainer.train_epoch();
    score.validation = trainer.evaluate(data.validation);
    result.epochs.push_back(score);
    if (on_epoch) on_epoch(score);
    const bool better = result.best_epoch == 0 || score.validation.mean_cross_entropy() <
                                                      result.best().validation.mean_cross_entropy();
    if (better) {
      result.best_epoch = score.epoch;
      result.test = trainer.evaluate(data.test);
    }
  }
  result.losses = trainer.losses();
  result.num_steps = static_cast<int64_t>(result.losses.size());
  result.search = trainer.finish_search();
  result.seconds_per_epoch = trainer.seconds_per_epoch();
  result.sparsity = trainer.sparse().result();
  result.weights = collect_weights(trainer.model(), options);
  trainer.sparse().add_masks(result.weights);
  return result;
}

}  // namespace perseid::examples
