// The Sparsifier on the experts of a layer, over ranks (threads), float64.
//   SameMasks        P = 1, 2, 4, 8, any ep_size; static, SET, RigL, staggered, constant fan-in:
//   the
//                    masks of one process, per global expert; weights within 1e-11
//   SameBits         one replica of each expert, strict: weights too, bit for bit
//   IgnoresOrder     other host seeds on each rank and shuffled units: the same masks
//   RowsOfThePlan    rows of each expert: once for two gates, after capacity, of all ranks
//   Idle             an expert without tokens is skipped and unchanged; one token, a gradient of
//                    rank 1, keeps the budget
//   ManyUpdates      200 updates of half of all: floors, equal cells and the global sum hold
//   Staggered        ranks together update each unit once per window, none after the end
//   TokenClock       uniform load: the step clock; twice the load: twice as often; none: never; not
//                    after the end of either clock; measured means; resumed
//   FlippedBit       in the mask of one replica: all ranks throw, name unit and ranks; no change
//   NonFinite        a NaN on one rank: all ranks throw, name unit and step; no change
//   Disagree         configurations, units, shapes: all ranks throw the same
//   Checkpoint       P 4 -> 2 -> 8 inside a window of gradients: the run of one process; the same
//                    P: bit for bit
//   LoadRefused      missing masks, old versions, states that differ between ranks
//   Units            names and keys of experts of all kinds, shared ones and modules; patterns
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/embedding.h>
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>

#include <map>
#include <mutex>
#include <random>

#include "moe/gradients.h"
#include "moe/sparse_linear.h"
#include "moe/sparse_presets.h"
#include "moe/sparsifier.h"
#include "tests/config_error.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

constexpr int64_t kE = 5, kTokens = 37;

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

std::pair<int64_t, int64_t> shard(int rank, int num_ranks) {  // first token and count
  if (num_ranks == 1) return {0, kTokens};
  if (num_ranks == 2) return rank == 0 ? std::pair<int64_t, int64_t>{0, 30} : std::pair{30L, 7L};
  const std::vector<int64_t> ends = {20, 20, 26, 30, 31, 31, 35, kTokens};
  const auto r = static_cast<size_t>(rank);
  const int64_t first = r == 0 ? 0 : ends[r - 1];
  return {first, (rank + 1 == num_ranks ? kTokens : ends[r]) - first};
}

/// A layer; and with a head: an expert for all tokens beside it, and on what they give a sparse
/// linear map, both held by all ranks.
struct Model : torch::nn::Module {
  Model(const ParallelGroups& groups_, bool has_head_, std::shared_ptr<gates::Gate> gate)
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

SparsifierConfig config_of(GrowCriterion grow, UpdateOrder order = UpdateOrder::kBeforeStep) {
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

Trained train(int num_ranks, int64_t ep_size, const SparsifierConfig& config,
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
    Model model(groups, options.has_head, std::make_shared<TableGate>());
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

void expect_close(const Trained& a, const Trained& b, double tolerance) {
  EXPECT_EQ(a.masks, b.masks);
  ASSERT_EQ(a.weights.size(), b.weights.size());
  for (const auto& [key, weight] : a.weights) {
    EXPECT_TRUE(close_to(weight, b.weights.at(key), tolerance)) << to_string(key);
  }
}

std::vector<std::pair<int, int64_t>> layouts() { return {{2, 1}, {2, 2}, {4, 1}, {4, 2}, {4, 4}}; }

TEST(SparseRanks, SameMasks) {
  at::set_num_threads(1);
  SparsifierConfig rigl = config_of(GrowCriterion::kGrad);
  rigl.grad_accum = 2;
  SparsifierConfig staggered = config_of(GrowCriterion::kGrad);
  staggered.schedule.stagger = true;
  staggered.schedule.every = 4;
  SparsifierConfig instead = config_of(GrowCriterion::kGrad, UpdateOrder::kInsteadOfStep);
  SparsifierConfig set = config_of(GrowCriterion::kRandom, UpdateOrder::kAfterStep);
  set.rule.drop = DropCriterion::kSetSigned;
  set.state.weight = GrownWeight::kNormal;
  SparsifierConfig fan_in = config_of(GrowCriterion::kGrad);
  fan_in.structure = Structure::constant_fan_in();
  const std::vector<SparsifierConfig> configs = {
      presets::static_mask(0.5), set, rigl, staggered, instead, fan_in};
  for (size_t c = 0; c < configs.size(); ++c) {
    const Trained one = train(1, 1, configs[c]);
    EXPECT_EQ(one.totals.size, 708);  // (5 + 1) (2 * 6 * 7 + 7 * 4) + 4 * 9
    if (c < 5) {
      EXPECT_EQ(one.totals.nnz, 354);
    }
    EXPECT_EQ(one.num_grown > 20, c > 0) << c;
    for (const auto& [num_ranks, ep_size] : layouts()) {
      SCOPED_TRACE("config " + std::to_string(c) + " P=" + std::to_string(num_ranks) +
                   " ep=" + std::to_string(ep_size));
      const Trained many = train(num_ranks, ep_size, configs[c]);
      expect_close(many, one, 1e-11);
      EXPECT_EQ(many.totals.nnz, one.totals.nnz);
      EXPECT_EQ(many.totals.size, one.totals.size);
      EXPECT_EQ(many.totals.ever_active, one.totals.ever_active);
      EXPECT_EQ(many.totals.num_updates, one.totals.num_updates);
      EXPECT_NEAR(many.totals.churn, one.totals.churn, 1e-12);
    }
  }
}

TEST(SparseRanks, SameBits) {
  at::set_num_threads(1);
  for (const GrowCriterion grow : {GrowCriterion::kRandom, GrowCriterion::kGrad}) {
    RunOptions options;
    options.has_head = false;
    const Trained one = train(1, 1, config_of(grow), options);
    for (const int num_ranks : {2, 4}) {
      const Trained many = train(num_ranks, num_ranks, config_of(grow), options);
      EXPECT_EQ(many.masks, one.masks);
      for (const auto& [key, weight] : one.weights) {
        EXPECT_TRUE(same_bits(weight, many.weights.at(key))) << to_string(key) << " " << num_ranks;
      }
    }
  }
}

TEST(SparseRanks, IgnoresOrder) {
  at::set_num_threads(1);
  SparsifierConfig config = config_of(GrowCriterion::kRandom);
  config.schedule.stagger = true;
  RunOptions shuffled;
  shuffled.shuffles = true;
  const Trained plain = train(4, 2, config), other = train(4, 2, config, shuffled);
  EXPECT_EQ(plain.masks, other.masks);
  for (const auto& [key, weight] : plain.weights) {
    EXPECT_TRUE(same_bits(weight, other.weights.at(key))) << to_string(key);
  }
}

TEST(SparseRanks, RowsOfThePlan) {
  at::set_num_threads(1);
  for (const ExpertKind kind : {ExpertKind::kPlain, ExpertKind::kLinear, ExpertKind::kModule}) {
    for (const int num_ranks : {1, 2, 4}) {
      for (int64_t ep_size = 1; ep_size <= num_ranks; ep_size *= 2) {
        comm::run_local(num_ranks, [&](const comm::Group& world) {
          const ParallelGroups groups = make_parallel_groups(world, ep_size);
          LayerCase c{kE, 2, kTokens, 2, kind, {}};
          c.capacity.capacity_factor = .8;
          const auto layer = make_layer(c, groups);
          Sparsifier sparsifier(layer->experts()->sparse_units(0),
                                config_of(GrowCriterion::kRandom), groups);
          const auto [first, count] = shard(world.rank(), num_ranks);
          int64_t rows = 0, num_dropped = 0;
          for (int64_t pass = 0; pass < 2; ++pass) {  // two micro-batches of step 0
            if (pass == 0) sparsifier.begin_step(0);
            const MoEOutput out =
                layer->forward(MoEInput(case_tokens(kTokens).narrow(0, first, count)));
            {
              const at::NoGradGuard no_grad;
              layer->forward(MoEInput(case_tokens(count)));
            }
            weighted_loss(out.outputs, first).backward();
            rows += out.stats.rows_processed;
            num_dropped += out.stats.num_dropped;
          }
          EXPECT_GT(num_dropped, 0);
          sum_gradients(*layer, groups);
          sparsifier.end_backward(0);
          sparsifier.end_step(0);
          std::map<Matrix, int64_t> counted;
          for (const UnitState& unit : sparsifier.state_dict().units) {
            counted[unit.key.matrix] += unit.num_rows;
          }
          for (const auto& [matrix, number] : counted) EXPECT_EQ(number, rows) << num_ranks;
        });
      }
    }
  }
}

TEST(SparseRanks, Idle) {
  at::set_num_threads(1);
  for (const int num_ranks : {1, 2}) {
    comm::run_local(num_ranks, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world);
      Model model(groups, false, std::make_shared<TableGate>(3, 3));  // expert 3: token 0; 4: none
      const std::vector<SparseUnit> units = model.units();
      Sparsifier sparsifier(units, config_of(GrowCriterion::kGrad), groups);
      torch::optim::Adam optimizer(model.parameters(), torch::optim::AdamOptions(0.01));
      sparsifier.attach(optimizer);
      const SparsifierState first = sparsifier.state_dict();
      std::map<UnitKey, at::Tensor> weights;
      for (const SparseUnit& unit : units) weights[unit.key] = unit.weight().clone();
      for (int64_t step = 0; step < 5; ++step) {
        sparsifier.begin_step(step);
        optimizer.zero_grad();
        model.backward(step);
        sum_gradients(model, groups);
        for (const UnitUpdate& update : sparsifier.end_backward(step).units) {
          const bool is_idle = update.key.expert == 4;
          EXPECT_EQ(update.skipped, is_idle ? SkipReason::kFewRows : SkipReason::kNotSkipped)
              << to_string(update.key);
          EXPECT_EQ(update.num_grown > 0, !is_idle) << to_string(update.key);
        }
        optimizer.step();
        sparsifier.end_step(step);
      }
      const SparsifierState last = sparsifier.state_dict();
      ASSERT_EQ(last.units.size(), 15u);
      for (size_t u = 0; u < 15; ++u) {
        EXPECT_EQ(last.units[u].mask.count(), first.units[u].mask.count());
        const bool is_idle = last.units[u].key.expert == 4;
        EXPECT_EQ(last.units[u].mask == first.units[u].mask, is_idle);
        EXPECT_EQ(last.units[u].num_skipped, is_idle ? 2 : 0);
        EXPECT_EQ(last.units[u].num_updates, is_idle ? 0 : 2);
      }
      for (const SparseUnit& unit : units) {
        if (unit.key.expert != 4) continue;
        const auto& state = static_cast<const torch::optim::AdamParamState&>(
            *optimizer.state().at(unit.parameter.unsafeGetTensorImpl()));
        EXPECT_EQ(unit.part_of(state.exp_avg()).abs().max().item<double>(), 0);
        EXPECT_EQ(unit.part_of(state.exp_avg_sq()).abs().max().item<double>(), 0);
        const at::Tensor mask =
            position_mask(sparsifier.layout(unit.key), sparsifier.mask(unit.key));
        EXPECT_TRUE(same_bits(unit.weight(), weights[unit.key] * mask)) << unit.name;
      }
    });
  }
}

at::Tensor experts_tensor(const std::vector<int64_t>& ids, int64_t out, int64_t in) {
  std::vector<at::Tensor> parts;
  for (const int64_t id : ids) {
    parts.push_back(random_tensor({out, in}, static_cast<uint64_t>(id), -1, 1));
  }
  return parts.empty() ? at::zeros({0, out, in}, at::kDouble) : at::stack(parts);
}

/// w1 [8, 12] and w2 [6, 10] of kE experts, without a layer.
std::vector<SparseUnit> bare_units(const ParallelGroups& groups) {
  const auto ids = ExpertPlacement::contiguous(kE, groups.expert_parallel.size())
                       .experts_of(groups.expert_parallel.rank());
  std::vector<SparseUnit> units =
      expert_units("w1", experts_tensor(ids, 8, 12).requires_grad_(true), 0, Matrix::kW1, ids);
  for (const SparseUnit& unit :
       expert_units("w2", experts_tensor(ids, 6, 10).requires_grad_(true), 0, Matrix::kW2, ids)) {
    units.push_back(unit);
  }
  for (SparseUnit& unit : units) unit.counts_rows = true;
  return units;
}

void set_gradients(const std::vector<SparseUnit>& units, int64_t step) {
  for (const SparseUnit& unit : units) {
    at::Tensor parameter = unit.parameter;
    if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
    unit.part_of(parameter.grad())
        .copy_(random_tensor(unit.weight().sizes(),
                             static_cast<uint64_t>(1000 * step + 10 * unit.key.expert) +
                                 static_cast<uint64_t>(unit.key.matrix),
                             -1, 1));
  }
}

TEST(SparseRanks, ManyUpdates) {
  at::set_num_threads(1);
  for (const Structure& structure : {Structure::unstructured(), Structure::constant_fan_in()}) {
    for (const GrowCriterion grow : {GrowCriterion::kRandom, GrowCriterion::kGrad}) {
      comm::run_local(2, [&](const comm::Group& world) {
        const ParallelGroups groups = make_parallel_groups(world);
        const std::vector<SparseUnit> units = bare_units(groups);
        SparsifierConfig config = config_of(grow);
        config.structure = structure;
        config.budget.density = Density::ratio(1, 5);
        config.schedule.every = 1;
        config.schedule.end = 1000;
        config.schedule.alpha = 0.5;
        Sparsifier sparsifier(units, config, groups);
        std::vector<std::vector<int64_t>> first;
        int64_t num_grown = 0;
        for (int64_t step = 0; step <= 200; ++step) {
          sparsifier.begin_step(step);
          set_gradients(units, step);
          for (const SparseUnit& unit : units) sparsifier.count_rows(unit.key, 1);
          for (const UnitUpdate& u : sparsifier.end_backward(step).units) num_grown += u.num_grown;
          sparsifier.end_step(step);
          for (size_t u = 0; u < units.size(); ++u) {
            const AtomLayout& layout = sparsifier.layout(units[u].key);
            std::vector<int64_t> counts(static_cast<size_t>(layout.cells.num_cells));
            kernels::count_atoms(layout.cells, sparsifier.mask(units[u].key).data(), counts.data());
            if (step == 0) first.push_back(counts);
            EXPECT_EQ(counts, first[u]);
            EXPECT_GE(sparsifier.stats(units[u].key).nnz, layout.smallest_budget());
          }
        }
        EXPECT_GT(num_grown, 200 * static_cast<int64_t>(units.size()));
        const SparsityTotals totals = sparsifier.totals();
        EXPECT_EQ(totals.size, 5 * (96 + 60));
        EXPECT_EQ(totals.num_updates, 10 * 200);
        EXPECT_NEAR(static_cast<double>(totals.nnz), 156, 14);
        EXPECT_EQ(totals.nnz + sparsifier.budget_rest(), 156);
        EXPECT_GT(totals.itop_rate(), 0.7);  // a grown 0 is the first to go
      });
    }
  }
}

TEST(SparseRanks, Staggered) {
  at::set_num_threads(1);
  SparsifierConfig config = config_of(GrowCriterion::kRandom);
  config.schedule.every = 4;
  config.schedule.end = 30;
  config.schedule.stagger = true;
  std::map<UnitKey, std::vector<int64_t>> one, four;
  for (const int num_ranks : {1, 4}) {
    auto& steps = num_ranks == 1 ? one : four;
    std::mutex mutex;
    comm::run_local(num_ranks, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world);
      const Sparsifier sparsifier(bare_units(groups), config, groups);
      const std::lock_guard lock(mutex);
      for (int64_t step = 39; step >= 0; --step) {  // in any order
        const StepPlan plan = sparsifier.plan(step);
        for (size_t u = 0; u < plan.actions.size(); ++u) {
          if (plan.actions[u] != UnitAction::kUpdate) continue;
          auto& list = steps[sparsifier.units()[u].key];
          list.insert(list.begin(), step);
        }
      }
    });
  }
  EXPECT_EQ(one, four);
  ASSERT_EQ(one.size(), 10u);
  std::map<int64_t, int64_t> per_step;
  for (const auto& [key, steps] : one) {
    for (size_t i = 0; i < steps.size(); ++i) {
      EXPECT_EQ(steps[i] % 4, steps[0] % 4);
      EXPECT_EQ((steps[i] - 1) / 4, static_cast<int64_t>(i)) << to_string(key);
      EXPECT_LT(steps[i], 30);
      ++per_step[steps[i]];
    }
  }
  for (const auto& [step, count] : per_step) EXPECT_LE(count, 3);  // ceil(10 / 4)
}

/// Steps in which each expert's w1 updates; `rows` of each expert and step, which the ranks share.
std::map<int64_t, std::vector<int64_t>> token_updates(const SparsifierConfig& config, int num_ranks,
                                                      const std::vector<int64_t>& rows,
                                                      int64_t end_step, int64_t resume_at = -1) {
  std::map<int64_t, std::vector<int64_t>> updates;
  std::mutex mutex;
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    // Every rank holds every expert and sees its share of the rows.
    const ParallelGroups groups = make_parallel_groups(world, 1);
    const std::vector<SparseUnit> units = bare_units(groups);
    auto sparsifier = std::make_unique<Sparsifier>(units, config, groups);
    for (int64_t step = 0; step < end_step; ++step) {
      if (step == resume_at) {
        const SparsifierState state = sparsifier->state_dict();
        sparsifier = std::make_unique<Sparsifier>(units, config, groups);
        sparsifier->load(state);
      }
      sparsifier->begin_step(step);
      for (const SparseUnit& unit : units) {
        const int64_t all = rows[static_cast<size_t>(unit.key.expert)];
        const int64_t share = all / world.size();
        sparsifier->count_rows(unit.key,
                               world.rank() == 0 ? all - share * (world.size() - 1) : share);
      }
      const UpdateReport report = sparsifier->end_backward(step);
      sparsifier->end_step(step);
      const std::lock_guard lock(mutex);
      for (const UnitUpdate& update : report.units) {
        if (update.key.matrix != Matrix::kW1 || world.rank() != 0) continue;
        updates[update.key.expert].push_back(step);
      }
    }
  });
  return updates;
}

TEST(SparseRanks, TokenClock) {
  at::set_num_threads(1);
  SparsifierConfig config = config_of(GrowCriterion::kRandom);
  config.schedule.begin = 4;
  config.schedule.every = 6;
  config.schedule.end = 50;
  for (const bool stagger : {false, true}) {
    config.schedule.stagger = stagger;
    config.schedule.clock = Clock::kStep;
    const std::vector<int64_t> uniform(kE, 40);
    const auto by_step = token_updates(config, 1, uniform, 60);
    EXPECT_EQ(by_step.size(), static_cast<size_t>(kE));
    config.schedule.clock = Clock::kTokens;
    for (const double mean : {0.0, 40.0}) {
      config.schedule.mean_rows = mean;
      for (const int num_ranks : {1, 2, 4}) {
        EXPECT_EQ(token_updates(config, num_ranks, uniform, 60), by_step) << mean << num_ranks;
      }
      EXPECT_EQ(token_updates(config, 2, uniform, 60, 21), by_step);
    }
  }
  config.schedule.stagger = false;
  config.schedule.mean_rows = 40;
  const std::vector<int64_t> rows = {0, 40, 80, 1000, 13};
  const auto updates = token_updates(config, 2, rows, 60);
  EXPECT_EQ(updates.count(0), 0u);
  EXPECT_EQ(updates.at(1), (std::vector<int64_t>{4, 10, 16, 22, 28, 34, 40, 46}));
  // tau = 2 t: 4 + 6 j at t = 4 (not 2, as no update comes before `begin`), 5, 8, ...; until 50.
  EXPECT_EQ(updates.at(2), (std::vector<int64_t>{4, 5, 8, 11, 14, 17, 20, 23}));
  EXPECT_EQ(updates.count(3), 0u);  // beyond the end of its clock before the first step counts
  // tau = 13 t / 40 reaches 4, 10 and 16 at t = 13, 31, 50: the last is after the end.
  EXPECT_EQ(updates.at(4), (std::vector<int64_t>{13, 31}));
  for (int64_t stop = 1; stop < 50; stop += 7) {
    EXPECT_EQ(token_updates(config, 2, rows, 60, stop), updates) << stop;
  }
  // Measured: (0 + 40 + 80 + 1000 + 13) / 5 = 226.6 rows.
  config.schedule.mean_rows = 0;
  EXPECT_EQ(token_updates(config, 2, rows, 60).at(3), (std::vector<int64_t>{4, 5, 7, 8, 10, 11}));

  EXPECT_NE(config_error([&] {
              token_updates(config, 2, {0, 0, 0, 0, 0}, 6);
            }).find("mean_rows=0"),
            std::string::npos);
  config.grad_accum = 2;
  EXPECT_NE(config_error([&] { token_updates(config, 1, rows, 6); }).find("grad_accum=2"),
            std::string::npos);
  config.grad_accum = 1;
  config.schedule.begin = 0;
  EXPECT_NE(config_error([&] { token_updates(config, 1, rows, 6); }).find("before begin=0"),
            std::string::npos);
  config.schedule.begin = 4;
  EXPECT_NE(config_error([&] {
              Sparsifier({expert_units("w1", at::zeros({1, 4, 4}), 0, Matrix::kW1, {0})}, config);
            }).find("needs the rows of w1.0"),
            std::string::npos);
}

/// What each of 4 ranks (2 experts' groups) throws, and that nothing has changed.
template <typename E>
std::vector<std::string> texts_of_ranks(
    const std::function<void(int, Sparsifier&, const std::vector<SparseUnit>&)>& body) {
  std::vector<std::string> texts(4);
  comm::run_local(4, [&](const comm::Group& world) {
    const ParallelGroups groups = make_parallel_groups(world, 2);
    const std::vector<SparseUnit> units = bare_units(groups);
    Sparsifier sparsifier(units, config_of(GrowCriterion::kGrad), groups);
    sparsifier.begin_step(1);
    set_gradients(units, 1);
    for (const SparseUnit& unit : units) sparsifier.count_rows(unit.key, 5);
    Masks masks;
    Weights weights;
    try {
      body(world.rank(), sparsifier, units);
      for (const SparseUnit& unit : units) {
        masks.emplace(unit.key, sparsifier.mask(unit.key));
        weights[unit.key] = unit.weight().clone();
      }
      sparsifier.end_backward(1);
    } catch (const E& error) {
      texts[static_cast<size_t>(world.rank())] = error.what();
    }
    for (const SparseUnit& unit : units) {
      EXPECT_EQ(sparsifier.mask(unit.key), masks.at(unit.key)) << unit.name;
      EXPECT_TRUE(same_bits(unit.weight(), weights.at(unit.key))) << unit.name;
    }
  });
  return texts;
}

TEST(SparseRanks, FlippedBit) {
  at::set_num_threads(1);
  const UnitKey key{0, 4, Matrix::kW2};  // of ranks 1 and 3
  for (const bool is_on : {true, false}) {
    const auto texts = texts_of_ranks<RanksDisagree>(
        [&](int rank, Sparsifier& sparsifier, const std::vector<SparseUnit>&) {
          if (rank != 3) return;
          auto& mask = const_cast<PackedMask&>(sparsifier.mask(key));
          int64_t place = 0;
          while (mask.test(place) != is_on) ++place;
          mask.set(place, !is_on);
        });
    for (const std::string& text : texts) {
      EXPECT_NE(text.find("mask of w2.4="), std::string::npos) << text;
      EXPECT_NE(text.find("from rank 1 differs from "), std::string::npos) << text;
      EXPECT_NE(text.find(" from rank 3"), std::string::npos) << text;
    }
  }
}

TEST(SparseRanks, NonFinite) {
  at::set_num_threads(1);
  const auto texts = texts_of_ranks<Diverged>(
      [&](int rank, Sparsifier& sparsifier, const std::vector<SparseUnit>& units) {
        if (rank != 2) return;
        const SparseUnit& unit = units[1];  // w1.1, of ranks 0 and 2
        unit.part_of(unit.parameter.grad())
            .masked_fill_(
                position_mask(sparsifier.layout(unit.key), sparsifier.mask(unit.key)).logical_not(),
                std::nan(""));
      });
  for (const std::string& text : texts) {
    EXPECT_NE(text.find("scores of w1.1="), std::string::npos) << text;
    EXPECT_NE(text.find("step 1"), std::string::npos) << text;
  }
}

/// What each of 2 ranks that hold the same experts throws.
template <typename E>
std::vector<std::string> constructor_texts(
    const std::function<void(std::vector<SparseUnit>&, SparsifierConfig&)>& spoil) {
  std::vector<std::string> texts(2);
  comm::run_local(2, [&](const comm::Group& world) {
    const ParallelGroups groups = make_parallel_groups(world, 1);
    std::vector<SparseUnit> units = bare_units(groups);
    SparsifierConfig config = config_of(GrowCriterion::kGrad);
    if (world.rank() == 1) spoil(units, config);
    try {
      Sparsifier(units, config, groups);
    } catch (const E& error) {
      texts[static_cast<size_t>(world.rank())] = error.what();
    }
    // The group stays usable.
    EXPECT_GT(Sparsifier(bare_units(groups), config_of(GrowCriterion::kGrad), groups).nnz(), 0);
  });
  return texts;
}

TEST(SparseRanks, Disagree) {
  at::set_num_threads(1);
  const auto expect = [](const std::vector<std::string>& texts, const std::string& part) {
    for (const std::string& text : texts) EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  expect(constructor_texts<RanksDisagree>([](auto&, auto& config) { config.schedule.every = 7; }),
         "config=every=3 from rank 0 differs from every=7 from rank 1");
  expect(constructor_texts<RanksDisagree>([](auto& units, auto&) { units.pop_back(); }),
         "unit w2.4=on ranks 0 must be on ranks 0, 1");
  expect(constructor_texts<RanksDisagree>([](auto& units, auto&) {
           units[2].parameter = at::zeros({kE, 8, 13}, at::kDouble);
         }),
         "unit layer 0, expert 2, w1=w1.2 [8, 12] float64 with rows of an expert from rank 0 "
         "differs from w1.2 [8, 13]");
  expect(constructor_texts<ConfigError>([](auto&, auto& config) { config.grad_accum = 9; }),
         "grad_accum=9 is outside [1, every=3]");
  expect(constructor_texts<ConfigError>(
             [](auto& units, auto& config) { config.all_units = {units[0].key}; }),
         "all_units=1 are listed");
}

TEST(SparseRanks, Checkpoint) {
  at::set_num_threads(1);
  for (const GrowCriterion grow : {GrowCriterion::kGrad, GrowCriterion::kUnfired}) {
    SparsifierConfig config = config_of(grow);
    config.schedule.every = 4;
    config.schedule.stagger = true;
    config.grad_accum = 3;
    const Trained one = train(1, 1, config);
    const auto piece = [&](int num_ranks, int64_t ep_size, int64_t first, int64_t end,
                           const Trained* from) {
      RunOptions options;
      options.first_step = first;
      options.end_step = end;
      options.from = from;
      return train(num_ranks, ep_size, config, options);
    };
    const Trained a = piece(4, 2, 0, 4, nullptr);
    if (grow == GrowCriterion::kGrad) {
      int64_t num_sums = 0;
      for (const UnitState& unit : a.state.units) num_sums += unit.grad_sum.defined() ? 1 : 0;
      EXPECT_GT(num_sums, 3);
    }
    const Trained b = piece(2, 1, 4, 9, &a);
    const Trained c = piece(8, 4, 9, 13, &b);
    expect_close(c, one, 1e-11);
    EXPECT_EQ(c.totals.num_updates, one.totals.num_updates);
    EXPECT_EQ(c.totals.ever_active, one.totals.ever_active);
    // The same ranks: bit for bit.
    const Trained whole = piece(4, 2, 0, 13, nullptr);
    const Trained half = piece(4, 2, 0, 6, nullptr);
    const Trained rest = piece(4, 2, 6, 13, &half);
    EXPECT_EQ(whole.masks, rest.masks);
    for (const auto& [key, weight] : whole.weights) {
      EXPECT_TRUE(same_bits(weight, rest.weights.at(key))) << to_string(key);
    }
  }
}

TEST(SparseRanks, LoadRefused) {
  at::set_num_threads(1);
  const auto texts = [](const std::function<void(SparsifierState&, int)>& spoil) {
    std::string text;
    std::mutex mutex;
    comm::run_local(4, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world, 2);
      const std::vector<SparseUnit> units = bare_units(groups);
      Sparsifier sparsifier(units, config_of(GrowCriterion::kGrad), groups);
      SparsifierState state = sparsifier.state_dict();
      Masks masks;
      for (const SparseUnit& unit : units) masks.emplace(unit.key, sparsifier.mask(unit.key));
      spoil(state, world.rank());
      std::string mine = "nothing";
      try {
        sparsifier.load(state);
      } catch (const Error& error) {
        mine = error.what();
      }
      for (const auto& [key, mask] : masks) EXPECT_EQ(sparsifier.mask(key), mask);
      const std::lock_guard lock(mutex);
      text += mine + "\n";
    });
    return text;
  };
  const auto count = [](const std::string& text, const std::string& part) {
    int64_t found = 0;
    for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1))
      ++found;
    return found;
  };
  std::string text = texts([](SparsifierState& s, int) { s.version = 1; });
  EXPECT_EQ(count(text, "version=1 is not 2"), 4) << text;
  // A mask that one rank alone lacks, of an expert that it does not even hold.
  text = texts([](SparsifierState& s, int rank) {
    if (rank == 0) s.units.erase(s.units.end() - 2);
  });
  EXPECT_EQ(count(text, "has no mask in it (layer 0, expert 4, w1)"), 4) << text;
  // Two bits moved: the budget holds.
  text = texts([](SparsifierState& s, int rank) {
    if (rank != 2) return;
    PackedMask& mask = s.units[0].mask;
    int64_t on = 0, off = 0;
    while (!mask.test(on)) ++on;
    while (mask.test(off)) ++off;
    mask.set(on, false);
    mask.set(off, true);
  });
  EXPECT_EQ(count(text, "saved mask of w1.0="), 4) << text;
  EXPECT_EQ(count(text, "from rank 2"), 4) << text;
  text = texts([](SparsifierState& s, int rank) { s.units[0].num_rows += rank == 3 ? 1 : 0; });
  EXPECT_EQ(count(text, "counts of rows"), 8) << text;
}

std::vector<std::string> names_of(const std::vector<SparseUnit>& units) {
  std::vector<std::string> names;
  for (const SparseUnit& unit : units) names.push_back(unit.name);
  return names;
}

struct Mixed : torch::nn::Module {
  Mixed() {
    layer = register_module("layer", make_layer(LayerCase(), ParallelGroups()));
    words = register_module("words", torch::nn::Embedding(4, 6));
    tail = register_module("tail", torch::nn::Linear(4, 3));
    head = register_module("head", torch::nn::Linear(4, 3));
  }
  std::shared_ptr<MoELayer> layer;
  torch::nn::Embedding words{nullptr};
  torch::nn::Linear tail{nullptr}, head{nullptr};
};

TEST(SparseRanks, Units) {
  const auto placement = ExpertPlacement::contiguous(4, 2);
  const auto gated = make_experts(ExpertKind::kGatedBias, placement, 1, at::kDouble);
  const auto units = gated->sparse_units(7);
  EXPECT_EQ(names_of(units), (std::vector<std::string>{"layer7.expert2.w1", "layer7.expert2.w3",
                                                       "layer7.expert2.w2", "layer7.expert3.w1",
                                                       "layer7.expert3.w3", "layer7.expert3.w2"}));
  EXPECT_EQ(units[1].key, (UnitKey{7, 2, Matrix::kW3}));
  auto& mlp = dynamic_cast<GroupedMLP&>(*gated);
  EXPECT_TRUE(units[4].weight().equal(mlp.up_proj[1].narrow(0, kDFf, kDFf)));
  EXPECT_TRUE(units[5].weight().equal(mlp.down_proj[1]));
  EXPECT_EQ(names_of(gated->sparse_units(0, "w2")).size(), 2u);
  EXPECT_EQ(config_error([&] { gated->sparse_units(0, "w4"); }),
            "[grouped_mlp] pattern=w4 fits none of w1, w3, w2; correct it");
  EXPECT_EQ(names_of(make_experts(ExpertKind::kPlain, placement, 0, at::kDouble)->sparse_units(0)),
            (std::vector<std::string>{"layer0.expert0.w1", "layer0.expert0.w2", "layer0.expert1.w1",
                                      "layer0.expert1.w2"}));
  EXPECT_EQ(names_of(make_experts(ExpertKind::kLinear, placement, 1, at::kDouble)->sparse_units(0)),
            (std::vector<std::string>{"layer0.expert2.w1", "layer0.expert3.w1"}));

  const auto modules = make_experts(ExpertKind::kModule, placement, 1, at::kDouble);
  const auto firsts = modules->sparse_units(1, "first.*");
  EXPECT_EQ(names_of(firsts), (std::vector<std::string>{"layer1.expert2.first.weight",
                                                        "layer1.expert3.first.weight"}));
  EXPECT_EQ(firsts[1].key, (UnitKey{1, 3, numbered_matrix(0)}));
  EXPECT_EQ(modules->sparse_units(1, "second.*")[0].key, (UnitKey{1, 2, numbered_matrix(1)}));
  EXPECT_EQ(config_error([&] { modules->sparse_units(1, "third*"); }),
            "[module_experts] pattern=third* fits none of first.weight, second.weight; correct it");

  const auto shared =
      make_experts(ExpertKind::kGated, ExpertPlacement::contiguous(1, 1), 0, at::kDouble);
  shared->set_replicated(true);
  const auto of_shared = shared->sparse_units(7, "w1");
  EXPECT_EQ(of_shared[0].name, "layer7.shared0.w1");
  EXPECT_EQ(to_string(of_shared[0].key), "layer 7, shared expert 0, w1");
  EXPECT_EQ(of_shared[0].holders, Holders::kAllRanks);

  // Gates, experts, embeddings and biases are left out.
  const Mixed mixed;
  EXPECT_EQ(names_of(sparse_units(mixed, "*", 3)),
            (std::vector<std::string>{"layer3.head.weight", "layer3.tail.weight"}));
  EXPECT_EQ(sparse_units(mixed, "tail*", 3)[0].key, (UnitKey{3, 0, numbered_matrix(1)}));
  EXPECT_NE(config_error([&] {
              sparse_units(mixed, "*bias", 3);
            }).find("pattern=*bias fits none of head.weight, tail.weight; correct it"),
            std::string::npos);
  EXPECT_NE(config_error([&] {
              sparse_units(torch::nn::EmbeddingImpl(2, 3), "*", 0);
            }).find("fits no matrix"),
            std::string::npos);
}

}  // namespace
}  // namespace perseid::testing
