// Budgets that fall while the weights train. What they are at each step is in
// sparse_targets_test.cpp.
//   Prunes         update_mask without growth, with a number to grow, by sign under a target
//   Training       masks have their targets after each update, all structures, criteria, orders;
//                  staggered units at the end of each window; what is dropped and grown adds up
//   Criteria       ramps with drop and grow criteria of gradients: the smallest |w| + |g| or |w g|
//                  go, numbers are exact, and resume
//   Skipped        a unit without rows or gradients loses what the ramp takes, and grows nothing
//   Resume         inside a ramp, at each step, bit for bit; saved budgets that cannot be
//   NmRamp         every group has the N of its frame, also where M changes; resume
//   GrowFirst      exact numbers beyond the budget, back to it with the last update
//   Ranks          P = 1, 2, 4 and a change of P: the same masks
//   Presets        mest, nm_ramp: three updates keep the budget; mest drops by its own criterion
//   Refused        ramps that cannot end, or that other choices forbid
//   Pattern        a wrong one is refused on all ranks, also where no expert is
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>

#include <cmath>
#include <numeric>
#include <sstream>

#include "moe/sparse_optimizer.h"
#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"
#include "tests/moe/sparse_ramp_fixture.h"
#include "tests/moe/sparse_ranks_fixture.h"

namespace perseid::testing {
namespace {

std::vector<float> normal_floats(int64_t count, uint64_t seed) {
  const at::Tensor values = normal({count}, seed, at::kFloat);
  return {values.const_data_ptr<float>(), values.const_data_ptr<float>() + count};
}
TEST(SparseRamp, Prunes) {
  const auto weights = normal_floats(200, 6), grow = normal_floats(200, 7);
  std::vector<float> scores = weights;
  for (float& score : scores) score = std::abs(score);
  UpdateInput input;
  input.drop_scores = scores.data();
  input.grow_scores = grow.data();
  input.fraction = 0.4;
  for (const Structure& structure : {Structure::unstructured(), Structure::constant_fan_in()}) {
    const AtomLayout layout = make_layout(structure, 10, 20, "w");
    const PackedMask mask = random_mask(layout, 80, kernels::random_key(5));
    input.active = &mask;
    // Without growth each cell loses its own smallest, and the fraction does not count.
    input.target = 50;
    UpdateRule rule;
    rule.grow = GrowCriterion::kNone;
    const MaskUpdate pruned = update_mask(layout, rule, input);
    EXPECT_EQ(pruned.num_dropped, 30);
    EXPECT_EQ(pruned.num_grown, 0);
    const int64_t size = layout.cells.atoms_per_cell;
    for (int64_t cell = 0; cell < layout.cells.num_cells; ++cell) {
      float largest_dropped = 0, smallest_kept = 1e9f;
      for (int64_t a = cell * size; a < (cell + 1) * size; ++a) {
        const float score = scores[static_cast<size_t>(a)];
        if (pruned.dropped.test(a)) largest_dropped = std::max(largest_dropped, score);
        if (pruned.mask.test(a)) smallest_kept = std::min(smallest_kept, score);
      }
      EXPECT_LT(largest_dropped, smallest_kept);
    }
    // A number to grow on top of what the target takes.
    rule.grow = GrowCriterion::kRandom;
    input.num_grow = 7;
    const MaskUpdate moved = update_mask(layout, rule, input);
    EXPECT_EQ(moved.mask.count(), 50);
    if (layout.cells.num_cells == 1) {
      EXPECT_EQ(moved.num_dropped, 37);
      EXPECT_EQ(moved.num_grown, 7);
    }
    input.target = 100;  // grow first: nothing needs to go
    input.num_grow = 20;
    const MaskUpdate risen = update_mask(layout, rule, input);
    EXPECT_EQ(risen.num_dropped, 0);
    EXPECT_EQ(risen.num_grown, 20);
    input.num_grow = -1;
    // Cells of another size: each comes to its target, those with too few by growth.
    const AtomLayout groups = make_layout(Structure::n_of_m(2, 5), 10, 20, "w");
    for (const GrowCriterion criterion : {GrowCriterion::kNone, GrowCriterion::kGrad}) {
      rule.grow = criterion;
      input.target = 80;
      const MaskUpdate change = update_mask(groups, rule, input);
      EXPECT_EQ(cell_counts(groups, change.mask), std::vector<int64_t>(40, 2));
      EXPECT_GT(change.num_grown, 3);
    }
  }
  // By sign: a fraction of each, then the smallest of both.
  const AtomLayout layout = make_layout(Structure::unstructured(), 10, 20, "w");
  const PackedMask mask = random_mask(layout, 80, kernels::random_key(5));
  input.active = &mask;
  input.drop_scores = weights.data();
  input.fraction = 0.25;
  input.target = 60;
  UpdateRule rule;
  rule.drop = DropCriterion::kSetSigned;
  int64_t num_negative = 0;
  for (int64_t a = 0; a < 200; ++a) {
    num_negative += mask.test(a) && weights[static_cast<size_t>(a)] < 0 ? 1 : 0;
  }
  const MaskUpdate by_sign = update_mask(layout, rule, input);
  EXPECT_EQ(by_sign.num_grown, num_negative / 4 + (80 - num_negative) / 4);
  EXPECT_EQ(by_sign.num_dropped, by_sign.num_grown + 20);
  input.num_grow = 3;
  EXPECT_NE(config_error([&] { update_mask(layout, rule, input); }).find("set_signed goes by"),
            std::string::npos);
}

SparsifierConfig ramp_config(GrowCriterion grow, UpdateOrder order = UpdateOrder::kBeforeStep) {
  SparsifierConfig config;
  config.budget.density = 0.3;
  config.rule.grow = grow;
  config.schedule.begin = 3;
  config.schedule.every = 4;
  config.schedule.end = 44;  // 3, 7, ..., 43
  config.schedule.density_ramp.emplace();
  config.order = order;
  return config;
}

/// Of 12x8 and 4x12.
struct Wider {
  at::Tensor w0 = normal({12, 8}, 1).requires_grad_(true);
  at::Tensor w1 = normal({4, 12}, 2).requires_grad_(true);
  std::vector<SparseUnit> units() const { return {unit_of(w0, 0), unit_of(w1, 1)}; }
  std::vector<at::Tensor> parameters() const { return {w0, w1}; }
  void backward(int64_t step) const {
    const at::Tensor x = normal({6, 8}, 100 + static_cast<uint64_t>(step));
    (x.mm(w0.t()).tanh().mm(w1.t()) - normal({6, 4}, 999)).square().sum().backward();
  }
};

std::vector<int64_t> numbers_of(const Sparsifier& sparsifier) {
  std::vector<int64_t> numbers;
  for (const SparseUnit& unit : sparsifier.units()) {
    numbers.push_back(sparsifier.stats(unit.key).nnz);
  }
  return numbers;
}
void expect_equal_cells(const Sparsifier& sparsifier) {
  for (const SparseUnit& unit : sparsifier.units()) {
    const std::vector<int64_t> counts =
        cell_counts(sparsifier.layout(unit.key), sparsifier.mask(unit.key));
    for (const int64_t count : counts) ASSERT_EQ(count, counts.front()) << unit.name;
    const at::Tensor outside = unit.weight().masked_select(
        position_mask(sparsifier.layout(unit.key), sparsifier.mask(unit.key)).logical_not());
    ASSERT_EQ(outside.abs().sum().item<double>(), 0) << unit.name;
  }
}

TEST(SparseRamp, Training) {
  at::set_num_threads(1);
  for (const Structure& structure : {Structure::unstructured(), Structure::constant_fan_in(),
                                     Structure::blocks(2, 2), Structure::block_ell(2, 2)}) {
    for (const GrowCriterion grow : {GrowCriterion::kRandom, GrowCriterion::kGrad,
                                     GrowCriterion::kUnfired, GrowCriterion::kNone}) {
      for (const UpdateOrder order :
           {UpdateOrder::kBeforeStep, UpdateOrder::kInsteadOfStep, UpdateOrder::kAfterStep}) {
        Wider model;
        SparsifierConfig config = ramp_config(grow, order);
        config.structure = structure;
        std::vector<BudgetUnit> units;
        for (const SparseUnit& unit : model.units()) {
          const AtomLayout layout =
              make_layout(structure, unit.weight().size(0), unit.weight().size(1), "w");
          units.push_back(budget_unit(layout.out, layout.in, layout.granule(), 0));
          units.back().floor = layout.smallest_budget();
        }
        BudgetTargets targets(config.budget, config.schedule, units);
        Sparsifier sparsifier(model.units(), config);
        SparseAdam optimizer(model.parameters(), torch::optim::AdamOptions(0.01));
        sparsifier.attach(optimizer);
        EXPECT_EQ(numbers_of(sparsifier), (std::vector<int64_t>{96, 48}));
        int64_t num_grown = 0;
        for (int64_t step = 0; step < 50; ++step) {
          const std::vector<int64_t> before = numbers_of(sparsifier);
          const std::vector<UnitUpdate> updates = train_step(model, sparsifier, optimizer, step);
          const std::vector<int64_t> now = numbers_of(sparsifier);
          ASSERT_EQ(now, targets.at(window_of(config.schedule, step))) << step;
          ASSERT_EQ(updates.size(), step % 4 == 3 && step < 44 ? 2u : 0u);
          const int64_t atom_size = structure.atom_rows * structure.atom_cols;
          for (size_t u = 0; u < updates.size(); ++u) {
            EXPECT_EQ((updates[u].num_dropped - updates[u].num_grown) * atom_size,
                      before[u] - now[u]);
            num_grown += updates[u].num_grown;
          }
          expect_equal_cells(sparsifier);
        }
        EXPECT_EQ(numbers_of(sparsifier), targets.last().nnz);
        EXPECT_EQ(num_grown > 0, grow != GrowCriterion::kNone);
      }
    }
  }
}

TEST(SparseRamp, Staggered) {
  Wider model;
  SparsifierConfig config = ramp_config(GrowCriterion::kRandom);
  config.schedule.stagger = true;
  config.schedule.end = 47;
  Sparsifier sparsifier(model.units(), config);
  std::vector<BudgetUnit> units = {budget_unit(12, 8, 1, 0), budget_unit(4, 12, 1, 1)};
  BudgetTargets targets(config.budget, config.schedule, units);
  for (int64_t step = 0; step < 60; ++step) {
    const std::vector<int64_t> before = numbers_of(sparsifier);
    sparsifier.begin_step(step);
    sparsifier.end_backward(step);
    sparsifier.end_step(step);
    const std::vector<int64_t> now = numbers_of(sparsifier);
    const int64_t window = window_of(config.schedule, step);
    // One at the window's begin, the other in its middle.
    if (step < 3) {
      EXPECT_EQ(now, targets.first());
    } else if ((step - 3) % 4 >= 2 || step >= 47) {
      EXPECT_EQ(now, targets.at(window)) << step;
    } else {
      EXPECT_EQ(now[0], targets.at(window)[0]) << step;
      EXPECT_EQ(now[1], before[1]);
    }
  }
  EXPECT_EQ(numbers_of(sparsifier), targets.last().nnz);
}

TEST(SparseRamp, Skipped) {
  for (const GrowCriterion grow : {GrowCriterion::kGrad, GrowCriterion::kRandom}) {
    for (const Distribution distribution : {Distribution::kUniform, Distribution::kGlobal}) {
      const at::Tensor experts = normal({3, 6, 8}, 5).requires_grad_(true);
      std::vector<SparseUnit> units = expert_units("w1", experts, 0, Matrix::kW1, {0, 1, 2});
      for (SparseUnit& unit : units) unit.counts_rows = true;
      SparsifierConfig config = ramp_config(grow);
      config.budget.distribution = distribution;
      config.min_rows = 4;
      config.state.second_moment =
          grow == GrowCriterion::kGrad ? GrownSecondMoment::kGradient : GrownSecondMoment::kMean;
      Sparsifier sparsifier(units, config);
      torch::optim::Adam optimizer({experts}, torch::optim::AdamOptions(0.01));
      sparsifier.attach(optimizer);
      int64_t num_grown = 0;
      for (int64_t step = 0; step < 44; ++step) {
        sparsifier.begin_step(step);
        optimizer.zero_grad();
        at::Tensor loss = experts.sum() * 0;
        for (int64_t e = 0; e < 2; ++e) {  // expert 2 has no rows
          const at::Tensor x = normal({3, 8}, static_cast<uint64_t>(10 * step + e));
          loss = loss + x.mm(experts.select(0, e).t()).square().sum();
          sparsifier.count_rows(units[static_cast<size_t>(e)].key, 3);
        }
        loss.backward();
        const int64_t before = sparsifier.stats(units[2].key).nnz;
        for (const UnitUpdate& update : sparsifier.end_backward(step).units) {
          const bool is_idle = update.key.expert == 2;
          // The first update comes after 12 rows: 4 steps of 3.
          EXPECT_EQ(update.skipped != SkipReason::kNotSkipped, is_idle);
          if (!is_idle) {
            num_grown += update.num_grown;
            continue;
          }
          EXPECT_EQ(update.num_grown, 0);
          EXPECT_EQ(update.num_dropped, before - sparsifier.stats(units[2].key).nnz);
        }
        optimizer.step();
        sparsifier.end_step(step);
        if (step < 3) continue;
        const int64_t window = window_of(config.schedule, step);
        EXPECT_EQ(sparsifier.nnz(),
                  ramp_density(config.schedule, config.budget.density, window).of(144))
            << step;
      }
      EXPECT_GT(num_grown, 10);
      EXPECT_EQ(sparsifier.stats(units[2].key).num_updates, 0);
      EXPECT_EQ(sparsifier.stats(units[2].key).num_skipped, 11);
      EXPECT_LT(sparsifier.stats(units[2].key).nnz, 40);
    }
  }
}

/// Runs to the end, and from `stop` in another model: the same bits.
template <typename Optimizer, typename Options>
void expect_resumes(const SparsifierConfig& config, const Options& options, int64_t stop,
                    int64_t end) {
  Wider model, other;
  Sparsifier sparsifier(model.units(), config), resumed(other.units(), config);
  Optimizer optimizer(model.parameters(), options), other_optimizer(other.parameters(), options);
  sparsifier.attach(optimizer);
  resumed.attach(other_optimizer);
  for (int64_t step = 0; step < end; ++step) {
    if (step == stop) {
      for (size_t u = 0; u < 2; ++u) {
        other.parameters()[u].detach().copy_(model.parameters()[u].detach());
      }
      resumed.load(sparsifier.state_dict());
      std::stringstream saved;
      torch::save(optimizer, saved);
      torch::load(other_optimizer, saved);
    }
    train_step(model, sparsifier, optimizer, step);
    if (step >= stop) train_step(other, resumed, other_optimizer, step);
  }
  for (size_t u = 0; u < 2; ++u) {
    EXPECT_TRUE(at::equal(model.parameters()[u], other.parameters()[u])) << stop;
    const UnitKey& key = sparsifier.units()[u].key;
    EXPECT_EQ(sparsifier.mask(key), resumed.mask(key)) << stop;
    EXPECT_EQ(sparsifier.stats(key).num_updates, resumed.stats(key).num_updates);
  }
}

TEST(SparseRamp, Resume) {
  at::set_num_threads(1);
  for (const Distribution distribution : {Distribution::kErk, Distribution::kGlobal}) {
    for (int64_t stop = 0; stop < 46; stop += 3) {
      SparsifierConfig config = ramp_config(GrowCriterion::kGrad);
      config.budget.distribution = distribution;
      config.grad_accum = 2;
      config.rule.random_share = 0.3;
      expect_resumes<torch::optim::AdamW>(config, torch::optim::AdamWOptions(0.01), stop, 50);
      config.order = UpdateOrder::kAfterStep;
      expect_resumes<torch::optim::AdamW>(config, torch::optim::AdamWOptions(0.01), stop, 50);
    }
  }
  // Budgets that the step does not have.
  Wider model;
  SparsifierConfig config = ramp_config(GrowCriterion::kRandom);
  Sparsifier sparsifier(model.units(), config);
  torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.1));
  sparsifier.attach(optimizer);
  for (int64_t step = 0; step < 20; ++step) train_step(model, sparsifier, optimizer, step);
  const SparsifierState good = sparsifier.state_dict();
  sparsifier.load(good);
  const auto text = [&](const auto& spoil) {
    SparsifierState bad = good;
    spoil(bad);
    return config_error([&] { sparsifier.load(bad); });
  };
  const auto clear_one = [](PackedMask& mask) {
    int64_t place = 0;
    while (!mask.test(place)) ++place;
    mask.set(place, false);
  };
  EXPECT_NE(text([&](SparsifierState& s) {
              clear_one(s.units[0].mask);
            }).find("active atoms do not keep its budget of"),
            std::string::npos);
  EXPECT_NE(text([&](SparsifierState& s) {
              clear_one(s.units[0].mask);
              --s.units[0].nnz;
            }).find("what it may be after step 19"),
            std::string::npos);
  EXPECT_NE(text([](SparsifierState& s) { s.units[0].frame = 1; }).find("is outside [0, 0]"),
            std::string::npos);
  config.budget.distribution = Distribution::kGlobal;
  Sparsifier global(model.units(), config);
  SparsifierState state = global.state_dict();
  clear_one(state.units[0].mask);
  --state.units[0].nnz;
  EXPECT_NE(config_error([&] { global.load(state); }).find("[sparsifier] budgets=143 in all"),
            std::string::npos);
}

TEST(SparseRamp, Criteria) {
  at::set_num_threads(1);
  for (const DropCriterion drop : {DropCriterion::kMest, DropCriterion::kTaylor}) {
    SparsifierConfig config = ramp_config(GrowCriterion::kNone);
    config.rule.drop = drop;
    at::Tensor weight = normal({9, 14}, 3);
    Sparsifier sparsifier({unit_of(weight, 0)}, config);
    const UnitKey key = sparsifier.units()[0].key;
    int64_t num_dropped = 0;
    for (int64_t step = 0; step < 50; ++step) {
      sparsifier.begin_step(step);
      const PackedMask before = sparsifier.mask(key);
      const at::Tensor slope = normal({9, 14}, 100 + static_cast<uint64_t>(step));
      weight.mutable_grad() = slope.clone();
      const at::Tensor scores =
          (drop == DropCriterion::kMest ? weight.abs() + slope.abs() : weight.mul(slope).abs())
              .to(at::kFloat)
              .contiguous();
      const float* const score = scores.const_data_ptr<float>();
      sparsifier.end_backward(step);
      sparsifier.end_step(step);
      const PackedMask& after = sparsifier.mask(key);
      float worst_kept = INFINITY;
      for (int64_t place = 0; place < 126; ++place) {
        if (after.test(place)) worst_kept = std::min(worst_kept, score[place]);
      }
      const PackedMask dropped = without(before, after);
      for (int64_t place = 0; place < 126; ++place) {
        if (!dropped.test(place)) continue;
        EXPECT_LE(score[place], worst_kept) << step;
      }
      num_dropped += dropped.count();
      EXPECT_EQ(without(after, before).count(), 0);
      EXPECT_EQ(after.count(), ramp_density(config.schedule, config.budget.density,
                                            window_of(config.schedule, step))
                                   .of(126));
    }
    EXPECT_EQ(num_dropped, 126 - 38);
    for (const GrowCriterion grow : {GrowCriterion::kMomentum, GrowCriterion::kGrad}) {
      config.rule.grow = grow;
      for (const int64_t stop : {2, 14, 23, 40}) {
        expect_resumes<torch::optim::AdamW>(config, torch::optim::AdamWOptions(0.01), stop, 50);
      }
    }
  }
}

TEST(SparseRamp, NmRamp) {
  at::set_num_threads(1);
  // 12x8 and 4x12: groups of 4 neighbours everywhere, of 2 at the end.
  SparsifierConfig config = ramp_config(GrowCriterion::kGrad);
  config.schedule.density_ramp.reset();
  config.schedule.nm_ramp = NmRamp{{{0, 3, 4}, {0.3, 2, 4}, {0.6, 1, 2}, {0.8, 1, 4}}};
  config.structure = Structure::n_of_m(1, 4);
  config.budget.density = Density::ratio(1, 4);
  for (const GrowCriterion grow :
       {GrowCriterion::kGrad, GrowCriterion::kRandom, GrowCriterion::kNone}) {
    for (const bool stagger : {false, true}) {
      config.rule.grow = grow;
      config.schedule.stagger = stagger;
      Wider model;
      Sparsifier sparsifier(model.units(), config);
      SparseAdam optimizer(model.parameters(), torch::optim::AdamOptions(0.01));
      sparsifier.attach(optimizer);
      EXPECT_EQ(numbers_of(sparsifier), (std::vector<int64_t>{72, 36}));
      for (int64_t step = 0; step < 50; ++step) {
        train_step(model, sparsifier, optimizer, step);
        // 41 steps from 3: frames begin with the windows at 19 (15.3), 31 (27.6), 39 (35.8).
        const int64_t at = stagger && step >= 3 ? step - (step - 3) % 4 : step;
        const bool is_complete = !stagger || (step - 3) % 4 == 3;
        if (!is_complete) continue;
        const std::vector<std::pair<int64_t, int64_t>> frames = {{3, 4}, {2, 4}, {1, 2}, {1, 4}};
        const auto [n, m] = frames[at < 19 ? 0 : at < 31 ? 1 : at < 39 ? 2 : 3];
        for (const SparseUnit& unit : sparsifier.units()) {
          const AtomLayout groups = make_layout(Structure::n_of_m(n, m), unit.weight().size(0),
                                                unit.weight().size(1), "");
          const std::vector<int64_t> counts = cell_counts(groups, sparsifier.mask(unit.key));
          ASSERT_EQ(counts, std::vector<int64_t>(counts.size(), n)) << step;
          EXPECT_EQ(sparsifier.layout(unit.key).group_keep, n);
        }
      }
    }
  }
  config.rule.grow = GrowCriterion::kGrad;
  config.schedule.stagger = false;
  for (int64_t stop = 0; stop < 46; stop += 4) {
    expect_resumes<torch::optim::AdamW>(config, torch::optim::AdamWOptions(0.01), stop, 50);
  }
}

TEST(SparseRamp, GrowFirst) {
  const at::Tensor weight = normal({20, 25}, 3);
  SparsifierConfig config = presets::mest(0.2, 160, 10, 0.25);
  for (const bool grow_first : {false, true}) {
    config.schedule.grow_first = grow_first;
    Sparsifier sparsifier({unit_of(weight, 0)}, config);
    EXPECT_EQ(sparsifier.nnz(), 100);
    int64_t extra = 0;
    for (int64_t step = 0; step < 160; ++step) {
      sparsifier.begin_step(step);
      const UpdateReport report = sparsifier.end_backward(step);
      sparsifier.end_step(step);
      // Updates at 0, 10, ..., 110; stages begin at 40 and 80.
      EXPECT_EQ(report.units.size(), step % 10 == 0 && step < 120 ? 1u : 0u);
      if (report.units.empty()) continue;
      const int64_t moves = step < 40 ? 25 : step < 80 ? 12 : 6;
      if (!grow_first) {
        EXPECT_EQ(report.units[0].num_dropped, moves);
        EXPECT_EQ(report.units[0].num_grown, moves);
        EXPECT_EQ(sparsifier.nnz(), 100);
        continue;
      }
      // The last one goes back to the budget only.
      const int64_t grown = step == 110 ? 0 : moves;
      EXPECT_EQ(report.units[0].num_dropped, extra) << step;
      EXPECT_EQ(report.units[0].num_grown, grown);
      EXPECT_EQ(sparsifier.nnz(), 100 + grown);
      extra = grown;
    }
    EXPECT_EQ(sparsifier.nnz(), 100);
  }
  for (const int64_t stop : {1, 15, 42, 110}) {
    SparsifierConfig resumed = presets::mest(0.4, 80, 5, 0.4, true);
    expect_resumes<torch::optim::AdamW>(resumed, torch::optim::AdamWOptions(0.01), stop / 2, 70);
  }
}

TEST(SparseRamp, Ranks) {
  at::set_num_threads(1);
  SparsifierConfig ramp = config_of(GrowCriterion::kGrad);
  ramp.schedule.end = 13;
  ramp.schedule.density_ramp.emplace();
  ramp.budget.density = 0.4;
  SparsifierConfig staggered = ramp;
  staggered.rule.grow = GrowCriterion::kRandom;
  staggered.schedule.stagger = true;
  SparsifierConfig soft_bound = config_of(GrowCriterion::kRandom);
  soft_bound.schedule.end = 13;
  soft_bound.schedule.grow_first = true;
  for (const SparsifierConfig& config : {ramp, staggered, soft_bound}) {
    const Trained one = train(1, 1, config);
    EXPECT_GT(one.num_grown, 20);
    EXPECT_EQ(one.totals.nnz, config.budget.density.of(708));
    for (const auto& [num_ranks, ep_size] : layouts()) {
      SCOPED_TRACE("P=" + std::to_string(num_ranks) + " ep=" + std::to_string(ep_size));
      const Trained many = train(num_ranks, ep_size, config);
      expect_close(many, one, 1e-11);
      EXPECT_EQ(many.totals.nnz, one.totals.nnz);
    }
    const auto piece = [&](auto... arguments) { return train_piece(config, arguments...); };
    const Trained a = piece(4, 2, 0, 4, nullptr);
    EXPECT_GT(a.totals.nnz, config.budget.density.of(708));
    const Trained b = piece(2, 1, 4, 9, &a);
    expect_close(piece(8, 4, 9, 13, &b), one, 1e-11);
  }
}

TEST(SparseRamp, Presets) {
  const std::vector<std::pair<const char*, SparsifierConfig>> configs = {
      {"mest", presets::mest(0.25, 16, 4)},
      {"mest, soft bound", presets::mest(0.25, 16, 4, 0.2, true)},
      {"nm_ramp", presets::nm_ramp(1, 4, 16, 4)}};
  EXPECT_EQ(presets::mest(0.25, 16).rule.drop, DropCriterion::kMest);
  for (const auto& [name, config] : configs) {
    const at::Tensor experts = normal({2, 6, 8}, 5).requires_grad_(true);
    Sparsifier sparsifier(expert_units("w1", experts, 0, Matrix::kW1, {0, 1}), config);
    torch::optim::Adam optimizer({experts}, torch::optim::AdamOptions(0.01));
    sparsifier.attach(optimizer);
    int64_t num_grown = 0;
    for (int64_t step = 0; step < 16; ++step) {
      sparsifier.begin_step(step);
      optimizer.zero_grad();
      at::matmul(normal({9, 8}, static_cast<uint64_t>(step)), experts.transpose(1, 2))
          .square()
          .sum()
          .backward();
      for (const UnitUpdate& unit : sparsifier.end_backward(step).units) {
        num_grown += unit.num_grown;
      }
      optimizer.step();
      sparsifier.end_step(step);
    }
    EXPECT_EQ(sparsifier.nnz(), 24) << name;
    EXPECT_GT(num_grown, 0) << name;
    for (const SparseUnit& unit : sparsifier.units()) {
      EXPECT_EQ(sparsifier.stats(unit.key).num_updates, 3) << name;
      EXPECT_EQ(sparsifier.stats(unit.key).nnz, 12) << name;
    }
  }
}

TEST(SparseRamp, Refused) {
  const auto text = [](const std::function<void(Schedule&)>& spoil) {
    Schedule schedule = ramp_schedule();
    spoil(schedule);
    return config_error([&] { validate(schedule); });
  };
  EXPECT_EQ(text([](Schedule&) {}), "no ConfigError");
  EXPECT_EQ(
      text([](Schedule& s) { s.density_ramp->end = 111; }),
      "[sparse_schedule] ramp end=111 is outside [-1, 110], the first step of the last window "
      "of updates, which ends the ramp");
  EXPECT_EQ(text([](Schedule& s) { s.density_ramp->begin = 120; }),
            "[sparse_schedule] ramp begin=120 is above its end=110");
  EXPECT_EQ(text([](Schedule& s) { s.density_ramp->power = 0; }),
            "[sparse_schedule] ramp power=0 is not a finite number above 0");
  EXPECT_EQ(text([](Schedule& s) { s.end = 10; }),
            "[sparse_schedule] end=10 leaves no update for a ramp or for grow_first to end");
  EXPECT_NE(text([](Schedule& s) { s.clock = Clock::kTokens; }).find("function of the step"),
            std::string::npos);
  EXPECT_NE(text([](Schedule& s) {
              s.nm_ramp = NmRamp{{{0, 1, 2}}};
            }).find("nm_ramp"),
            std::string::npos);
  const auto frames = [&](std::vector<NmRampFrame> list) {
    return text([&](Schedule& s) {
      s.density_ramp.reset();
      s.nm_ramp = NmRamp{std::move(list)};
    });
  };
  EXPECT_EQ(frames({}), "[sparse_schedule] nm_ramp=empty has no frame; list one");
  EXPECT_EQ(frames({{0.1, 1, 2}}),
            "[sparse_schedule] nm_ramp=0.1 is where the first begins; that is 0");
  EXPECT_EQ(frames({{0, 3, 4}, {0.5, 4, 4}}),
            "[sparse_schedule] frame=4:4 is denser than the one before it");
  EXPECT_EQ(frames({{0, 3, 2}}), "[sparse_schedule] frame=3:2 is not 1 <= N <= M");
  EXPECT_EQ(frames({{0, 3, 4}, {0.995, 1, 4}}),
            "[sparse_schedule] frame from=0.995 is after the last update at step 110; begin it "
            "earlier");
  EXPECT_NE(text([](Schedule& s) { s.anneal = Anneal::kStages; }).find("stages need at least one"),
            std::string::npos);
  EXPECT_NE(text([](Schedule& s) {
              s.stages = {{0, 1}};
            }).find("does not go by stages"),
            std::string::npos);

  Wider model;
  const auto refused = [&](const std::function<void(SparsifierConfig&)>& spoil) {
    SparsifierConfig config = ramp_config(GrowCriterion::kRandom);
    spoil(config);
    return config_error([&] { Sparsifier(model.units(), config); });
  };
  EXPECT_EQ(refused([](SparsifierConfig& c) { c.schedule.density_ramp->initial = 0.2; }),
            "[sparse_targets] initial=0.2 is below the budget's density=0.3, but a ramp falls");
  EXPECT_NE(refused([](SparsifierConfig& c) {
              c.structure = Structure::n_of_m(1, 2);
              c.budget.density = 0.5;
            }).find("density_ramp=given does not go with N:M"),
            std::string::npos);
  EXPECT_EQ(refused([](SparsifierConfig& c) {
              c.schedule.density_ramp.reset();
              c.schedule.nm_ramp = NmRamp{{{0, 1, 2}}};
            }),
            "[sparsifier] nm_ramp=1:2 is its last frame, but the structure is not N:M; they must "
            "be the same");
  EXPECT_NE(refused([](SparsifierConfig& c) {
              c.schedule.density_ramp.reset();
              c.structure = Structure::n_of_m(1, 4);
              c.budget.density = 0.25;
              c.schedule.nm_ramp = NmRamp{{{0, 6, 16}, {0.5, 1, 4}}};
            }).find("is not a multiple of group=16"),
            std::string::npos);
  EXPECT_NE(refused([](SparsifierConfig& c) {
              c.schedule.grow_first = true;
              c.rule.drop = DropCriterion::kSetSigned;
            }).find("set_signed"),
            std::string::npos);
  EXPECT_EQ(refused([](SparsifierConfig& c) { c.structure = Structure::coupled_neurons(); }),
            "[sparsifier] structure=neuron has budgets that stay; give up ramps, grow_first, "
            "global and load");
  EXPECT_EQ(refused([](SparsifierConfig& c) {
              c.structure = Structure::constant_fan_in();
              c.rule.grow = GrowCriterion::kGrad;
              c.ablation.gamma = 0.3;
            }),
            "[sparsifier] ablation=on shares budgets that stay; give up ramps, grow_first, global "
            "and load");
  EXPECT_EQ(refused([](SparsifierConfig& c) { c.rule.grow = GrowCriterion::kSampledGrad; }),
            "[sparsifier] grow=sampled_grad draws candidates for a budget that stays; choose grad, "
            "or give up ramps, grow_first, global and load");
  EXPECT_NE(refused([](SparsifierConfig& c) {
              c.forward.method = ForwardMethod::kSte;
              c.schedule.end = c.schedule.begin;
              c.schedule.density_ramp.reset();
              c.budget.distribution = Distribution::kGlobal;
            }).find("forward=soft"),
            std::string::npos);
}

TEST(SparseRamp, Pattern) {
  // One expert on two ranks: the second has none.
  for (const ExpertKind kind :
       {ExpertKind::kPlain, ExpertKind::kGated, ExpertKind::kLinear, ExpertKind::kModule}) {
    std::vector<std::string> texts(2);
    std::vector<size_t> num_units(2);
    comm::run_local(2, [&](const comm::Group& world) {
      const auto placement = ExpertPlacement::contiguous(1, 2);
      const auto experts = make_experts(kind, placement, world.rank(), at::kDouble);
      const auto rank = static_cast<size_t>(world.rank());
      ASSERT_EQ(experts->num_local_experts(), rank == 0 ? 1 : 0);
      texts[rank] = config_error([&] {
        Sparsifier(experts->sparse_units(0, "w9*"), presets::static_mask(0.5),
                   make_parallel_groups(world));
      });
      // A good one is taken by both.
      const std::string good = kind == ExpertKind::kModule ? "first.*" : "w1";
      const auto units = experts->sparse_units(0, good);
      num_units[rank] = units.size();
      Sparsifier sparsifier(units, presets::static_mask(0.5), make_parallel_groups(world));
      EXPECT_GT(sparsifier.totals().nnz, 0);
    });
    EXPECT_NE(texts[0].find("pattern=w9* fits none of "), std::string::npos) << texts[0];
    EXPECT_EQ(texts[0], texts[1]);
    EXPECT_EQ(num_units, (std::vector<size_t>{1, 0}));
  }
}

}  // namespace
}  // namespace perseid::testing
