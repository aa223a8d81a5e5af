// Criteria with gradients over ranks (threads), float64: experts whose gradients lie in their
// parameters, and a head of all ranks that hands over rows.
//   SameMasks      P = 1, 2, 4, any ep_size: the masks of one process for sampled gradients (units,
//                  rows), momentum, and drops by gradients; weights within 1e-11
//   LinkSums       what links are given is summed over ranks with its sign, energies too
//   NothingToGrow  a fraction of 0 has no candidates, and an update that changes nothing
//   Checkpoint     P 4 -> 2 -> 8 inside windows and averages: the run of one process; the same P:
//                  bit for bit
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "moe/sparse_criteria.h"
#include "moe/sparse_presets.h"
#include "tests/moe/sparse_fixture.h"
#include "tests/moe/sparse_ranks_fixture.h"

namespace perseid::testing {
namespace {

SparsifierConfig criteria(DropCriterion drop, GrowCriterion grow, int64_t grad_accum = 1) {
  SparsifierConfig config = config_of(grow);
  config.rule.drop = drop;
  config.grad_accum = grad_accum;
  return config;
}

TEST(SparseCriteriaRanks, SameMasks) {
  at::set_num_threads(1);
  SparsifierConfig rows = criteria(DropCriterion::kMagnitude, GrowCriterion::kSampledGrad, 2);
  rows.structure = Structure::constant_fan_in();
  rows.rule.candidates_per_grown = 1.5;
  SparsifierConfig sampled = criteria(DropCriterion::kMagnitude, GrowCriterion::kSampledGrad, 3);
  sampled.rule.candidates_per_grown = 1.5;
  sampled.schedule.stagger = true;
  SparsifierConfig after = criteria(DropCriterion::kMest, GrowCriterion::kSampledGrad, 2);
  after.rule.candidates_per_grown = 2;
  after.order = UpdateOrder::kAfterStep;
  for (const SparsifierConfig& config :
       {rows, sampled, after, criteria(DropCriterion::kMagnitude, GrowCriterion::kMomentum),
        criteria(DropCriterion::kTaylor, GrowCriterion::kRandom, 2),
        criteria(DropCriterion::kMest, GrowCriterion::kMomentum)}) {
    const Trained one = train(1, 1, config);
    EXPECT_GT(one.num_grown, 20);
    for (const auto& [num_ranks, ep_size] :
         std::vector<std::pair<int, int64_t>>{{2, 1}, {2, 2}, {4, 1}, {4, 2}, {4, 4}}) {
      std::ostringstream name;
      name << config << " P=" << num_ranks << " ep=" << ep_size;
      SCOPED_TRACE(name.str());
      const Trained many = train(num_ranks, ep_size, config);
      expect_close(many, one, 1e-11);
      EXPECT_EQ(many.totals.nnz, one.totals.nnz);
      EXPECT_EQ(many.totals.num_updates, one.totals.num_updates);
      EXPECT_EQ(many.totals.num_skipped, one.totals.num_skipped);
    }
  }
}

struct Head : torch::nn::Module {
  Head() {
    linear = register_module(
        "linear", SparseLinear(SparseLinearOptions(12, 9).bias(false).key({1}).dtype(at::kDouble)));
  }
  SparseLinear linear{nullptr};
};

TEST(SparseCriteriaRanks, LinkSums) {
  at::set_num_threads(1);
  const at::Tensor x = normal({kTokens, 12}, 1), delta = normal({kTokens, 9}, 2);
  for (const GrowCriterion grow :
       {GrowCriterion::kSampledGrad, GrowCriterion::kGreedyProgress, GrowCriterion::kMomentum}) {
    std::mutex mutex;
    std::vector<PackedMask> masks;
    for (const int num_ranks : {1, 2, 4}) {
      comm::run_local(num_ranks, [&](const comm::Group& world) {
        const ParallelGroups groups = make_parallel_groups(world);
        Head head;
        SparsifierConfig config = config_of(grow);
        config.schedule.begin = 2;
        config.grad_accum = grow == GrowCriterion::kMomentum ? 1 : 3;
        Sparsifier sparsifier({head.linear->unit()}, config, groups);
        const auto [first, count] = shard(world.rank(), num_ranks);
        for (int64_t step = 0; step < 3; ++step) {
          sparsifier.begin_step(step);
          const double scale = step == 1 ? -0.5 : 1;
          (head.linear->forward(x.narrow(0, first, count)) * delta.narrow(0, first, count) * scale)
              .sum()
              .backward();
          sum_gradients(head, groups);
          const UpdateReport report = sparsifier.end_backward(step);
          const UnitState state = sparsifier.state_dict().units[0];
          if (step == 1) {
            const at::Tensor gradient = delta.t().mm(x);
            if (grow == GrowCriterion::kMomentum) {
              EXPECT_TRUE(close_to(state.grad_sum, gradient * (0.09 - 0.05), 1e-12));
            } else if (grow == GrowCriterion::kGreedyProgress) {
              EXPECT_TRUE(close_to(state.grad_sum, gradient * 0.5, 1e-12));
              EXPECT_TRUE(close_to(state.energy_sum, 2 * x.square().sum(0, true), 1e-12));
            } else {
              const PackedMask drawn =
                  draw_candidates(sparsifier.layout({1}), config.rule, state.mask,
                                  drop_fraction(config.schedule, 2),
                                  draw_key(config.seed, 2, {1}, UnitDraw::kCandidates));
              EXPECT_TRUE(close_to(state.grad_sum, listed_values(drawn, gradient * 0.5), 1e-12));
            }
          }
          if (step == 2) {
            EXPECT_GT(report.units.at(0).num_grown, 10);
          }
          sparsifier.end_step(step);
        }
        const std::lock_guard lock(mutex);
        masks.push_back(sparsifier.mask({1}));
      });
    }
    for (const PackedMask& mask : masks) EXPECT_EQ(mask, masks[0]);
  }
}

TEST(SparseCriteriaRanks, NothingToGrow) {
  at::set_num_threads(1);
  for (const int num_ranks : {1, 2}) {
    comm::run_local(num_ranks, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world);
      Head head;
      SparsifierConfig config = config_of(GrowCriterion::kSampledGrad);
      config.schedule.alpha = 0;
      Sparsifier sparsifier({head.linear->unit()}, config, groups);
      const PackedMask before = sparsifier.mask({1});
      for (int64_t step = 0; step < 3; ++step) {
        sparsifier.begin_step(step);
        head.linear->forward(normal({5, 12}, 1)).sum().backward();
        sum_gradients(head, groups);
        sparsifier.end_backward(step);
        sparsifier.end_step(step);
      }
      EXPECT_EQ(sparsifier.mask({1}), before);
      EXPECT_EQ(sparsifier.stats({1}).num_updates, 1);
    });
  }
}

TEST(SparseCriteriaRanks, Checkpoint) {
  at::set_num_threads(1);
  SparsifierConfig sampled = criteria(DropCriterion::kMest, GrowCriterion::kSampledGrad, 3);
  sampled.schedule.every = 4;
  sampled.schedule.stagger = true;
  sampled.rule.candidates_per_grown = 1.5;
  for (const SparsifierConfig& config :
       {sampled, criteria(DropCriterion::kMagnitude, GrowCriterion::kMomentum)}) {
    const Trained one = train(1, 1, config);
    const auto piece = [&](auto... arguments) { return train_piece(config, arguments...); };
    const Trained a = piece(4, 2, 0, 4, nullptr);
    int64_t num_sums = 0, num_active_sums = 0;
    for (const UnitState& unit : a.state.units) {
      num_sums += unit.grad_sum.defined() ? 1 : 0;
      num_active_sums += unit.active_sum.defined() ? 1 : 0;
    }
    EXPECT_GT(num_sums, 3);
    EXPECT_EQ(num_active_sums > 3, drops_by_gradient(config.rule.drop));
    const Trained b = piece(2, 1, 4, 9, &a);
    const Trained c = piece(8, 4, 9, 13, &b);
    expect_close(c, one, 1e-11);
    EXPECT_EQ(c.totals.num_updates, one.totals.num_updates);
    // The same ranks: bit for bit.
    const Trained whole = piece(4, 2, 0, 13, nullptr);
    const Trained half = piece(4, 2, 0, 6, nullptr);
    const Trained rest = piece(4, 2, 6, 13, &half);
    expect_same_bits(whole, rest);
  }
}

}  // namespace
}  // namespace perseid::testing
