#include "examples/train_fashion/train.h"

#include <ATen/ops/from_blob.h>

#include <bit>
#include <chrono>
#include <span>

#include "comm/collectives.h"
#include "examples/train_fashion/evaluate.h"
#include "examples/train_fashion/image_tensors.h"
#include "examples/train_fashion/loop.h"
#include "examples/train_fashion/meter.h"
#include "examples/train_fashion/model.h"
#include "examples/train_fashion/optimizer.h"
#include "examples/train_fashion/search.h"
#include "examples/train_fashion/shard.h"
#include "examples/train_fashion/sparsity.h"
#include "moe/gradients.h"

namespace perseid::examples {
namespace {

constexpr int64_t kCurvePoints = 50;

/// Layer and loss of some images of the data set.
struct BatchResult {
  MoEOutput output;
  at::Tensor cross_entropy;  ///< summed over these images / global_batch_size
};
BatchResult run_batch(MoELayer& layer, const ImageTensors& images, std::span<const int64_t> numbers,
                      const TrainOptions& options, int64_t step, double progress) {
  // from_blob wants a mutable pointer; nothing here writes through it.
  const at::Tensor chosen = at::from_blob(const_cast<int64_t*>(numbers.data()),
                                          {static_cast<int64_t>(numbers.size())}, at::kLong);
  MoEInput input = model_input(images.pixels.index_select(0, chosen),
                               images.keys.index_select(0, chosen), options);
  input.step = step;
  input.progress = progress;
  BatchResult result{layer.forward(input), {}};
  // The loss is the sum over ranks of local losses, each over the images of the whole batch.
  result.cross_entropy =
      cross_entropy_sum(result.output.output(),
                        images.labels.index_select(0, chosen).to(input.tokens.device())) /
      options.global_batch_size;
  return result;
}

void train(MoELayer& layer, const ImageTensors& images, const TrainOptions& options,
           const OnReport& on_report, OrderSearch& search, GateAdam& optimizer,
           SparseExperts& sparse, RunResult& result) {
  const comm::Group& world = layer.groups().world;
  const int64_t num_images = images.labels.size(0);
  const int64_t steps_per_epoch = num_images / options.global_batch_size;
  const Shard shard = shard_of(options.global_batch_size, world, options.idle_ranks);
  result.num_steps = num_steps(options, num_images);
  result.losses.reserve(static_cast<size_t>(result.num_steps));

  layer.train();
  Meter meter(options);
  Meter curve(options);
  const int64_t curve_interval = (result.num_steps + kCurvePoints - 1) / kCurvePoints;
  int64_t rows = 0;
  std::vector<int64_t> order;
  for (int64_t step = 0; step < result.num_steps; ++step) {
    if (step % steps_per_epoch == 0) {
      order = random_order(num_images, options.seed,
                           kStreamOrder + static_cast<uint64_t>(step / steps_per_epoch));
    }
    const auto search_start = Meter::Clock::now();
    search.before_step(step);
    meter.skip_since(search_start);
    const int64_t first = step % steps_per_epoch * options.global_batch_size + shard.begin;
    const double progress = static_cast<double>(step) / static_cast<double>(result.num_steps);
    const auto [output, cross_entropy] = run_batch(
        layer, images,
        std::span(order).subspan(static_cast<size_t>(first), static_cast<size_t>(shard.size)),
        options, step, progress);
    const at::Tensor loss = cross_entropy + output.loss();
    optimizer.zero_grad();
    sparse.before_step(step);
    loss.backward();
    sum_gradients(layer, layer.groups());
    sparse.after_backward(step);
    optimizer.step(progress);
    sparse.after_step(step);
    layer.after_step(output.stats);

    result.losses.push_back(loss.item<double>());
    const auto value = cross_entropy.item<double>();
    meter.add(value, output);
    curve.add(value, output);
    rows += output.stats.rows_processed;
    const bool last = step + 1 == result.num_steps;
    if (step == 0 || last || (step + 1) % options.log_interval == 0) {
      StepReport report = meter.report(step + 1, result.num_steps, world);
      report.search = search.result();
      if (on_report) on_report(report);
    }
    if (last || (step + 1) % curve_interval == 0) {
      result.curve.push_back(curve.report(step + 1, result.num_steps, world));
    }
  }
  result.sparsity = sparse.result();
  sparse.add_masks(result.weights);
  result.rows_per_token =
      static_cast<double>(rows) / static_cast<double>(result.num_steps * options.global_batch_size);
  comm::all_reduce(result.losses.data(), static_cast<int64_t>(result.losses.size()),
                   comm::ReduceOp::kSum, world, {"losses"});
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
    case GateKind::kDSelectK:
      return "dselectk";
    case GateKind::kComet:
      return "comet";
    case GateKind::kDense:
      return "dense";
  }
  return "?";
}

ParameterCount count_parameters(const TrainOptions& options) {
  const int64_t pixels = options.image_pixels(), d_ff = options.d_ff;
  const int64_t expert =
      d_ff > 0 ? (pixels + 1) * d_ff + (d_ff + 1) * kNumClasses : (pixels + 1) * kNumClasses;
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
    case GateKind::kDSelectK:
      linear_outputs =
          E > 1 ? options.top_k * (1 + std::bit_width(static_cast<uint64_t>(E - 1))) : 0;
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
  const int64_t router = linear_outputs * (pixels + 1);
  return {router + E * expert, router + selected * expert};
}

int64_t TrainOptions::image_pixels() const {
  const int64_t side = kImageSide + (pad_images ? 2 * kImageFrame : 0);
  return side * side;
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
  const auto start = std::chrono::steady_clock::now();
  const ImageTensors images(data.train, options.gate);
  OrderSearch search(*layer, *layer, options, data.train.size(),
                     [&](std::span<const int64_t> held) {
                       return run_batch(*layer, images, held, options, 0, 0).cross_entropy;
                     });
  GateAdam optimizer(*layer, layer->gates(), options);
  // Lives until the test: the experts compute with the weights that it leaves them.
  SparseExperts sparse(*layer, optimizer, options, num_steps(options, data.train.size()));
  train(*layer, images, options, on_report, search, optimizer, sparse, result);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  result.seconds = time.count();
  result.seconds_per_epoch = result.seconds / static_cast<double>(result.num_steps) *
                             static_cast<double>(data.train.size() / options.global_batch_size);
  evaluate(*layer, ImageTensors(data.test, options.gate), options, result);
  search.repair();
  result.search = search.result();
  const std::vector<WeightDump> weights = collect_weights(*layer, options.num_experts);
  result.weights.insert(result.weights.begin(), weights.begin(), weights.end());
  return result;
}

}  // namespace perseid::examples
