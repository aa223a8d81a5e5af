// Searches over the order of experts in train_domains and train_multi, on the fixture.
//   SameAtAnyRankCount  a few steps with each search in one process, on 2 and 4 threads as ranks,
//                       also with an idle one: losses, weights, held losses to 1e-12, phi to
//                       1e-8, maps and counts equal
//   WhenSwapSearches    at the start of each interval, while progress < until
//   HeldLossIsTheMean   cross-entropy of the held images alone
//   PhiIsTrained        by the learning rate of the experts, in the soft stage alone
//   SoftStageIsReported its loss is named while it lasts, other losses keep their values
//   WeightsAreByExpert  what the test says of weights and of loads agrees where outputs moved
//   Repair              scrambled orders are searched; results are those of the trained order
//   SingleIgnoresIt     no order, the same bits
//   Texts               lines, tables and JSON with a search, and none of it without
//   WrongSettings, CommandLines  sentences for what does not go together
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>

#include "comm/group.h"
#include "examples/train_fashion/multi_report.h"
#include "examples/train_fashion/multi_train.h"
#include "examples/train_fashion/options.h"
#include "examples/train_fashion/report.h"
#include "examples/train_fashion/search_report.h"
#include "examples/train_fashion/train.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

using gates::PermScope;
using gates::PermSearch;

void add_search_to(TrainOptions& options, PermSearch search, PermScope scope = PermScope::kShared) {
  options.dtype = kernels::DType::kFloat64;
  options.search.permutation.search(search).scope(scope).until(.5);
  options.search.held_batches = 2;
  options.search.interval = 4;
  // Away from ties phi has gradients of nearly 0, and Adam divides them by their size: rounding
  // errors would become steps of the whole model.
  if (search == PermSearch::kSinkhorn) options.adam_eps = 1e-4;
}

TrainOptions small_run(GateKind gate, PermSearch search, PermScope scope = PermScope::kShared) {
  TrainOptions options;
  options.gate = gate;
  options.global_batch_size = 58;  // no rank count above 2 divides it; 4 steps an epoch
  options.train_iters = 12;
  options.lr = 1e-3;
  add_search_to(options, search, scope);
  return options;
}

MultiOptions small_multi(GateKind gate, PermSearch search, PermScope scope) {
  MultiOptions options = multi_defaults(Protocol::kSmall);
  options.train.gate = gate;
  options.train.global_batch_size = 26;
  options.train.train_iters = 8;
  add_search_to(options.train, search, scope);
  return options;
}

const MultiData& fixture_pairs() {
  static const MultiData data =
      make_multi(load_fashion_mnist(fixture_folder()), Protocol::kSmall, 0);
  return data;
}

/// The result of rank 0.
template <typename Result, typename Run>
Result on_ranks(int ranks, Run&& run) {
  Result result;
  std::mutex mutex;
  comm::run_local(ranks, [&](const comm::Group& world) {
    Result mine = run(world);
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) result = std::move(mine);
  });
  return result;
}

RunResult run(int ranks, const TrainOptions& options) {
  return on_ranks<RunResult>(ranks, [&](const comm::Group& world) {
    return train_domains(world, fixture_data(), options);
  });
}

MultiResult run(int ranks, const MultiOptions& options) {
  return on_ranks<MultiResult>(ranks, [&](const comm::Group& world) {
    return train_multi(world, fixture_pairs(), options);
  });
}

void expect_equal_weights(const std::vector<WeightDump>& a, const std::vector<WeightDump>& b,
                          double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].name, b[i].name);
    // The gradient of phi is rounded before it is divided by the temperature, down to 1e-7.
    const bool is_phi = a[i].name.ends_with(".phi");
    EXPECT_LE(relative_difference(a[i].values, b[i].values), is_phi ? 1e4 * tolerance : tolerance)
        << a[i].name;
  }
}

template <typename Result>
void expect_equal_runs(const Result& a, const Result& b) {
  EXPECT_LE(relative_difference(a.losses, b.losses), 1e-12) << "losses";
  expect_equal_weights(a.weights, b.weights, 1e-12);
  EXPECT_EQ(a.search.maps, b.search.maps);
  EXPECT_EQ(a.search.changed, b.search.changed);
  EXPECT_EQ(a.search.searches, b.search.searches);
  EXPECT_EQ(a.search.evaluations, b.search.evaluations);
  EXPECT_EQ(a.search.moves, b.search.moves);
  EXPECT_NEAR(a.search.loss_before, b.search.loss_before, 1e-12);
  EXPECT_NEAR(a.search.loss_after, b.search.loss_after, 1e-12);
}

struct RankCase {
  GateKind gate;
  PermSearch search;
  PermScope scope;
};
std::string case_name(const ::testing::TestParamInfo<RankCase>& test) {
  return std::string(gate_name(test.param.gate)) +
         (test.param.search == PermSearch::kSwap ? "_swap" : "_sinkhorn") +
         (test.param.scope == PermScope::kShared    ? ""
          : test.param.scope == PermScope::kPerGate ? "_per_gate"
                                                    : "_per_tree");
}

class SearchSameAtAnyRankCount : public ::testing::TestWithParam<RankCase> {};

TEST_P(SearchSameAtAnyRankCount, Domains) {
  const RankCase& c = GetParam();
  TrainOptions options = small_run(c.gate, c.search, c.scope);
  const RunResult reference = train_domains(comm::self_group(), fixture_data(), options);
  EXPECT_EQ(reference.losses.size(), size_t{12});
  ASSERT_EQ(reference.search.maps.size(), size_t{1});
  EXPECT_EQ(reference.search.maps[0].size(), size_t{c.scope == PermScope::kPerTree ? 16U : 8U});
  for (const int ranks : {1, 2, 4}) {
    for (const int64_t idle_ranks : {0, 1}) {
      if (idle_ranks >= ranks) continue;
      SCOPED_TRACE(std::to_string(ranks) + " ranks, " + std::to_string(idle_ranks) + " idle");
      options.idle_ranks = idle_ranks;
      expect_equal_runs(reference, run(ranks, options));
    }
  }
}

TEST_P(SearchSameAtAnyRankCount, Multi) {
  const RankCase& c = GetParam();
  MultiOptions options = small_multi(c.gate, c.search, c.scope);
  const MultiResult reference = run(1, options);
  EXPECT_EQ(reference.losses.size(), size_t{8});
  EXPECT_EQ(reference.search.maps.size(), size_t{c.scope == PermScope::kShared ? 1U : 2U});
  for (const int ranks : {2, 4}) {
    SCOPED_TRACE(std::to_string(ranks) + " ranks");
    options.train.idle_ranks = ranks == 4 ? 1 : 0;
    expect_equal_runs(reference, run(ranks, options));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Gates, SearchSameAtAnyRankCount,
    ::testing::Values(RankCase{GateKind::kTopK, PermSearch::kSwap, PermScope::kShared},
                      RankCase{GateKind::kDSelectK, PermSearch::kSwap, PermScope::kShared},
                      RankCase{GateKind::kComet, PermSearch::kSwap, PermScope::kShared},
                      RankCase{GateKind::kTopK, PermSearch::kSwap, PermScope::kPerGate},
                      RankCase{GateKind::kDSelectK, PermSearch::kSwap, PermScope::kPerTree},
                      RankCase{GateKind::kComet, PermSearch::kSwap, PermScope::kPerTree},
                      RankCase{GateKind::kTopK, PermSearch::kSinkhorn, PermScope::kShared},
                      RankCase{GateKind::kDSelectK, PermSearch::kSinkhorn, PermScope::kShared},
                      RankCase{GateKind::kComet, PermSearch::kSinkhorn, PermScope::kShared},
                      RankCase{GateKind::kComet, PermSearch::kSinkhorn, PermScope::kPerTree}),
    case_name);

TEST(OrderSearch, WhenSwapSearches) {
  TrainOptions options = small_run(GateKind::kTopK, PermSearch::kSwap);
  options.search.max_evaluations = 1;  // of the present order: counts searches
  const auto searches = [&](int64_t interval, double until) {
    options.search.interval = interval;
    options.search.permutation.until(until);
    const SearchResult search = run(1, options).search;
    EXPECT_EQ(search.evaluations, search.searches);
    EXPECT_EQ(search.moves, 0);
    EXPECT_EQ(search.changed, std::vector<int64_t>{0});
    return search.searches;
  };
  EXPECT_EQ(searches(4, .5), 2);   // before steps 0 and 4
  EXPECT_EQ(searches(4, .34), 2);  // 4 / 12 < .34
  EXPECT_EQ(searches(4, 1. / 3), 1);
  EXPECT_EQ(searches(5, 1), 3);
  EXPECT_EQ(searches(0, 1), 3);  // 3 epochs of 4 steps
  EXPECT_EQ(searches(1, 0), 0);
}

// Held batches of all training images, and a step too small to matter: their loss is that of a test
// on the training images.
TEST(OrderSearch, HeldLossIsTheMean) {
  DomainData domains = fixture_data();
  domains.test = domains.train;
  TrainOptions options = small_run(GateKind::kComet, PermSearch::kSwap);
  options.global_batch_size = 64;
  options.train_iters = 1;
  options.lr = 1e-30;
  options.search.held_batches = 4;
  options.search.max_evaluations = 1;
  const RunResult of_domains = on_ranks<RunResult>(
      2, [&](const comm::Group& world) { return train_domains(world, domains, options); });
  EXPECT_NEAR(of_domains.search.loss_before, of_domains.cross_entropy, 1e-12);
  EXPECT_EQ(of_domains.search.loss_after, of_domains.search.loss_before);

  MultiData pairs = fixture_pairs();
  pairs.validation = pairs.train;
  MultiOptions multi = small_multi(GateKind::kComet, PermSearch::kSwap, PermScope::kPerGate);
  multi.train.global_batch_size = 32;
  multi.train.train_iters = 1;
  multi.train.lr = 1e-30;
  multi.train.search = options.search;
  const MultiResult of_pairs = on_ranks<MultiResult>(
      2, [&](const comm::Group& world) { return train_multi(world, pairs, multi); });
  EXPECT_NEAR(of_pairs.search.loss_before, of_pairs.best().validation.mean_cross_entropy(), 1e-12);
}

double largest_difference(const std::vector<WeightDump>& a, const std::vector<WeightDump>& b,
                          const std::string& name) {
  double size = -1;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].name != name) continue;
    for (size_t j = 0; j < a[i].values.size(); ++j) {
      size = std::max(size, std::abs(a[i].values[j] - b[i].values[j]));
    }
  }
  return size;
}

TEST(OrderSearch, PhiIsTrained) {
  TrainOptions options = small_run(GateKind::kTopK, PermSearch::kSinkhorn);
  options.lr_decay = 0;
  options.gate_lr_factor = 7;
  const auto after = [&](int64_t steps, double soft_steps) {
    options.train_iters = steps;
    options.search.permutation.until(soft_steps / static_cast<double>(steps));
    return run(1, options).weights;
  };
  const std::vector<WeightDump> initial = after(1, 0);
  // Adam's first step is the learning rate.
  EXPECT_NEAR(largest_difference(initial, after(1, 1), "permutation_0.phi"), 1e-3, 1e-5);
  // Soft steps at the same shares of their stage; then nothing moves phi or the map.
  const std::vector<WeightDump> soft = after(4, 4);
  const std::vector<WeightDump> frozen = after(8, 4);
  EXPECT_GT(largest_difference(initial, soft, "permutation_0.phi"), 1e-3);
  EXPECT_EQ(largest_difference(soft, frozen, "permutation_0.phi"), 0);
  EXPECT_EQ(largest_difference(soft, frozen, "permutation_0.expert_map"), 0);
  EXPECT_GT(largest_difference(soft, frozen, "gate.weight"), 0);
}

TEST(OrderSearch, SoftStageIsReported) {
  TrainOptions options = small_run(GateKind::kTopK, PermSearch::kSinkhorn);
  options.aux_loss_coeff = 1e-2;
  options.log_interval = 4;  // after steps 1, 4, 8 and 12, of which 6 are soft
  std::vector<std::vector<std::string>> names;
  train_domains(comm::self_group(), fixture_data(), options, [&](const StepReport& report) {
    names.emplace_back();
    for (const NamedValue& loss : report.gate_losses) {
      names.back().push_back(loss.name);
      EXPECT_GT(loss.name == "permutation_loss" ? loss.value : 1, 0);
      EXPECT_NEAR(loss.name == "aux_loss" ? loss.value : 1.2, 1.2, .3);
    }
    EXPECT_TRUE(report.search.is_used());
  });
  // While every expert runs for every image there is no load to balance by the auxiliary loss.
  const std::vector<std::string> soft = {"permutation_loss", "balance_loss"};
  const std::vector<std::string> both = {"permutation_loss", "balance_loss", "aux_loss"};
  const std::vector<std::string> hard = {"balance_loss", "aux_loss"};
  EXPECT_EQ(names, (std::vector<std::vector<std::string>>{soft, soft, both, hard}));
}

TEST(OrderSearch, WeightsAreByExpert) {
  TrainOptions options = small_run(GateKind::kHash, PermSearch::kSwap);
  options.search.permutation.until(1);
  options.search.interval = 1;
  options.lr = 1e-2;
  const RunResult result = run(1, options);
  ASSERT_GT(result.search.changed[0], 0);
  // A hash gate gives each image one expert with weight 1.
  const std::vector<int64_t>& domains = fixture_data().test.domains;
  for (size_t e = 0; e < 8; ++e) {
    double images = 0;
    for (size_t d = 0; d < size_t{kNumDomains}; ++d) {
      images +=
          result.domain_expert[d * 8 + e] *
          static_cast<double>(std::count(domains.begin(), domains.end(), static_cast<int64_t>(d)));
    }
    EXPECT_NEAR(images, static_cast<double>(result.tokens_per_expert[e]), 1e-9);
  }
}

TrainOptions& train_of(TrainOptions& options) { return options; }
TrainOptions& train_of(MultiOptions& options) { return options.train; }

template <typename Options>
void expect_repair_changes_nothing(Options options, bool recovers) {
  const auto plain = run(1, options);
  EXPECT_TRUE(plain.search.repairs.empty());
  train_of(options).search.scramble = 4;
  const auto repaired = run(1, options);
  ASSERT_EQ(repaired.search.repairs.size(), size_t{4});
  for (const RepairTrial& trial : repaired.search.repairs) {
    EXPECT_GT(trial.scrambled_loss, 1.01 * repaired.search.trained_loss);
    EXPECT_LE(trial.loss, trial.scrambled_loss);
    EXPECT_GE(trial.evaluations, 2);
    EXPECT_LE(trial.evaluations, 64);
    EXPECT_EQ(trial.is_recovered, trial.loss <= repaired.search.trained_loss * (1 + 1e-6));
    EXPECT_TRUE(trial.is_recovered || !recovers);
  }
  EXPECT_NE(repaired.search.repairs[0].scrambled_loss, repaired.search.repairs[1].scrambled_loss);
  // The searches of the training are counted alone.
  EXPECT_EQ(plain.search.evaluations, repaired.search.evaluations);
  EXPECT_EQ(plain.search.maps, repaired.search.maps);
  EXPECT_EQ(plain.losses, repaired.losses);
  expect_equal_weights(plain.weights, repaired.weights, 0);
}

TEST(OrderSearch, Repair) {
  TrainOptions options = small_run(GateKind::kTopK, PermSearch::kSwap);
  options.train_iters = 40;
  options.lr = 8e-3;
  expect_repair_changes_nothing(options, true);
  options.gate = GateKind::kComet;
  options.search.permutation.scope(PermScope::kPerTree);
  expect_repair_changes_nothing(options, false);
  MultiOptions multi = small_multi(GateKind::kTopK, PermSearch::kSinkhorn, PermScope::kPerGate);
  multi.train.train_iters = 40;
  multi.train.lr = 2e-3;
  expect_repair_changes_nothing(multi, true);

  // Each rank scrambles alike.
  options.train_iters = 8;
  options.search.scramble = 2;
  const RunResult one = run(1, options);
  const RunResult two = run(2, options);
  for (size_t i = 0; i < 2; ++i) {
    const RepairTrial& a = one.search.repairs[i];
    const RepairTrial& b = two.search.repairs[i];
    EXPECT_NEAR(a.scrambled_loss, b.scrambled_loss, 1e-12);
    EXPECT_NEAR(a.loss, b.loss, 1e-12);
    EXPECT_EQ(a.evaluations, b.evaluations);
  }
}

TEST(OrderSearch, SingleIgnoresIt) {
  TrainOptions options = small_run(GateKind::kSingle, PermSearch::kSwap);
  options.search.scramble = 2;
  const RunResult with = run(1, options);
  EXPECT_FALSE(with.search.is_used());
  EXPECT_TRUE(with.search.repairs.empty());
  options.search = SearchOptions();
  const RunResult without = run(1, options);
  EXPECT_EQ(with.losses, without.losses);
  expect_equal_weights(with.weights, without.weights, 0);
}

SearchResult shown_search() {
  SearchResult search;
  search.searches = 2;
  search.evaluations = 52;
  search.moves = 1;
  search.loss_before = .53125;
  search.loss_after = .5;
  search.seconds = .25;
  search.maps = {{1, 0, 2}, {0, 1, 2}};
  search.changed = {2, 0};
  return search;
}

TEST(OrderSearch, Texts) {
  const SearchResult none;
  EXPECT_EQ(search_part(none), "");
  EXPECT_EQ(search_lines(none), "");
  EXPECT_EQ(search_text(TrainOptions(), {GateKind::kTopK}), "");
  SearchResult search = shown_search();
  EXPECT_EQ(search_part(search),
            " | 2 searches, 52 evaluations, 1 move, held 0.5312 -> 0.5000 | moved 2+0");
  EXPECT_EQ(
      search_lines(search),
      "\norder | 2 searches, 52 evaluations, 1 move, held 0.5312 -> 0.5000, 0.25 s | moved 2+0 "
      "of 6");
  search.trained_loss = .5;
  search.repairs = {{1, .5, 17, true}, {2, .75, 64, false}};
  const std::string lines = search_lines(search);
  EXPECT_NE(lines.find("\nscramble   1 | held 1.000000 -> 0.500000 | 17 evaluations | recovered\n"),
            std::string::npos)
      << lines;
  EXPECT_NE(
      lines.find("64 evaluations | not recovered\nrecovered 1 of 2, evaluations mean 40.5 and "
                 "max 64; held loss of the trained order 0.500000"),
      std::string::npos)
      << lines;
  SearchResult soft;
  soft.maps = {{0, 1}};
  soft.changed = {0};
  EXPECT_EQ(search_part(soft), " | moved 0");
  EXPECT_EQ(search_lines(soft), "\norder | moved 0 of 2");

  TrainOptions options = small_run(GateKind::kTopK, PermSearch::kSwap);
  EXPECT_EQ(search_text(options, {GateKind::kTopK}),
            "swap, shared, in the first 0.5 of the run, every 4 steps; at most 64 evaluations on 2 "
            "held batches");
  options = small_run(GateKind::kTopK, PermSearch::kSinkhorn, PermScope::kPerGate);
  EXPECT_EQ(search_text(options, {GateKind::kSingle, GateKind::kTopK}),
            "sinkhorn, per_gate, in the first 0.5 of the run; single has none");

  FinishedRun run{GateKind::kTopK, 0, {}};
  const std::string plain = final_table({run});
  EXPECT_EQ(plain.find("searches"), std::string::npos);
  const auto count = [](const JsonObject& object) {
    return std::count_if(object.begin(), object.end(), [](const JsonField& field) {
      return field.name.rfind("perm_", 0) == 0 || field.name.rfind("repair_", 0) == 0;
    });
  };
  EXPECT_EQ(count(result_json(run, options, 1)), 0);
  run.result.search = search;
  const std::string table = final_table({FinishedRun{GateKind::kSingle, 0, {}}, run});
  EXPECT_NE(table.find("| searches | evaluations | moves | held before | held after | moved |"),
            std::string::npos)
      << table;
  EXPECT_NE(table.find("|        2 |        52.0 |   1.0 |      0.5312 |     0.5000 |   2.0 |"),
            std::string::npos)
      << table;
  EXPECT_NE(table.find("|          |             |       |             |            |       |"),
            std::string::npos)
      << table;
  const JsonObject object = result_json(run, options, 1);
  EXPECT_EQ(count(object), 17);
  const std::string json = to_json(object);
  EXPECT_NE(json.find("\"perm_search\":\"sinkhorn\",\"perm_scope\":\"per_gate\""),
            std::string::npos)
      << json;
  EXPECT_NE(json.find("\"perm_changed\":[2,0],\"perm_map\":[1,0,2,0,1,2]"), std::string::npos)
      << json;
  EXPECT_NE(json.find("\"repair_evaluations\":[17,64],\"repair_recovered\":[1,0]"),
            std::string::npos)
      << json;

  MultiResult multi;
  multi.epochs.resize(1);
  multi.best_epoch = 1;
  EXPECT_EQ(final_table({FinishedMulti{GateKind::kTopK, 0, multi}}).find("searches"),
            std::string::npos);
  multi.search = search;
  const std::string two_tasks = final_table({FinishedMulti{GateKind::kTopK, 0, multi}});
  EXPECT_NE(two_tasks.find("|        2 |        52.0 |   1.0 |"), std::string::npos) << two_tasks;
}

TEST(OrderSearch, WrongSettings) {
  const auto text_of = [](const TrainOptions& options) {
    return error_text<ConfigError>([&] { run(2, options); });
  };
  const auto expect_text = [&](const TrainOptions& options, const std::string& part) {
    const std::string text = text_of(options);
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  for (const GateKind gate : {GateKind::kTopK, GateKind::kHash, GateKind::kDense}) {
    expect_text(small_run(gate, PermSearch::kSwap, PermScope::kPerTree),
                "permutation.scope=per_tree needs gates with trees or selectors");
  }
  TrainOptions options = small_run(GateKind::kTopK, PermSearch::kSwap);
  options.search.held_batches = 5;  // 256 images are 4 batches of 58
  expect_text(options, "search.held_batches=5 is out of range; choose 1 to 4");
  options.search.held_batches = 0;
  expect_text(options, "search.held_batches=0");
  options = small_run(GateKind::kTopK, PermSearch::kSwap);
  options.search.max_evaluations = 0;
  expect_text(options, "search.max_evaluations=0");
  options.search = SearchOptions();
  options.search.scramble = 1;
  expect_text(options, "search.scramble=1 needs a search over orders");
  options.search.scramble = -1;
  expect_text(options, "search.scramble=-1");
  options.search = SearchOptions();
  options.search.interval = -1;
  expect_text(options, "search.interval=-1");
  options = small_run(GateKind::kTopK, PermSearch::kSinkhorn);
  options.search.permutation.until(1.5);
  expect_text(options, "permutation.until=1.5");
}

CommandLine parse(std::vector<const char*> flags) {
  flags.insert(flags.begin(), "train_fashion");
  return parse_command_line(static_cast<int>(flags.size()), flags.data());
}

TEST(OrderSearch, CommandLines) {
  const CommandLine line =
      parse({"--gate", "comet", "--perm-search", "swap", "--perm-scope", "per_tree", "--perm-until",
             ".25", "--perm-held-batches", "3", "--perm-max-evaluations", "9", "--perm-interval",
             "7", "--perm-scramble", "5"});
  ASSERT_TRUE(line.run) << line.text;
  const SearchOptions& search = line.options.train.search;
  EXPECT_EQ(search.permutation.search(), PermSearch::kSwap);
  EXPECT_EQ(search.permutation.scope(), PermScope::kPerTree);
  EXPECT_EQ(search.permutation.until(), .25);
  EXPECT_EQ(search.held_batches, 3);
  EXPECT_EQ(search.max_evaluations, 9);
  EXPECT_EQ(search.interval, 7);
  EXPECT_EQ(search.scramble, 5);
  const SearchOptions defaults = parse({}).options.train.search;
  EXPECT_EQ(defaults.permutation.search(), PermSearch::kNone);
  EXPECT_EQ(defaults.permutation.until(), .1);
  EXPECT_EQ(defaults.held_batches, 4);
  EXPECT_EQ(defaults.max_evaluations, 64);
  EXPECT_TRUE(parse({"--task", "multi", "--perm-search", "sinkhorn", "--perm-scramble", "1",
                     "--perm-held-batches", "2"})
                  .run);

  const auto expect_refused = [](const std::vector<const char*>& flags, const char* text) {
    const CommandLine refused = parse(flags);
    EXPECT_EQ(refused.exit_code, 64);
    EXPECT_FALSE(refused.run);
    EXPECT_NE(refused.text.find(text), std::string::npos) << refused.text;
  };
  expect_refused({"--perm-search", "gumbel"}, "{none,sinkhorn,swap}");
  expect_refused({"--perm-scope", "per_gate"},
                 "--perm-scope: needs --perm-search sinkhorn or swap");
  expect_refused({"--perm-scramble", "2"}, "--perm-scramble: needs --perm-search sinkhorn or swap");
  expect_refused({"--perm-search", "sinkhorn", "--perm-interval", "2"},
                 "--perm-interval: needs --perm-search swap");
  expect_refused({"--perm-search", "sinkhorn", "--perm-held-batches", "2"},
                 "--perm-held-batches: needs --perm-search swap, or --perm-scramble");
  expect_refused({"--perm-search", "swap", "--perm-until", "1.5"}, "value 1.5 is out of range");
  expect_refused({"--gate", "all", "--perm-search", "swap", "--perm-scope", "per_tree"},
                 "per_tree needs gates with trees or selectors, dselectk or comet, but hash has "
                 "none; choose shared or per_gate");

  // Every setting of the search is one that ranks must share.
  const uint32_t hash = config_hash(parse({"--perm-search", "swap"}).options);
  for (const std::vector<const char*>& more :
       {std::vector<const char*>{"--perm-search", "sinkhorn"},
        {"--perm-search", "swap", "--perm-scope", "per_gate"},
        {"--perm-search", "swap", "--perm-until", ".2"},
        {"--perm-search", "swap", "--perm-held-batches", "2"},
        {"--perm-search", "swap", "--perm-max-evaluations", "2"},
        {"--perm-search", "swap", "--perm-interval", "2"},
        {"--perm-search", "swap", "--perm-scramble", "2"}}) {
    EXPECT_NE(config_hash(parse(more).options), hash);
  }
}

}  // namespace
}  // namespace perseid::examples
