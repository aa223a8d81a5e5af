// Budgets that units take from each other.
//   Floors      200 aggressive updates, global and by load: the sum exact after each, no unit below
//               its floor or above its ceiling; small weights and idle experts come down to it
//   Signs       weights and gradients of both signs count by magnitude, against a plain sort
//   Moves       a unit with larger gradients and weights takes from the others
//   Load        closed form of the shares; reallocation every n-th update; idle units shrink only
//   LoadResumes at each step, rows that change, also under a ramp: bit for bit
//   Ranks       P = 1, 2, 4, any ep_size, and changes of P: the masks of one process
//   Diverged    NaN names unit and step on every rank, and changes nothing
//   Presets     granet, gmp: three updates reach the budget
//   Refused     what does not go with one selection over all
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/optim/adam.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <tuple>

#include "moe/sparse_presets.h"
#include "moe/sparse_select.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"
#include "tests/moe/sparse_ranks_fixture.h"

namespace perseid::testing {
namespace {

SparsifierConfig shared_config(Distribution distribution, GrowCriterion grow) {
  SparsifierConfig config;
  config.budget.distribution = distribution;
  config.budget.density = 0.25;
  config.budget.load_power = 1;
  config.rule.grow = grow;
  config.schedule.every = 1;
  config.schedule.end = 200;
  config.schedule.alpha = 0.5;
  config.schedule.anneal = Anneal::kConstant;
  config.min_rows = 1;
  return config;
}

/// Four experts of 6x8; rows of each by step.
struct FourExperts {
  at::Tensor weight = normal({4, 6, 8}, 5).requires_grad_(true);
  std::vector<SparseUnit> units() const {
    std::vector<SparseUnit> all = expert_units("w1", weight, 0, Matrix::kW1, {0, 1, 2, 3});
    for (SparseUnit& unit : all) unit.counts_rows = true;
    return all;
  }
  UpdateReport step(Sparsifier& sparsifier, torch::optim::Optimizer& optimizer, int64_t number,
                    const std::vector<int64_t>& rows, const std::vector<double>& scales) const {
    sparsifier.begin_step(number);
    optimizer.zero_grad();
    at::Tensor loss = weight.sum() * 0;
    for (int64_t e = 0; e < 4; ++e) {
      const auto place = static_cast<size_t>(e);
      const uint64_t seed = static_cast<uint64_t>(10 * number + e);
      const at::Tensor x = normal({rows[place], 8}, seed);
      const at::Tensor y = normal({rows[place], 6}, seed + 7'777);
      const at::Tensor error = x.mm(weight.select(0, e).t()) - y;
      loss = loss + error.square().sum() * scales[place];
      sparsifier.count_rows(sparsifier.units()[place].key, rows[place]);
    }
    loss.backward();
    const UpdateReport report = sparsifier.end_backward(number);
    optimizer.step();
    sparsifier.end_step(number);
    return report;
  }
};

TEST(SparseGlobal, Floors) {
  at::set_num_threads(1);
  for (const Distribution distribution : {Distribution::kGlobal, Distribution::kLoad}) {
    for (const GrowCriterion grow :
         {GrowCriterion::kGrad, GrowCriterion::kRandom, GrowCriterion::kUnfired}) {
      for (const bool has_bounds : {false, true}) {
        FourExperts model;
        {
          const at::NoGradGuard no_grad;
          model.weight.select(0, 1).mul_(1e-3);  // first to go
        }
        SparsifierConfig config = shared_config(distribution, grow);
        if (has_bounds) {
          config.budget.floor = Density::ratio(10, 48);
          config.budget.ceiling = Density::ratio(16, 48);
        }
        const int64_t floor = has_bounds ? 10 : 6, ceiling = has_bounds ? 16 : 48;
        Sparsifier sparsifier(model.units(), config);
        torch::optim::SGD optimizer({model.weight}, torch::optim::SGDOptions(0.001));
        sparsifier.attach(optimizer);
        EXPECT_EQ(sparsifier.nnz(), 48);
        int64_t least = 48, most = 0;
        for (int64_t step = 0; step < 200; ++step) {
          // Expert 1 has small gradients and few rows, expert 3 none at all for a time.
          const bool is_idle = step >= 50 && step < 100;
          model.step(sparsifier, optimizer, step, {9, 1, 30, is_idle ? 0 : 5}, {1, 1e-6, 2, 1});
          ASSERT_EQ(sparsifier.nnz(), 48) << step;
          for (const SparseUnit& unit : sparsifier.units()) {
            const int64_t nnz = sparsifier.stats(unit.key).nnz;
            ASSERT_GE(nnz, floor) << unit.name << " " << step;
            ASSERT_LE(nnz, ceiling) << unit.name << " " << step;
            least = std::min(least, nnz);
            most = std::max(most, nnz);
          }
        }
        // The bounds are met, not only kept, where growth does not fall on all units by chance.
        const bool is_by_chance =
            distribution == Distribution::kGlobal && grow != GrowCriterion::kGrad;
        if (is_by_chance) continue;
        EXPECT_EQ(least, floor) << static_cast<int>(grow);
        if (has_bounds) {
          EXPECT_EQ(most, ceiling);
        } else {
          EXPECT_GT(most, 14);
        }
      }
    }
  }
}

TEST(SparseGlobal, Signs) {
  // Two units, 9x14 and 6x8, as one list of atoms.
  const std::vector<at::Tensor> weights = {normal({9, 14}, 3), normal({6, 8}, 4)};
  const std::vector<at::Tensor> slopes = {normal({9, 14}, 5), normal({6, 8}, 6)};
  SparsifierConfig config = shared_config(Distribution::kGlobal, GrowCriterion::kGrad);
  config.budget.floor = Density::ratio(1, 1000);  // none
  config.schedule.alpha = 0.4;
  Sparsifier sparsifier({unit_of(weights[0], 0), unit_of(weights[1], 1)}, config);
  std::vector<std::pair<double, size_t>> active, inactive;  // magnitude, number of the atom
  std::vector<bool> expected;
  for (size_t u = 0; u < 2; ++u) {
    const PackedMask mask = sparsifier.mask(sparsifier.units()[u].key);
    const at::Tensor size = weights[u].abs(), slope = slopes[u].abs();
    for (int64_t place = 0; place < mask.num_places(); ++place) {
      const size_t atom = expected.size();
      expected.push_back(mask.test(place));
      if (mask.test(place)) active.emplace_back(size.const_data_ptr<double>()[place], atom);
      if (!mask.test(place)) inactive.emplace_back(slope.const_data_ptr<double>()[place], atom);
    }
  }
  const size_t num_moved = active.size() * 2 / 5;
  ASSERT_GT(num_moved, 10u);
  std::sort(active.begin(), active.end());
  std::sort(inactive.rbegin(), inactive.rend());
  for (size_t i = 0; i < num_moved; ++i) {
    expected[active[i].second] = false;
    expected[inactive[i].second] = true;
  }
  for (size_t u = 0; u < 2; ++u) {
    at::Tensor(weights[u]).mutable_grad() = slopes[u].clone();
  }
  sparsifier.begin_step(0);
  sparsifier.end_backward(0);
  std::vector<bool> actual;
  for (const SparseUnit& unit : sparsifier.units()) {
    const PackedMask& mask = sparsifier.mask(unit.key);
    for (int64_t place = 0; place < mask.num_places(); ++place) actual.push_back(mask.test(place));
  }
  EXPECT_EQ(actual, expected);
}

TEST(SparseGlobal, Moves) {
  FourExperts model;
  const SparsifierConfig config = shared_config(Distribution::kGlobal, GrowCriterion::kGrad);
  Sparsifier sparsifier(model.units(), config);
  torch::optim::SGD optimizer({model.weight}, torch::optim::SGDOptions(0.001));
  sparsifier.attach(optimizer);
  for (int64_t step = 0; step < 30; ++step) {
    const UpdateReport report =
        model.step(sparsifier, optimizer, step, {9, 9, 9, 0}, {1, 1, 20, 1});
    ASSERT_EQ(report.units.size(), 4u);
    // Expert 3 has no rows: nothing goes or comes.
    EXPECT_EQ(report.units[3].skipped, SkipReason::kFewRows);
    EXPECT_EQ(report.units[3].num_dropped + report.units[3].num_grown, 0);
    ASSERT_EQ(sparsifier.stats(sparsifier.units()[3].key).nnz, 12);
    int64_t num_dropped = 0, num_grown = 0;
    for (const UnitUpdate& unit : report.units) {
      num_dropped += unit.num_dropped;
      num_grown += unit.num_grown;
    }
    EXPECT_EQ(num_dropped, num_grown);
    EXPECT_LE(num_dropped, 18);  // half of 36
  }
  const auto nnz = [&](size_t e) { return sparsifier.stats(sparsifier.units()[e].key).nnz; };
  EXPECT_GT(nnz(2), nnz(0));
  EXPECT_GT(nnz(2), nnz(1));
  EXPECT_EQ(nnz(0) + nnz(1) + nnz(2), 36);
}

TEST(SparseGlobal, Load) {
  // Shares against the formula, without bounds in the way.
  std::vector<BudgetUnit> units;
  for (const double load : {0.25, 1.0, 2.0, 0.75}) {
    BudgetUnit unit;
    unit.name = "u";
    unit.out = 40;
    unit.in = 50;
    unit.load = load;
    units.push_back(unit);
  }
  Budget budget;
  budget.distribution = Distribution::kLoad;
  budget.density = 0.1;
  EXPECT_EQ(allocate(budget, units).nnz, (std::vector<int64_t>{200, 200, 200, 200}));
  budget.load_power = 1;
  EXPECT_EQ(allocate(budget, units).nnz, (std::vector<int64_t>{50, 200, 400, 150}));
  budget.load_power = 0.5;  // 0.5, 1, 1.414, 0.866 of 3.780
  EXPECT_EQ(allocate(budget, units).nnz, (std::vector<int64_t>{106, 212, 299, 183}));
  units[0].load = 0;
  units[0].floor = 40;
  units[2].ceiling = 300;
  budget.load_power = 1;  // 40, then 760 as 1 : 2 : 0.75, then 460 as 1 : 0.75
  EXPECT_EQ(allocate(budget, units).nnz, (std::vector<int64_t>{40, 263, 300, 197}));
  budget.load_power = 1.5;
  EXPECT_EQ(config_error([&] { allocate(budget, units); }),
            "[sparse_budget] load_power=1.5 is outside [0, 1]");

  for (const int64_t realloc_every : {1, 3}) {
    FourExperts model;
    SparsifierConfig config = shared_config(Distribution::kLoad, GrowCriterion::kRandom);
    config.budget.realloc_every = realloc_every;
    config.schedule.every = 2;
    config.schedule.begin = 1;
    Sparsifier sparsifier(model.units(), config);
    torch::optim::SGD optimizer({model.weight}, torch::optim::SGDOptions(0.001));
    sparsifier.attach(optimizer);
    std::vector<int64_t> before = {12, 12, 12, 12};
    std::vector<int64_t> rows_since(4, 0);
    for (int64_t step = 0; step < 25; ++step) {
      const std::vector<int64_t> rows = {8, 10 + 3 * (step % 5), 8 + step, 9};
      for (size_t e = 0; e < 4; ++e) rows_since[e] += rows[e];
      model.step(sparsifier, optimizer, step, rows, {1, 1, 1, 1});
      std::vector<int64_t> now;
      for (const SparseUnit& unit : sparsifier.units()) {
        now.push_back(sparsifier.stats(unit.key).nnz);
      }
      EXPECT_EQ(std::accumulate(now.begin(), now.end(), int64_t{0}), 48);
      const bool is_shared_anew = step % 2 == 1 && (step - 1) / 2 % realloc_every == 0;
      if (is_shared_anew) {
        std::vector<BudgetUnit> shares;
        const int64_t sum = std::accumulate(rows_since.begin(), rows_since.end(), int64_t{0});
        for (size_t e = 0; e < 4; ++e) {
          BudgetUnit unit;
          unit.name = "e";
          unit.out = 6;
          unit.in = 8;
          unit.floor = 6;
          unit.load = static_cast<double>(rows_since[e]) * 4 / static_cast<double>(sum);
          shares.push_back(unit);
        }
        EXPECT_EQ(now, allocate(config.budget, shares).nnz) << step;
        rows_since.assign(4, 0);
      } else {
        EXPECT_EQ(now, before) << step;
      }
      before = now;
    }
    EXPECT_GT(before[2], 15);
  }

  // An expert without rows falls to its floor and grows nothing.
  FourExperts model;
  const SparsifierConfig config = shared_config(Distribution::kLoad, GrowCriterion::kRandom);
  Sparsifier sparsifier(model.units(), config);
  torch::optim::SGD optimizer({model.weight}, torch::optim::SGDOptions(0.001));
  sparsifier.attach(optimizer);
  const UpdateReport report = model.step(sparsifier, optimizer, 0, {5, 0, 5, 5}, {1, 1, 1, 1});
  EXPECT_EQ(report.units[1].skipped, SkipReason::kFewRows);
  EXPECT_EQ(report.units[1].num_dropped, 6);
  EXPECT_EQ(report.units[1].num_grown, 0);
  for (size_t e = 0; e < 4; ++e) {
    EXPECT_EQ(sparsifier.stats(sparsifier.units()[e].key).nnz, e == 1 ? 6 : 14);
  }
  EXPECT_EQ(config_error([&] {
              Sparsifier({unit_of(normal({4, 4}, 1), 0)}, config);
            }),
            "[sparsifier] distribution=load needs rows, but nobody counts those of any unit");
}

TEST(SparseGlobal, LoadResumes) {
  at::set_num_threads(1);
  for (const bool ramps : {false, true}) {
    for (int64_t stop = 0; stop < 24; ++stop) {
      SparsifierConfig config = shared_config(Distribution::kLoad, GrowCriterion::kRandom);
      config.budget.realloc_every = 3;
      config.schedule.every = 2;
      config.schedule.end = 25;
      if (ramps) config.schedule.density_ramp.emplace();
      FourExperts model, other;
      Sparsifier sparsifier(model.units(), config), resumed(other.units(), config);
      const torch::optim::SGDOptions options(0.001);
      torch::optim::SGD optimizer({model.weight}, options), second({other.weight}, options);
      sparsifier.attach(optimizer);
      resumed.attach(second);
      for (int64_t step = 0; step < 25; ++step) {
        // Each expert is busy in its turn.
        std::vector<int64_t> rows = {4, 5, 6, 7};
        rows[static_cast<size_t>(step / 5 % 4)] += 20;
        if (step == stop) {
          other.weight.detach().copy_(model.weight.detach());
          resumed.load(sparsifier.state_dict());
        }
        model.step(sparsifier, optimizer, step, rows, {1, 1, 1, 1});
        if (step >= stop) other.step(resumed, second, step, rows, {1, 1, 1, 1});
      }
      EXPECT_EQ(sparsifier.nnz(), 48);
      EXPECT_TRUE(at::equal(model.weight, other.weight)) << stop;
      for (const SparseUnit& unit : sparsifier.units()) {
        EXPECT_EQ(sparsifier.mask(unit.key), resumed.mask(unit.key)) << stop;
      }
    }
  }
}

TEST(SparseGlobal, Ranks) {
  at::set_num_threads(1);
  std::vector<SparsifierConfig> configs;
  for (const GrowCriterion grow : {GrowCriterion::kGrad, GrowCriterion::kRandom}) {
    SparsifierConfig config = config_of(grow);
    config.budget.distribution = Distribution::kGlobal;
    configs.push_back(config);
    config.order = UpdateOrder::kAfterStep;
    config.schedule.end = 13;
    config.schedule.density_ramp.emplace();
    config.budget.density = 0.35;
    configs.push_back(config);
    config = config_of(grow);
    config.budget.distribution = Distribution::kLoad;
    config.budget.load_power = 0.7;
    config.budget.realloc_every = 2;
    config.schedule.every = 2;
    configs.push_back(config);
  }
  SparsifierConfig gmp = configs[1];
  gmp.rule.grow = GrowCriterion::kNone;
  configs.push_back(gmp);
  for (size_t c = 0; c < configs.size(); ++c) {
    const SparsifierConfig& config = configs[c];
    const Trained one = train(1, 1, config);
    EXPECT_EQ(one.totals.nnz, config.budget.density.of(708));
    EXPECT_EQ(one.num_grown > 20, config.rule.grow != GrowCriterion::kNone) << c;
    // Budgets did move.
    std::map<int64_t, int64_t> numbers;
    for (const UnitState& unit : one.state.units) {
      if (unit.key.matrix == Matrix::kW2) ++numbers[unit.nnz];
    }
    EXPECT_GT(numbers.size(), 1u) << c;
    for (const auto& [num_ranks, ep_size] : layouts()) {
      SCOPED_TRACE("config " + std::to_string(c) + " P=" + std::to_string(num_ranks) +
                   " ep=" + std::to_string(ep_size));
      const Trained many = train(num_ranks, ep_size, config);
      expect_close(many, one, 1e-11);
      EXPECT_EQ(many.totals.num_updates, one.totals.num_updates);
    }
    const auto piece = [&](auto... arguments) { return train_piece(config, arguments...); };
    const Trained a = piece(4, 2, 0, 4, nullptr);
    const Trained b = piece(2, 1, 4, 9, &a);
    expect_close(piece(8, 4, 9, 13, &b), one, 1e-11);
    // The same ranks, from another step: bit for bit.
    const Trained whole = piece(2, 2, 0, 13, nullptr), half = piece(2, 2, 0, 6, nullptr);
    const Trained rest = piece(2, 2, 6, 13, &half);
    expect_same_bits(whole, rest);
  }
}

TEST(SparseGlobal, Diverged) {
  at::set_num_threads(1);
  for (const int num_ranks : {1, 2, 4}) {
    std::vector<std::string> texts(static_cast<size_t>(num_ranks));
    comm::run_local(num_ranks, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world);
      SparseModel model(groups, false, std::make_shared<TableGate>());
      SparsifierConfig config = config_of(GrowCriterion::kGrad);
      config.budget.distribution = Distribution::kGlobal;
      Sparsifier sparsifier(model.units(), config, groups);
      const SparsifierState before = sparsifier.state_dict();
      sparsifier.begin_step(1);
      model.backward(1);
      sum_gradients(model, groups);
      for (const SparseUnit& unit : sparsifier.units()) {
        if (unit.key.expert == 4 && unit.key.matrix == Matrix::kW2) {
          unit.part_of(unit.parameter.mutable_grad()).fill_(std::nan(""));
        }
      }
      try {
        sparsifier.end_backward(1);
      } catch (const Diverged& error) {
        texts[static_cast<size_t>(world.rank())] = error.what();
      }
      const SparsifierState after = sparsifier.state_dict();
      for (size_t u = 0; u < after.units.size(); ++u) {
        EXPECT_EQ(after.units[u].mask, before.units[u].mask);
      }
    });
    for (const std::string& text : texts) EXPECT_FALSE(text.empty());
    EXPECT_NE(texts.back().find("step 1"), std::string::npos) << texts.back();
  }
}

TEST(SparseGlobal, Presets) {
  const std::vector<std::pair<const char*, SparsifierConfig>> configs = {
      {"granet", presets::granet(0.25, 16, 4)},
      {"granet from sparse", presets::granet(0.25, 16, 4, 0.5)},
      {"gmp", presets::gmp(0.25, 16, 4)}};
  for (const auto& [name, config] : configs) {
    const at::Tensor experts = normal({2, 6, 8}, 5).requires_grad_(true);
    Sparsifier sparsifier(expert_units("w1", experts, 0, Matrix::kW1, {0, 1}), config);
    torch::optim::Adam optimizer({experts}, torch::optim::AdamOptions(0.01));
    sparsifier.attach(optimizer);
    EXPECT_EQ(sparsifier.nnz(), name == std::string("granet from sparse") ? 48 : 96);
    int64_t num_grown = 0;
    for (int64_t step = 0; step < 16; ++step) {
      sparsifier.begin_step(step);
      optimizer.zero_grad();
      at::matmul(normal({9, 8}, static_cast<uint64_t>(step)), experts.transpose(1, 2))
          .square()
          .sum()
          .backward();
      EXPECT_TRUE(sparsifier.end_backward(step).units.empty()) << name;
      optimizer.step();
      const UpdateReport report = sparsifier.end_step(step);
      EXPECT_EQ(report.units.size(), step % 4 == 0 && step < 12 ? 2u : 0u) << name;
      for (const UnitUpdate& unit : report.units) num_grown += unit.num_grown;
      const int64_t window = window_of(config.schedule, step);
      EXPECT_EQ(sparsifier.nnz(), ramp_density(config.schedule, 0.25, window).of(96)) << name;
    }
    EXPECT_EQ(sparsifier.nnz(), 24) << name;
    EXPECT_EQ(num_grown > 0, config.rule.grow == GrowCriterion::kGrad) << name;
    for (const SparseUnit& unit : sparsifier.units()) {
      EXPECT_EQ(sparsifier.stats(unit.key).num_updates, 3) << name;
      EXPECT_GE(sparsifier.stats(unit.key).nnz, 6) << name;
    }
  }
}

TEST(SparseGlobal, Refused) {
  FourExperts model;
  const auto text = [&](const std::function<void(SparsifierConfig&)>& spoil) {
    SparsifierConfig config = shared_config(Distribution::kGlobal, GrowCriterion::kGrad);
    config.schedule.every = 4;
    spoil(config);
    return config_error([&] { Sparsifier(model.units(), config); });
  };
  EXPECT_EQ(text([](SparsifierConfig&) {}), "no ConfigError");
  EXPECT_NE(text([](SparsifierConfig& c) {
              c.schedule.stagger = true;
            }).find("distribution=global needs all units to update in one step"),
            std::string::npos);
  EXPECT_NE(text([](SparsifierConfig& c) {
              c.budget.distribution = Distribution::kLoad;
              c.schedule.clock = Clock::kTokens;
              c.schedule.mean_rows = 5;
            }).find("distribution=load needs all units to update in one step"),
            std::string::npos);
  EXPECT_NE(text([](SparsifierConfig& c) {
              c.structure = Structure::constant_fan_in();
            }).find("selects atoms of any row"),
            std::string::npos);
  EXPECT_NE(text([](SparsifierConfig& c) {
              c.structure = Structure::n_of_m(1, 4);
            }).find("has nothing to share out under N:M"),
            std::string::npos);
  EXPECT_NE(text([](SparsifierConfig& c) {
              c.rule.drop = DropCriterion::kSetSigned;
            }).find("which set_signed has not"),
            std::string::npos);
  for (const DropCriterion drop : {DropCriterion::kMest, DropCriterion::kTaylor}) {
    EXPECT_EQ(text([drop](SparsifierConfig& c) { c.rule.drop = drop; }),
              "[sparsifier] distribution=global compares weights of all units, also of those "
              "without a gradient; choose magnitude");
  }
  for (const GrowCriterion grow : {GrowCriterion::kMomentum, GrowCriterion::kGreedyProgress}) {
    EXPECT_EQ(text([grow](SparsifierConfig& c) { c.rule.grow = grow; }),
              "[sparsifier] distribution=global grows by grad, random, unfired or none only");
  }
  for (const Distribution distribution : {Distribution::kGlobal, Distribution::kLoad}) {
    EXPECT_NE(text([distribution](SparsifierConfig& c) {
                c.budget.distribution = distribution;
                c.rule.grow = GrowCriterion::kSampledGrad;
              }).find("grow=sampled_grad draws candidates for a budget that stays"),
              std::string::npos);
    EXPECT_NE(text([distribution](SparsifierConfig& c) {
                c.budget.distribution = distribution;
                c.structure = Structure::coupled_neurons();
              }).find("structure=neuron has budgets that stay"),
              std::string::npos);
    EXPECT_NE(text([distribution](SparsifierConfig& c) {
                c.budget.distribution = distribution;
                c.structure = Structure::constant_fan_in();
                c.ablation.gamma = 0.3;
              }).find("ablation=on shares budgets that stay"),
              std::string::npos);
  }
  EXPECT_NE(text([](SparsifierConfig& c) {
              c.schedule.grow_first = true;
            }).find("grow_first=true does not go with distribution global"),
            std::string::npos);
  EXPECT_NE(text([](SparsifierConfig& c) {
              c.budget.floor = 0.5;
              c.budget.ceiling = 0.3;
            }).find("leaves no multiple"),
            std::string::npos);
  EXPECT_NE(text([](SparsifierConfig& c) { c.budget.floor = 0.3; }).find("the floors need"),
            std::string::npos);
}

}  // namespace
}  // namespace perseid::testing
