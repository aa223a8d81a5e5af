#include "examples/train_fashion/search.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <utility>

#include "examples/train_fashion/domains.h"
#include "examples/train_fashion/loop.h"
#include "examples/train_fashion/shard.h"
#include "kernels/random.h"

namespace perseid::examples {
namespace {

using gates::PermSearch;

/// A loss is back if it exceeds the old one by no more than this share.
constexpr double kRecovered = 1e-6;

/// Whether a run needs held batches.
bool holds_batches(const TrainOptions& options) {
  return options.search.permutation.search() == PermSearch::kSwap || options.search.scramble > 0;
}

}  // namespace

gates::PermutationOptions permutation_options(const TrainOptions& options) {
  gates::PermutationOptions permutation = options.search.permutation;
  if (options.gate == GateKind::kSingle) permutation.search(PermSearch::kNone);
  return permutation.seed(options.seed);
}

OrderSearch::OrderSearch(torch::nn::Module& model, MoELayer& layer, const TrainOptions& options,
                         int64_t num_images, HeldLoss held_loss)
    : model_(model),
      layer_(layer),
      options_(options),
      num_steps_(num_steps(options, num_images)),
      interval_(options.search.interval > 0 ? options.search.interval
                                            : num_images / options.global_batch_size),
      held_loss_(std::move(held_loss)) {
  if (layer.permutations().empty() || !holds_batches(options)) return;
  const std::vector<int64_t> order = random_order(num_images, options.seed, kStreamHeld);
  const Shard shard = shard_of(options.global_batch_size, layer.groups().world, options.idle_ranks);
  for (int64_t batch = 0; batch < options.search.held_batches; ++batch) {
    const auto first = order.begin() + batch * options.global_batch_size + shard.begin;
    held_.emplace_back(first, first + shard.size);
  }
}

PermutationReport OrderSearch::search_now(int64_t max_evaluations) {
  PermutationSearchOptions search_options;
  search_options.max_evaluations = max_evaluations;
  return PermutationSearch(model_, search_options).search_now(held_.size(), [this](size_t batch) {
    return held_loss_(held_[batch]);
  });
}

void OrderSearch::before_step(int64_t step) {
  const gates::PermutationOptions& permutation = options_.search.permutation;
  const double progress = static_cast<double>(step) / static_cast<double>(num_steps_);
  if (layer_.permutations().empty() || permutation.search() != PermSearch::kSwap ||
      step % interval_ != 0 || progress >= permutation.until()) {
    return;
  }
  const auto start = std::chrono::steady_clock::now();
  const PermutationReport report = search_now(options_.search.max_evaluations);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  ++result_.searches;
  result_.evaluations += report.evaluations;
  result_.moves += static_cast<int64_t>(report.moves.size());
  result_.loss_before = report.loss_before;
  result_.loss_after = report.loss_after;
  result_.seconds += time.count();
}

void OrderSearch::scramble(const std::vector<at::Tensor>& trained, int64_t trial) {
  const kernels::RandomKey key =
      kernels::random_key(options_.seed).with(kStreamScramble).with(static_cast<uint64_t>(trial));
  for (size_t p = 0; p < trained.size(); ++p) {
    at::Tensor map = trained[p].clone();
    const int64_t E = map.size(1);
    for (int64_t unit = 0; unit < map.size(0); ++unit) {
      const std::vector<int64_t> order =
          random_order(E, key.with(p).value, static_cast<uint64_t>(unit));
      const int32_t* from = trained[p].const_data_ptr<int32_t>() + unit * E;
      int32_t* to = map.mutable_data_ptr<int32_t>() + unit * E;
      for (const int64_t output : order) *to++ = from[output];
    }
    layer_.permutations()[p]->set_map(map);
  }
}

void OrderSearch::repair() {
  const auto& permutations = layer_.permutations();
  if (permutations.empty() || options_.search.scramble == 0) return;
  std::vector<at::Tensor> trained;
  for (const auto& permutation : permutations) trained.push_back(permutation->host_map());
  const double loss = search_now(1).loss_before;
  result_.trained_loss = loss;
  for (int64_t trial = 0; trial < options_.search.scramble; ++trial) {
    scramble(trained, trial);
    const PermutationReport report = search_now(options_.search.max_evaluations);
    result_.repairs.push_back({report.loss_before, report.loss_after, report.evaluations,
                               report.loss_after <= loss + kRecovered * std::abs(loss)});
  }
  for (size_t p = 0; p < trained.size(); ++p) permutations[p]->set_map(trained[p]);
}

SearchResult OrderSearch::result() const {
  SearchResult result = result_;
  for (const auto& permutation : layer_.permutations()) {
    const at::Tensor map = permutation->host_map();
    const int32_t* expert = map.const_data_ptr<int32_t>();
    result.maps.emplace_back(expert, expert + map.numel());
    int64_t changed = 0;
    for (int64_t i = 0; i < map.numel(); ++i) changed += expert[i] != i % map.size(1) ? 1 : 0;
    result.changed.push_back(changed);
  }
  return result;
}

}  // namespace perseid::examples
