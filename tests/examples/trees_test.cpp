// Trees of a COMET gate: counted, written, drawn.
//   CountsAreTheGates  split nodes, saturated ones and leaves against the gate's own statistics
//   OneExpert          a tree that is its leaf
//   ExpertOfNodes      leaves in left-first order, numbers of experts that are no power of two
//   Dot                a tree by hand: labels, widths, colours; names cannot break out of a label
//   DotIsAccepted      Graphviz reads the text, where it is installed
//   WrongRuns          counts that contradict each other, and files without such a run
#include <gtest/gtest.h>

#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <numeric>

#include "comm/group.h"
#include "examples/inspect/tree_dot.h"
#include "examples/train_fashion/trees.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

int64_t sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

TEST(Trees, CountsAreTheGates) {
  constexpr int64_t kDomains = 3;
  at::manual_seed(1);
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    for (const int64_t E : {2, 5, 8}) {
      for (const int64_t K : {1, 2}) {
        SCOPED_TRACE(testing::Message() << "E " << E << " K " << K);
        gates::CometGate gate(gates::CometGateOptions(6, E).top_k(K));
        gate.split_weight.detach().mul_(150);  // so that some switches are saturated, not all
        gate.to(type);
        const at::Tensor tokens = at::randn({101, 6}, type);
        const at::Tensor domains = at::randint(kDomains, {101}, at::kLong);
        TreeCounter counter(gate, kDomains);
        counter.add(tokens.narrow(0, 0, 40), domains.narrow(0, 0, 40));
        counter.add(tokens.narrow(0, 40, 61), domains.narrow(0, 40, 61));
        counter.add(tokens.narrow(0, 0, 0), domains.narrow(0, 0, 0));
        const TreeCounts counts = counter.total(comm::self_group());

        gates::GateInput input;
        input.tokens = tokens;
        const gates::GateStats stats = gate.forward(input).stats;
        ASSERT_GT(stats.saturated_nodes, 0);
        ASSERT_LT(stats.saturated_nodes, stats.num_nodes);
        ASSERT_EQ(counts.num_trees, K);
        const int64_t num_nodes = 2 * E - 1;
        const std::vector<int64_t> experts = expert_of_nodes(E);
        std::vector<int64_t> per_expert(static_cast<size_t>(E), 0);
        int64_t split_nodes = 0;
        for (int64_t i = 0; i < K * num_nodes; ++i) {
          const auto first = counts.reached.begin() + i * kDomains;
          const int64_t images = std::accumulate(first, first + kDomains, int64_t{0});
          if (i % num_nodes == 0) {
            EXPECT_EQ(images, 101);
          }
          const int64_t expert = experts[static_cast<size_t>(i % num_nodes)];
          (expert < 0 ? split_nodes : per_expert[static_cast<size_t>(expert)]) += images;
        }
        EXPECT_EQ(split_nodes, stats.num_nodes);
        EXPECT_EQ(sum(counts.left) + sum(counts.right), stats.saturated_nodes);
        if (K == 1) {  // an expert has one leaf
          for (int64_t e = 0; e < E; ++e) {
            EXPECT_EQ(per_expert[static_cast<size_t>(e)],
                      stats.tokens_per_expert[e].item<int64_t>());
          }
        }
      }
    }
  }
}

TEST(Trees, OneExpert) {
  const gates::CometGate gate(gates::CometGateOptions(6, 1).top_k(1));
  TreeCounter counter(gate, 2);
  counter.add(at::randn({3, 6}), at::tensor({1, 0, 1}, at::kLong));
  const TreeCounts counts = counter.total(comm::self_group());
  EXPECT_EQ(counts.reached, (std::vector<int64_t>{1, 2}));
  EXPECT_TRUE(counts.left.empty());
}

TEST(Trees, ExpertOfNodes) {
  using Ids = std::vector<int64_t>;
  EXPECT_EQ(expert_of_nodes(1), (Ids{0}));
  EXPECT_EQ(expert_of_nodes(2), (Ids{-1, 0, 1}));
  EXPECT_EQ(expert_of_nodes(3), (Ids{-1, -1, 2, 0, 1}));
  EXPECT_EQ(expert_of_nodes(5), (Ids{-1, -1, -1, -1, 2, 3, 4, 0, 1}));
  EXPECT_EQ(expert_of_nodes(8), (Ids{-1, -1, -1, -1, -1, -1, -1, 0, 1, 2, 3, 4, 5, 6, 7}));
}

/// 200 images: 100 go left only, 60 right only, 40 both ways; expert 2 gets none.
TreeRun hand_made_run() {
  TreeRun run;
  run.seed = 4;
  run.num_experts = 3;
  run.num_trees = 1;
  run.domains = {"plain", "<b>&"};
  run.reached = {150, 50, 10, 50, 140, 0, 10, 50, 0, 0};
  run.left = {60, 60};
  run.right = {140, 0};
  return run;
}

std::string line_of(const std::string& dot, const std::string& start) {
  const size_t at = dot.find(start);
  return at == std::string::npos ? "" : dot.substr(at, dot.find('\n', at) - at);
}

TEST(Trees, Dot) {
  const std::string dot = tree_dot(hand_made_run());
  const auto expect_in = [](const std::string& line, std::vector<const char*> parts) {
    for (const char* part : parts) EXPECT_NE(line.find(part), std::string::npos) << line;
  };
  EXPECT_EQ(dot.rfind("digraph comet {\n", 0), size_t{0});
  EXPECT_NE(dot.find("seed 4"), std::string::npos);
  EXPECT_NE(dot.find("1 tree, 3 experts, 200 test images"), std::string::npos) << dot;
  expect_in(line_of(dot, "t0n0 ["), {"← 30 %", "70 % →", "both 0 %", "rounded", "#4C78A8"});
  expect_in(line_of(dot, "t0n1 ["), {"← 100 %", "0 % →", "rounded", "#F58518"});
  expect_in(line_of(dot, "t0n2 ["), {"expert 2", "70 % of images", "plain 100 %", "#4C78A8"});
  expect_in(line_of(dot, "t0n3 ["),
            {"expert 0", "30 % of images", "&lt;b&gt;&amp; 83 %<br/>plain 17 %", "width=\"80\"",
             "width=\"16\""});
  expect_in(line_of(dot, "t0n4 ["), {"expert 1", "0 % of images", "#BBBBBB"});
  EXPECT_EQ(dot.find("<b>&"), std::string::npos);
  expect_in(line_of(dot, "t0n0 -> t0n1 "), {"penwidth=3.7", "#F58518"});
  expect_in(line_of(dot, "t0n0 -> t0n2 "), {"penwidth=7.3", "#4C78A8"});
  expect_in(line_of(dot, "t0n1 -> t0n4 "), {"dotted"});
}

// Of a run with an order of its own the leaves are those experts.
TEST(Trees, DotOfAnOrder) {
  const std::string path = ::testing::TempDir() + "perseid_order.jsonl";
  const auto dot_of = [&](int64_t num_trees, const char* scope, const std::vector<int64_t>& map) {
    TreeRun run = hand_made_run();
    JsonObject object = {{"gate", std::string("comet")},
                         {"seed", int64_t{4}},
                         {"num_experts", int64_t{3}},
                         {"top_k", num_trees},
                         {"domains", run.domains},
                         {"perm_scope", std::string(scope)},
                         {"perm_map", map}};
    for (auto& [name, counts] :
         {std::pair("tree_reached", run.reached), std::pair("tree_left", run.left),
          std::pair("tree_right", run.right)}) {
      std::vector<int64_t> all;
      for (int64_t tree = 0; tree < num_trees; ++tree) {
        all.insert(all.end(), counts.begin(), counts.end());
      }
      object.push_back({name, all});
    }
    JsonLines(path).write(object);
    return tree_dot(read_tree_run(path, std::nullopt));
  };
  const auto expect_experts = [](const std::string& dot, std::vector<const char*> leaves) {
    size_t i = 0;
    for (const char* leaf : leaves) {
      const std::string line = line_of(dot, leaf);
      EXPECT_NE(line.find("expert " + std::string(1, "201120"[i++]) + "<"), std::string::npos)
          << line;
    }
  };
  // Leaves 0, 1 and 2 are nodes 3, 4 and 2.
  expect_experts(dot_of(1, "shared", {2, 0, 1}), {"t0n3 [", "t0n4 [", "t0n2 ["});
  expect_experts(dot_of(2, "per_tree", {2, 0, 1, 1, 2, 0}),
                 {"t0n3 [", "t0n4 [", "t0n2 [", "t1n3 [", "t1n4 [", "t1n2 ["});
  EXPECT_EQ(dot_of(2, "shared", {2, 0, 1}), dot_of(2, "per_tree", {2, 0, 1, 2, 0, 1}));
  const std::string text = error_text<DataError>([&] { dot_of(1, "per_tree", {2, 0, 3}); });
  EXPECT_NE(text.find("perm_map"), std::string::npos) << text;
}

TEST(Trees, DotIsAccepted) {
  if (std::system("dot -V >/dev/null 2>&1") != 0) GTEST_SKIP() << "Graphviz is not installed";
  const std::string path = ::testing::TempDir() + "perseid_tree.dot";
  TreeRun one_leaf;
  one_leaf.domains = {"plain"};
  one_leaf.reached = {0};
  for (const TreeRun& run : {hand_made_run(), one_leaf}) {
    std::ofstream(path) << tree_dot(run);
    // Graphviz says what it does not like, but returns 0 for errors in labels.
    EXPECT_EQ(std::system(("test -z \"$(dot -Tsvg -o /dev/null '" + path + "' 2>&1)\"").c_str()), 0)
        << tree_dot(run);
  }
}

TEST(Trees, WrongRuns) {
  const std::string path = ::testing::TempDir() + "perseid_trees.jsonl";
  const JsonObject good = {
      {"gate", std::string("comet")},       {"seed", int64_t{4}},
      {"num_experts", int64_t{3}},          {"top_k", int64_t{1}},
      {"domains", hand_made_run().domains}, {"tree_reached", hand_made_run().reached},
      {"tree_left", hand_made_run().left},  {"tree_right", hand_made_run().right}};
  const auto write = [&](const JsonObject& object) {
    JsonLines lines(path);
    lines.write({{"gate", std::string("topk")}, {"seed", int64_t{4}}});
    lines.write(object);
  };
  write(good);
  EXPECT_EQ(tree_dot(read_tree_run(path, std::nullopt)), tree_dot(hand_made_run()));
  EXPECT_EQ(read_tree_run(path, 4).seed, 4);
  std::string text = error_text<DataError>([&] { read_tree_run(path, 5); });
  EXPECT_NE(text.find("no COMET run of seed 5"), std::string::npos) << text;

  using Ids = std::vector<int64_t>;
  struct Case {
    JsonField field;
    const char* words;
  };
  for (const Case& c : std::vector<Case>{
           {{"num_experts", int64_t{0}}, "\"num_experts\" is 0"},
           {{"num_experts", int64_t{4097}}, "\"num_experts\" is 4097"},
           {{"num_experts", int64_t{4}}, "\"tree_reached\" has 10 numbers where 14 belong"},
           {{"top_k", int64_t{4}}, "\"top_k\" is 4"},
           {{"domains", std::vector<std::string>(65, "x")}, "\"domains\" has not 1 to 64"},
           {{"domains", std::vector<std::string>{"x", std::string(65, 'x')}}, "above 64 bytes"},
           {{"tree_reached", Ids{150, 50, 10, 51, 140, 0, 10, 50, 0, 0}}, "than above it"},
           {{"tree_reached", Ids{150, 50, 10, 50, 140, 0, 10, 50, 0, -1}}, "has -1"},
           {{"tree_reached", Ids{150, 50, 10, 50, 140, 0, 10, 50, 0, int64_t{1} << 51}}, "outside"},
           {{"tree_left", Ids{61, 60}}, "more images than reach"},
           {{"tree_left", Ids{60}}, "has 1 numbers where 2 belong"},
           {{"tree_right", Ids{140, 1}}, "more images than reach"}}) {
    JsonObject bad = good;
    std::find_if(bad.begin(), bad.end(), [&](const JsonField& field) {
      return field.name == c.field.name;
    })->value = c.field.value;
    write(bad);
    text = error_text<DataError>([&] { read_tree_run(path, std::nullopt); });
    EXPECT_NE(text.find(path + ":2"), std::string::npos) << text;
    EXPECT_NE(text.find(c.words), std::string::npos) << text;
  }
  for (size_t i = 1; i < good.size(); ++i) {
    JsonObject bad = good;
    bad.erase(bad.begin() + static_cast<std::ptrdiff_t>(i));
    write(bad);
    text = error_text<DataError>([&] { read_tree_run(path, std::nullopt); });
    EXPECT_NE(text.find("\"" + good[i].name + "\" is missing"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace perseid::examples
