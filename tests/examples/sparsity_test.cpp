// Sparse experts of train_fashion.
//   Flags       values, defaults, and what is refused with a flag and a reason
//   Config      exact densities, schedules of each method
//   Groups      methods that keep N of M, experts with a hidden layer, padded images
//   AnyRanks    a few steps with each method in one process, on 2 and 4 threads as ranks, with
//               replicas: masks are equal, losses to 1e-12; the density is exact
//   Multi       the same for two tasks on shared modules
//   Texts       lines, tables and JSON with sparse experts, and none of it without
#include "examples/train_fashion/sparsity.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <map>
#include <mutex>

#include "examples/train_fashion/multi_report.h"
#include "examples/train_fashion/options.h"
#include "examples/train_fashion/report.h"
#include "examples/train_fashion/sparsity_report.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

CommandLine line_of(std::vector<const char*> flags) {
  flags.insert(flags.begin(), "train_fashion");
  return parse_command_line(static_cast<int>(flags.size()), flags.data());
}

TEST(Sparsity, Flags) {
  const CommandLine plain = line_of({});
  EXPECT_EQ(plain.options.train.sparsity.method, SparseMethod::kNone);
  EXPECT_EQ(plain.options.train.sparsity.sparsity, 0);
  const CommandLine line =
      line_of({"--dst", "rigl", "--sparsity", ".9", "--dst-every", "7", "--dst-alpha", "0.25"});
  ASSERT_TRUE(line.run) << line.text;
  const SparsityOptions& sparsity = line.options.train.sparsity;
  EXPECT_EQ(sparsity.method, SparseMethod::kRigl);
  EXPECT_EQ(sparsity.sparsity, 0.9);
  EXPECT_EQ(sparsity.every, 7);
  EXPECT_EQ(sparsity.alpha, 0.25);
  EXPECT_TRUE(line_of({"--task", "multi", "--dst", "static", "--sparsity", "0.5"}).run);

  struct Case {
    std::vector<const char*> flags;
    std::vector<const char*> parts;
  };
  for (const Case& c : std::vector<Case>{
           {{"--sparsity", "1"}, {"--sparsity", "value 1", "0 to 0.9999"}},
           {{"--sparsity", "-0.1"}, {"--sparsity", "value -0.1", "0 to 0.9999"}},
           {{"--sparsity", "0.5"}, {"--sparsity", "needs --dst static, set or rigl"}},
           {{"--dst", "set"}, {"--dst", "set needs --sparsity above 0"}},
           {{"--dst", "srigl"}, {"--dst", "srigl", "{none,static,set,rigl,nm_dst,"}},
           {{"--dst-every", "5"}, {"--dst-every", "needs --dst set, rigl or nm_dst"}},
           {{"--dst-nm", "1:4"}, {"--dst-nm", "needs --dst nm_dst"}},
           {{"--dst", "srste", "--dst-nm", "4:1"}, {"--dst-nm", "value 4:1", "1 <= N <= M"}},
           {{"--dst", "srste", "--dst-nm", "1/8"}, {"--dst-nm", "value 1/8", "such as 1:8"}},
           {{"--dst", "srste", "--dst-nm", "1:8x"}, {"--dst-nm", "value 1:8x"}},
           {{"--dst", "srste", "--sparsity", ".5"}, {"--sparsity", "needs --dst static"}},
           {{"--dst", "srste", "--dst-alpha", ".5"}, {"--dst-alpha", "needs --dst set"}},
           {{"--task", "multi", "--dst", "srste"}, {"--dst", "srste needs --task domains"}},
           {{"--task", "multi", "--d-ff", "8"}, {"--d-ff", "needs --task domains"}},
           {{"--dst", "static", "--sparsity", ".5", "--dst-alpha", ".1"},
            {"--dst-alpha", "needs --dst set, rigl or nm_dst"}},
           {{"--dst", "set", "--sparsity", ".5", "--dst-alpha", "2"},
            {"--dst-alpha", "value 2", "0 to 1"}},
           {{"--dst", "set", "--sparsity", ".5", "--dst-every", "0"},
            {"--dst-every", "value 0", "1 to"}},
           {{"--task", "multi", "--experts", "conv", "--dst", "rigl", "--sparsity", ".5"},
            {"--dst", "rigl needs --experts mlp"}}}) {
    const CommandLine refused = line_of(c.flags);
    EXPECT_FALSE(refused.run);
    EXPECT_EQ(refused.exit_code, 64);
    for (const char* part : c.parts) {
      EXPECT_NE(refused.text.find(part), std::string::npos) << part << " in " << refused.text;
    }
  }
  // Each setting counts for the agreement of ranks.
  std::map<uint32_t, int> hashes;
  for (const std::vector<const char*>& flags :
       {std::vector<const char*>{"--dst", "set", "--sparsity", ".5"},
        {"--dst", "rigl", "--sparsity", ".5"},
        {"--dst", "rigl", "--sparsity", ".6"},
        {"--dst", "rigl", "--sparsity", ".6", "--dst-every", "9"},
        {"--dst", "rigl", "--sparsity", ".6", "--dst-alpha", ".2"},
        {"--dst", "srste"},
        {"--dst", "srste", "--dst-nm", "2:8"},
        {"--dst", "srste", "--d-ff", "8"},
        {"--dst", "srste", "--pad-images"}}) {
    const CommandLine each = line_of(flags);
    EXPECT_TRUE(each.run) << each.text;
    ++hashes[config_hash(each.options)];
  }
  EXPECT_EQ(hashes.size(), 9u);
}

SparsityOptions sparsity_of(SparseMethod method) { return {.8, method, 3, .3}; }

/// Of each mask the places that are active.
std::map<std::string, std::vector<double>> masks_of(const std::vector<WeightDump>& dumps) {
  std::map<std::string, std::vector<double>> masks;
  for (const WeightDump& dump : dumps) {
    if (dump.name.rfind("mask of ", 0) == 0) masks[dump.name] = dump.values;
  }
  return masks;
}

TEST(Sparsity, Config) {
  TrainOptions options;
  options.sparsity = {.9, SparseMethod::kRigl, 20, .25};
  options.seed = 3;
  SparsifierConfig config = sparsifier_config(options, 400);
  EXPECT_EQ(config.budget.density, Density::ratio(1, 10));
  EXPECT_EQ(config.rule.grow, GrowCriterion::kGrad);
  EXPECT_EQ(config.schedule.begin, 20);
  EXPECT_EQ(config.schedule.end_step(), 300);
  EXPECT_EQ(config.schedule.alpha, .25);
  EXPECT_EQ(config.seed, 3u);
  options.sparsity.method = SparseMethod::kSet;
  config = sparsifier_config(options, 400);
  EXPECT_EQ(config.rule.drop, DropCriterion::kSetSigned);
  EXPECT_EQ(config.order, UpdateOrder::kAfterStep);
  options.sparsity.method = SparseMethod::kStatic;
  EXPECT_EQ(sparsifier_config(options, 400).schedule.end_step(), 0);
  options.sparsity.n_of_m = {2, 16};
  options.sparsity.method = SparseMethod::kNmDst;
  config = sparsifier_config(options, 400);
  EXPECT_EQ(config.structure.group_keep, 2);
  EXPECT_EQ(config.structure.group, 16);
  EXPECT_EQ(config.schedule.begin, 20);
  options.sparsity.method = SparseMethod::kMdGfLin;
  config = sparsifier_config(options, 400);
  EXPECT_EQ(inactive_factor(config.forward, 100), .5);
  EXPECT_EQ(inactive_factor(config.forward, 200), 0);
  options.sparsity.method = SparseMethod::kMdGfExp;
  config = sparsifier_config(options, 400);
  EXPECT_NEAR(inactive_factor(config.forward, 200), .1, 1e-3);
  EXPECT_EQ(inactive_factor(config.forward, 360), 0);
}

// Experts with a hidden layer: a step of every method, and what is left in the test is N:M.
TEST(Sparsity, Groups) {
  for (const SparseMethod method :
       {SparseMethod::kNmDst, SparseMethod::kSrSte, SparseMethod::kMdGfLin, SparseMethod::kMdGfExp,
        SparseMethod::kSdGfStep, SparseMethod::kSdGfGeo}) {
    SCOPED_TRACE(sparse_method_name(method));
    TrainOptions options;
    options.d_ff = 64;
    options.pad_images = true;
    options.global_batch_size = 58;
    options.train_iters = 24;
    options.sparsity.method = method;
    options.sparsity.every = 3;
    const RunResult result = train_domains(comm::self_group(), fixture_data(), options);
    EXPECT_EQ(result.sparsity.size, 8 * (1024 * 64 + 64 * 10));
    EXPECT_EQ(result.sparsity.nnz * 8, result.sparsity.size);
    EXPECT_LT(result.losses.back(), result.losses.front());
    if (method != SparseMethod::kNmDst) {
      EXPECT_GT(result.sparsity.itop_rate, .13);
    }
    for (const auto& [name, mask] : masks_of(result.weights)) {
      for (size_t group = 0; group < mask.size(); group += 8) {
        double kept = 0;
        for (size_t i = group; i < group + 8; ++i) kept += mask[i];
        ASSERT_EQ(kept, 1) << name;
      }
    }
  }
}

/// Of rank 0, where losses and masks are those of all.
template <typename Result, typename Run>
Result on_ranks(int num_ranks, Run&& run) {
  Result result;
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    const Result mine = run(world);
    if (world.rank() == 0) result = mine;
  });
  return result;
}

template <typename Result>
void expect_same(const Result& a, const Result& b) {
  EXPECT_LE(relative_difference(a.losses, b.losses), 1e-12);
  EXPECT_EQ(masks_of(a.weights), masks_of(b.weights));
  EXPECT_EQ(a.sparsity.nnz, b.sparsity.nnz);
  EXPECT_EQ(a.sparsity.num_updates, b.sparsity.num_updates);
  EXPECT_EQ(a.sparsity.num_skipped, b.sparsity.num_skipped);
  EXPECT_NEAR(a.sparsity.churn, b.sparsity.churn, 1e-12);
  EXPECT_EQ(a.sparsity.itop_rate, b.sparsity.itop_rate);
}

TEST(Sparsity, AnyRanks) {
  at::set_num_threads(1);
  for (const SparseMethod method :
       {SparseMethod::kStatic, SparseMethod::kSet, SparseMethod::kRigl}) {
    SCOPED_TRACE(sparse_method_name(method));
    TrainOptions options;
    options.dtype = kernels::DType::kFloat64;
    options.global_batch_size = 58;
    options.train_iters = 16;
    options.sparsity = sparsity_of(method);
    const auto run = [&](const comm::Group& world) {
      return train_domains(world, fixture_data(), options);
    };
    const RunResult one = on_ranks<RunResult>(1, run);
    EXPECT_EQ(one.sparsity.size, 8 * 7840);
    EXPECT_EQ(one.sparsity.nnz, 8 * 1568);  // exactly a fifth
    EXPECT_EQ(masks_of(one.weights).size(), 8u);
    if (method == SparseMethod::kStatic) {
      EXPECT_EQ(one.sparsity.num_updates, 0);
      EXPECT_EQ(one.sparsity.itop_rate, .2);
    } else {
      EXPECT_GT(one.sparsity.num_updates, 8);
      EXPECT_GT(one.sparsity.churn, .05);
      EXPECT_GT(one.sparsity.itop_rate, .25);
    }
    for (const WeightDump& dump : one.weights) {
      if (dump.name != "experts.weight") continue;
      int64_t num_zeros = 0;
      for (const double value : dump.values) num_zeros += value == 0 ? 1 : 0;
      EXPECT_GE(num_zeros, 8 * 6272);
    }
    for (const int num_ranks : {2, 4}) {
      options.ep_size = 0;
      expect_same(on_ranks<RunResult>(num_ranks, run), one);
    }
    options.ep_size = 2;
    options.idle_ranks = 1;
    expect_same(on_ranks<RunResult>(4, run), one);
    EXPECT_LT(one.losses.back(), one.losses.front());
  }
}

TEST(Sparsity, Multi) {
  at::set_num_threads(1);
  const MultiData data =
      make_multi(load_fashion_mnist(fixture_folder()), Protocol::kSmall, /*data_seed=*/0);
  MultiOptions options = multi_defaults(Protocol::kSmall);
  options.train.dtype = kernels::DType::kFloat64;
  options.train.global_batch_size = 58;
  options.train.train_iters = 8;
  options.train.sparsity = sparsity_of(SparseMethod::kRigl);
  const auto run = [&](const comm::Group& world) { return train_multi(world, data, options); };
  const MultiResult one = on_ranks<MultiResult>(1, run);
  EXPECT_EQ(one.sparsity.size, 6 * (1296 * 64 + 64 * 50));
  EXPECT_EQ(one.sparsity.nnz, (one.sparsity.size + 2) / 5);
  EXPECT_GT(one.sparsity.num_updates, 6);
  expect_same(on_ranks<MultiResult>(2, run), one);
}

TEST(Sparsity, Texts) {
  TrainOptions options;
  RunResult result;
  result.curve.resize(1);
  result.tokens_per_expert = {1};
  const auto json = [&] { return to_json(result_json({GateKind::kTopK, 7, result}, options, 2)); };
  EXPECT_EQ(sparsity_text(options), "");
  EXPECT_EQ(sparsity_line(result.sparsity), "");
  EXPECT_EQ(json().find("itop"), std::string::npos);
  EXPECT_EQ(final_table({{GateKind::kTopK, 7, result}}).find("ITOP"), std::string::npos);

  options.sparsity = {.9, SparseMethod::kRigl, 20, .25};
  result.sparsity = {100, 1000, 30, 2, .212, .462};
  EXPECT_EQ(sparsity_text(options),
            "rigl, 0.9 of the weights are 0; 0.25 of the others move every 20 steps");
  EXPECT_EQ(sparsity_line(result.sparsity),
            "\nsparse | density 0.1000 | 30 updates, 2 skipped | churn 0.212 | ever active 0.46");
  for (const char* part :
       {"\"dst\":\"rigl\"", "\"sparsity\":0.9", "\"dst_every\":20", "\"density\":0.1",
        "\"nnz\":100", "\"dst_churn\":0.212", "\"itop_rate\":0.462"}) {
    EXPECT_NE(json().find(part), std::string::npos) << part << " in " << json();
  }
  EXPECT_NE(result_line({GateKind::kTopK, 7, result}).find("\nsparse | density 0.1000"),
            std::string::npos);
  const std::string table = final_table({{GateKind::kTopK, 7, result}});
  for (const char* part : {"density", "churn", "ITOP rate", "0.1000", "0.212"}) {
    EXPECT_NE(table.find(part), std::string::npos) << part << " in " << table;
  }
  options.sparsity.method = SparseMethod::kStatic;
  EXPECT_EQ(sparsity_text(options), "static, 0.9 of the weights are 0");
}

}  // namespace
}  // namespace perseid::examples
