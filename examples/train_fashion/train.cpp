#include "examples/train_fashion/train.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "comm/collectives.h"
#include "examples/train_fashion/loop.h"
#include "examples/train_fashion/metrics.h"
#include "examples/train_fashion/model.h"
#include "examples/train_fashion/optimizer.h"
#include "examples/train_fashion/shard.h"
#include "moe/gradients.h"

namespace perseid::examples {
namespace {

constexpr double kActiveWeight = 1e-5;

/// Tensors over the images, without a copy.
struct ImageTensors {
  ImageTensors(const DomainImages& images, GateKind gate)
      : pixels(view(images.pixels, at::kByte).view({images.size(), kImagePixels})),
        labels(view(images.labels, at::kLong)),
        domains(view(images.domains, at::kLong)),
        keys(gate == GateKind::kOracle ? domains : view(images.keys, at::kLong)) {}

  at::Tensor pixels;
  at::Tensor labels;
  at::Tensor domains;
  at::Tensor keys;  // what gates without features route by

 private:
  template <typename T>
  static at::Tensor view(const std::vector<T>& values, at::ScalarType dtype) {
    // from_blob wants a mutable pointer; nothing here writes through it.
    return at::from_blob(const_cast<T*>(values.data()), {static_cast<int64_t>(values.size())},
                         dtype);
  }
};

void train(MoELayer& layer, const ImageTensors& images, const TrainOptions& options,
           const OnReport& on_report, RunResult& result) {
  const comm::Group& world = layer.groups().world;
  GateAdam optimizer(layer, layer.gates(), options);
  const int64_t num_images = images.labels.size(0);
  const int64_t steps_per_epoch = num_images / options.global_batch_size;
  const Shard shard = shard_of(options.global_batch_size, world, options.idle_ranks);
  result.num_steps = num_steps(options, num_images);
  result.losses.reserve(static_cast<size_t>(result.num_steps));

  layer.train();
  Meter meter(options);
  std::vector<int64_t> order;
  for (int64_t step = 0; step < result.num_steps; ++step) {
    if (step % steps_per_epoch == 0) {
      order = random_order(num_images, options.seed,
                           kStreamOrder + static_cast<uint64_t>(step / steps_per_epoch));
    }
    const int64_t first = step % steps_per_epoch * options.global_batch_size + shard.begin;
    const at::Tensor chosen = at::from_blob(order.data() + first, {shard.size}, at::kLong);
    MoEInput input = model_input(images.pixels.index_select(0, chosen),
                                 images.keys.index_select(0, chosen), options);
    input.step = step;
    input.progress = static_cast<double>(step) / static_cast<double>(result.num_steps);

    // The loss is the sum over ranks of local losses, each over the images of the whole batch.
    const MoEOutput output = layer.forward(input);
    const at::Tensor cross_entropy =
        cross_entropy_sum(output.output(), images.labels.index_select(0, chosen)) /
        options.global_batch_size;
    const at::Tensor loss = cross_entropy + output.loss();
    optimizer.zero_grad();
    loss.backward();
    sum_gradients(layer, layer.groups());
    optimizer.step(input.progress);
    layer.after_step(output.stats);

    result.losses.push_back(loss.item<double>());
    meter.add(cross_entropy.item<double>(), output);
    const bool last = step + 1 == result.num_steps;
    if (step == 0 || last || (step + 1) % options.log_interval == 0) {
      const StepReport report = meter.report(step + 1, result.num_steps, world);
      if (on_report) on_report(report);
    }
  }
  comm::all_reduce(result.losses.data(), static_cast<int64_t>(result.losses.size()),
                   comm::ReduceOp::kSum, world, {"losses"});
}

void evaluate(MoELayer& layer, const ImageTensors& images, const TrainOptions& options,
              RunResult& result) {
  const c10::NoGradGuard no_grad;
  layer.eval();
  const comm::Group& world = layer.groups().world;
  gates::Gate& gate = *layer.gates().front();
  const int64_t num_images = images.labels.size(0);
  double correct = 0;
  double cross_entropy = 0;
  double active = 0;
  at::Tensor mass = at::zeros({kNumDomains, options.num_experts}, at::kDouble);
  at::Tensor load = at::zeros({options.num_experts}, at::kLong);
  for (int64_t begin = 0; begin < num_images; begin += kTestBatch) {
    const Shard shard =
        shard_of(std::min(kTestBatch, num_images - begin), world, options.idle_ranks);
    const auto cut = [&](const at::Tensor& all) {
      return all.narrow(0, begin + shard.begin, shard.size);
    };
    const MoEInput input = model_input(cut(images.pixels), cut(images.keys), options);
    const MoEOutput output = layer.forward(input);
    const at::Tensor labels = cut(images.labels);
    cross_entropy += cross_entropy_sum(output.output(), labels).item<double>();
    correct += output.output().argmax(1).eq(labels).sum().item<double>();
    load += output.stats.gates.front().tokens_per_expert;

    // The layer returns no weights; a gate is a pure function, so it is asked once more.
    gates::GateInput gate_input;
    gate_input.tokens = input.tokens;
    gate_input.keys = input.keys;
    const at::Tensor weights =
        gates::dense_weights(gate.forward(gate_input).routing, options.num_experts);
    active += weights.gt(kActiveWeight).sum().item<double>();
    mass.index_add_(0, cut(images.domains), weights.to(at::kDouble));
  }

  std::vector<double> sums{correct, cross_entropy, active};
  sums.insert(sums.end(), mass.const_data_ptr<double>(),
              mass.const_data_ptr<double>() + mass.numel());
  comm::all_reduce(sums.data(), static_cast<int64_t>(sums.size()), comm::ReduceOp::kSum, world,
                   {"evaluate"});
  const auto count = static_cast<double>(num_images);
  result.accuracy = sums[0] / count;
  result.cross_entropy = sums[1] / count;
  result.experts_per_token = sums[2] / count;
  result.domain_nmi =
      mutual_information(std::vector<double>(sums.begin() + 3, sums.end()), kNumDomains) /
      std::log(static_cast<double>(kNumDomains));
  result.tokens_per_expert.assign(load.const_data_ptr<int64_t>(),
                                  load.const_data_ptr<int64_t>() + load.numel());
  result.max_vio = max_vio(load);
}

}  // namespace

const char* gate_name(GateKind gate) {
  switch (gate) {
    case GateKind::kSingle:
      return "single";
    case GateKind::kHash:
      return "hash";
    case GateKind::kOracle:
      return "oracle";
    case GateKind::kTopK:
      return "topk";
    case GateKind::kComet:
      return "comet";
    case GateKind::kDense:
      return "dense";
  }
  return "?";
}

ParameterCount count_parameters(const TrainOptions& options) {
  const int64_t expert = kImagePixels * kNumClasses + kNumClasses;
  const int64_t E = options.num_experts;
  int64_t linear_outputs = 0;  // of the gate
  int64_t selected = 1;
  switch (options.gate) {
    case GateKind::kSingle:
    case GateKind::kHash:
    case GateKind::kOracle:
      break;
    case GateKind::kTopK:
      linear_outputs = E;
      selected = options.top_k;
      break;
    case GateKind::kComet:
      linear_outputs = E > 1 ? options.top_k * (2 * E - 1) : 0;
      selected = options.top_k;
      break;
    case GateKind::kDense:
      linear_outputs = E;
      selected = E;
  }
  const int64_t router = linear_outputs * (kImagePixels + 1);
  return {router + E * expert, router + selected * expert};
}

int64_t num_steps(const TrainOptions& options, int64_t num_images) {
  if (options.train_iters > 0) return options.train_iters;
  return options.epochs * (num_images / options.global_batch_size);
}

RunResult train_domains(const comm::Group& world, const DomainData& data,
                        const TrainOptions& options, const OnReport& on_report) {
  check_options(options, world, data.train.size());
  const std::shared_ptr<MoELayer> layer = make_model(world, options);
  RunResult result;
  comm::barrier(world);
  const auto start = Clock::now();
  train(*layer, ImageTensors(data.train, options.gate), options, on_report, result);
  result.seconds = seconds_since(start);
  evaluate(*layer, ImageTensors(data.test, options.gate), options, result);
  result.weights = collect_weights(*layer, options.num_experts);
  return result;
}

}  // namespace perseid::examples
