#include "examples/train_fashion/evaluate.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "comm/collectives.h"
#include "examples/train_fashion/loop.h"
#include "examples/train_fashion/metrics.h"
#include "examples/train_fashion/model.h"
#include "examples/train_fashion/shard.h"
#include "examples/train_fashion/trees.h"

namespace perseid::examples {
namespace {

constexpr double kActiveWeight = 1e-5;

/// Sums over the images of this rank.
struct TestSums {
  explicit TestSums(int64_t num_experts)
      : weight(at::zeros({kNumDomains, num_experts}, at::kDouble)),
        images(at::zeros({kNumDomains}, at::kDouble)) {}

  double correct = 0;
  double cross_entropy = 0;
  double active = 0;
  at::Tensor weight;  // [domains, E] of the gate
  at::Tensor images;  // [domains]
};

void set_results(const TestSums& sums, const comm::Group& world, RunResult& result) {
  std::vector<double> all{sums.correct, sums.cross_entropy, sums.active};
  for (const at::Tensor& table : {sums.images, sums.weight}) {
    all.insert(all.end(), table.const_data_ptr<double>(),
               table.const_data_ptr<double>() + table.numel());
  }
  comm::all_reduce(all.data(), static_cast<int64_t>(all.size()), comm::ReduceOp::kSum, world,
                   {"evaluate"});
  const double* const images = all.data() + 3;
  const double* const weight = images + kNumDomains;
  const double count = std::accumulate(images, weight, 0.0);
  result.accuracy = all[0] / count;
  result.cross_entropy = all[1] / count;
  result.experts_per_token = all[2] / count;
  result.domain_expert.assign(weight, weight + sums.weight.numel());
  result.domain_nmi = mutual_information(result.domain_expert, kNumDomains) /
                      std::log(static_cast<double>(kNumDomains));
  const size_t num_experts = result.domain_expert.size() / size_t{kNumDomains};
  for (size_t i = 0; i < result.domain_expert.size(); ++i) {
    result.domain_expert[i] /= std::max(images[i / num_experts], 1.0);
  }
}

}  // namespace

at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels) {
  const at::Tensor wide = logits.scalar_type() == at::kBFloat16 ? logits.to(at::kFloat) : logits;
  return at::cross_entropy_loss(wide, labels, {}, at::Reduction::Sum);
}

void evaluate(MoELayer& layer, const ImageTensors& images, const TrainOptions& options,
              RunResult& result) {
  const c10::NoGradGuard no_grad;
  layer.eval();
  const comm::Group& world = layer.groups().world;
  gates::Gate& gate = *layer.gates().front();
  std::optional<TreeCounter> trees;
  if (const auto* comet = dynamic_cast<const gates::CometGate*>(&gate)) {
    trees.emplace(*comet, kNumDomains);
  }
  const int64_t num_images = images.labels.size(0);
  TestSums sums(options.num_experts);
  at::Tensor load = at::zeros({options.num_experts}, at::kLong);
  for (int64_t begin = 0; begin < num_images; begin += kTestBatch) {
    const Shard shard =
        shard_of(std::min(kTestBatch, num_images - begin), world, options.idle_ranks);
    const auto cut = [&](const at::Tensor& all) {
      return all.narrow(0, begin + shard.begin, shard.size);
    };
    const MoEInput input = model_input(cut(images.pixels), cut(images.keys), options);
    const MoEOutput output = layer.forward(input);
    const at::Tensor labels = cut(images.labels).to(input.tokens.device());
    const at::Tensor domains = cut(images.domains);
    sums.cross_entropy += cross_entropy_sum(output.output(), labels).item<double>();
    sums.correct += output.output().argmax(1).eq(labels).sum().item<double>();
    load += output.stats.gates.front().tokens_per_expert;

    // The layer returns no weights; a gate is a pure function, so it is asked once more.
    gates::GateInput gate_input;
    gate_input.tokens = input.tokens;
    gate_input.keys = input.keys;
    const gates::GateOutput gate_output =
        layer.permutations().empty()
            ? gate.forward(gate_input)
            : layer.permutations().front()->forward(gate, gate_input, at::Tensor());
    const at::Tensor weights = gates::dense_weights(gate_output.routing, options.num_experts).cpu();
    sums.active += weights.gt(kActiveWeight).sum().item<double>();
    sums.weight.index_add_(0, domains, weights.to(at::kDouble));
    sums.images.index_add_(0, domains, at::ones_like(domains, at::kDouble));
    if (trees) trees->add(input.tokens, domains);
  }
  set_results(sums, world, result);
  result.tokens_per_expert.assign(load.const_data_ptr<int64_t>(),
                                  load.const_data_ptr<int64_t>() + load.numel());
  result.max_vio = max_vio(load);
  if (trees) result.trees = trees->total(world);
}

}  // namespace perseid::examples
