// The Sparsifier on weights of experts without a layer, over ranks (threads), float64.
//   ManyUpdates  200 updates of half of all: floors, equal cells and the global sum hold
//   Staggered    ranks together update each unit once per window, none after the end
//   TokenClock   uniform load: the step clock; twice the load: twice as often; none: never; not
//                after the end of either clock; measured means; resumed
//   FlippedBit   in the mask of one replica: all ranks throw, name unit and ranks; no change
//   NonFinite    a NaN on one rank: all ranks throw, name unit and step; no change
//   Disagree     configurations, units, shapes: all ranks throw the same
//   LoadRefused  missing masks, old versions, states that differ between ranks
#include <gtest/gtest.h>

#include "tests/config_error.h"
#include "tests/moe/sparse_ranks_fixture.h"

namespace perseid::testing {
namespace {

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

TEST(SparseUnitRanks, ManyUpdates) {
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

TEST(SparseUnitRanks, Staggered) {
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

TEST(SparseUnitRanks, TokenClock) {
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

TEST(SparseUnitRanks, FlippedBit) {
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

TEST(SparseUnitRanks, NonFinite) {
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

TEST(SparseUnitRanks, Disagree) {
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

TEST(SparseUnitRanks, LoadRefused) {
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
  EXPECT_EQ(count(text, "version=1 is not 3"), 4) << text;
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

}  // namespace
}  // namespace perseid::testing
