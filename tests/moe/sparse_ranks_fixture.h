#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>
#include <torch/optim/sgd.h>

#include <map>
#include <mutex>
#include <random>

#include "moe/gradients.h"
#include "moe/sparse_linear.h"
#include "moe/sparsifier.h"
#include "tests/moe/layer_fixture.h"

// A layer with sparse experts and a sparse head, trained on any number of ranks.

namespace perseid::testing {

inline constexpr int64_t kE = 5, kTokens = 37;

/// Experts and weights by the global token alone: token t runs experts 2t, 2t + 1, ... modulo the
/// number of `used` ones; token 0 runs `single` in the place of its first, if there is such.
class TableGate : public gates::Gate {
 public:
  explicit TableGate(int64_t used = kE, int64_t single = -1)
      : Gate("table_gate", kE, 2), used_(used), single_(single) {}
  gates::GateOutput forward(const gates::GateInput& input) override {
    const int64_t num_tokens = input.tokens.size(0);
    const at::Tensor ids = at::empty({num_tokens, 2}, at::kInt);
    const at::Tensor weights = at::empty({num_tokens, 2}, at::kDouble);
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t token = input.first_token + t;
      for (int64_t k = 0; k < 2; ++k) {
        ids[t][k] = token == 0 && k == 0 && single_ >= 0 ? single_ : (token * 2 + k) % used_;
        weights[t][k] = 1.0 / static_cast<double>(3 + token + 7 * k);
      }
    }
    gates::GateOutput out;
    out.routing = gates::routing_from_table(ids, weights, kE);
    out.stats = gates::count_assignments(out.routing, kE, num_tokens);
    return out;
  }

 private:
  int64_t used_, single_;
};

inline std::pair<int64_t, int64_t> shard(int rank, int num_ranks) {  // first token and count
  if (num_ranks == 1) return {0, kTokens};
  if (num_ranks == 2) return rank == 0 ? std::pair<int64_t, int64_t>{0, 30} : std::pair{30L, 7L};
  const std::vector<int64_t> ends = {20, 20, 26, 30, 31, 31, 35, kTokens};
  const auto r = static_cast<size_t>(rank);
  const int64_t first = r == 0 ? 0 : ends[r - 1];
  return {first, (rank + 1 == num_ranks ? kTokens : ends[r]) - first};
}

/// A layer; and with a head: an expert for all tokens beside it, and on what they give a sparse
/// linear map, both held by all ranks.
struct SparseModel : torch::nn::Module {
  SparseModel(const ParallelGroups& groups_, bool has_head_, std::shared_ptr<gates::Gate> gate)
      : groups(groups_), has_head(has_head_) {
    const auto placement = ExpertPlacement::contiguous(kE, groups.expert_parallel.size());
    if (has_head) {
      shared = make_experts(ExpertKind::kGated, ExpertPlacement::contiguous(1, 1), 0, at::kDouble);
    }
    layer = register_module("layer", std::make_shared<MoELayer>(
                                         std::vector<std::shared_ptr<gates::Gate>>{std::move(gate)},
                                         make_experts(ExpertKind::kGated, placement,
                                                      groups.expert_parallel.rank(), at::kDouble),
                                         placement, groups, MoELayerOptions(), shared));
    head = register_module(
        "head",
        SparseLinear(SparseLinearOptions(kDOut, 9).bias(false).key({1}).dtype(at::kDouble)));
  }
  std::vector<SparseUnit> units() const {
    std::vector<SparseUnit> all = layer->experts()->sparse_units(0);
    if (!has_head) return all;
    for (const SparseUnit& unit : shared->sparse_units(0)) all.push_back(unit);
    all.push_back(head->unit());
    return all;
  }
  MoEStats backward(int64_t step) {
    const auto [first, count] = shard(groups.world.rank(), groups.world.size());
    const at::Tensor tokens =
        random_tensor({kTokens, kDModel}, 500 + static_cast<uint64_t>(step), -1, 1)
            .narrow(0, first, count);
    const MoEOutput out = layer->forward(MoEInput(tokens));
    std::vector<at::Tensor> outputs = {has_head ? head(out.output()).tanh() : out.output()};
    weighted_loss(outputs, first).backward();
    return out.stats;
  }

  ParallelGroups groups;
  bool has_head;
  std::shared_ptr<Experts> shared;
  std::shared_ptr<MoELayer> layer;
  SparseLinear head{nullptr};
};

inline SparsifierConfig config_of(GrowCriterion grow,
                                  UpdateOrder order = UpdateOrder::kBeforeStep) {
  SparsifierConfig config;
  config.budget.density = 0.5;
  config.rule.grow = grow;
  config.schedule.begin = 1;
  config.schedule.every = 3;
  config.schedule.end = 100;
  config.schedule.anneal = Anneal::kConstant;
  config.order = order;
  config.min_rows = 1;
  return config;
}

using Masks = std::map<UnitKey, PackedMask>;
using Weights = std::map<UnitKey, at::Tensor>;

/// Of all ranks.
struct Trained {
  Masks masks;
  Weights weights;
  SparsifierState state;
  SparsityTotals totals;
  int64_t num_grown = 0;  ///< on rank 0
};

struct RunOptions {
  int64_t first_step = 0;
  int64_t end_step = 13;
  bool has_head = true;
  bool shuffles = false;
  const Trained* from = nullptr;
};

inline Trained train(int num_ranks, int64_t ep_size, const SparsifierConfig& config,
                     const RunOptions& options = {}) {
  Trained result;
  std::mutex mutex;
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    const ParallelGroups groups = make_parallel_groups(world, ep_size);
    if (options.shuffles) {
      at::Generator generator = at::detail::getDefaultCPUGenerator();
      const std::lock_guard lock(generator.mutex());
      generator.set_current_seed(static_cast<uint64_t>(world.rank()) + 77);
    }
    SparseModel model(groups, options.has_head, std::make_shared<TableGate>());
    std::vector<SparseUnit> units = model.units();
    if (options.shuffles) {
      std::shuffle(units.begin(), units.end(), std::mt19937(static_cast<unsigned>(world.rank())));
    }
    Sparsifier sparsifier(units, config, groups);
    if (options.from != nullptr) {
      const at::NoGradGuard no_grad;
      for (const SparseUnit& unit : units) unit.weight().copy_(options.from->weights.at(unit.key));
      sparsifier.load(options.from->state);
    }
    torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.1));
    sparsifier.attach(optimizer);
    int64_t num_grown = 0;
    for (int64_t step = options.first_step; step < options.end_step; ++step) {
      sparsifier.begin_step(step);
      optimizer.zero_grad();
      model.backward(step);
      sum_gradients(model, groups);
      for (const UnitUpdate& unit : sparsifier.end_backward(step).units)
        num_grown += unit.num_grown;
      optimizer.step();
      for (const UnitUpdate& unit : sparsifier.end_step(step).units) num_grown += unit.num_grown;
    }
    const SparsifierState state = sparsifier.state_dict();
    const SparsityTotals totals = sparsifier.totals();
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) {
      result.state = state;
      result.totals = totals;
      result.num_grown = num_grown;
    }
    EXPECT_EQ(totals.nnz, result.totals.nnz == 0 ? totals.nnz : result.totals.nnz);
    for (const SparseUnit& unit : sparsifier.units()) {
      const auto [place, is_new] = result.masks.emplace(unit.key, sparsifier.mask(unit.key));
      EXPECT_EQ(place->second, sparsifier.mask(unit.key)) << unit.name;
      if (is_new) {
        result.weights[unit.key] = unit.weight().clone();
      } else {
        EXPECT_TRUE(same_bits(result.weights[unit.key], unit.weight())) << unit.name;
      }
    }
  });
  return result;
}

/// Steps [first_step, end_step), from the start or from where another run ended.
inline Trained train_piece(const SparsifierConfig& config, int num_ranks, int64_t ep_size,
                           int64_t first_step, int64_t end_step, const Trained* from) {
  RunOptions options;
  options.first_step = first_step;
  options.end_step = end_step;
  options.from = from;
  return train(num_ranks, ep_size, config, options);
}

inline void expect_same_bits(const Trained& a, const Trained& b) {
  EXPECT_EQ(a.masks, b.masks);
  for (const auto& [key, weight] : a.weights) {
    EXPECT_TRUE(same_bits(weight, b.weights.at(key))) << to_string(key);
  }
}

inline void expect_close(const Trained& a, const Trained& b, double tolerance) {
  EXPECT_EQ(a.masks, b.masks);
  ASSERT_EQ(a.weights.size(), b.weights.size());
  for (const auto& [key, weight] : a.weights) {
    EXPECT_TRUE(close_to(weight, b.weights.at(key), tolerance)) << to_string(key);
  }
}

inline std::vector<std::pair<int, int64_t>> layouts() {
  return {{2, 1}, {2, 2}, {4, 1}, {4, 2}, {4, 4}};
}

}  // namespace perseid::testing
