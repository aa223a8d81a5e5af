// Tables for hash gates.
//   BalancedExample      by hand: falling frequency, lightest expert, ties to smaller ids
//   BalancedBound        loads differ by at most the largest frequency, 200 random tables with ties
//   BalancedUnseen       keys of frequency 0 go where the hash sends them
//   ClusteredBlobs       blobs far apart become experts, whole
//   ClusteredIsStable    every key is nearest to the mean of its own cluster
//   ClusteredEdges       fewer different keys than experts, one expert, one key, equal features
//   DispersedBound       numbers of keys of each cluster and of all differ by at most 1
//   DispersedOrder       members are not dealt in the order of their ids
//   Deterministic        same bits for a seed and any number of threads; seeds differ
//   ThroughTheGate       a built table is what HashGate uses
#include "gates/hash_tables.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <functional>
#include <map>

#include "gates/hash_gate.h"
#include "kernels/hash.h"
#include "kernels/parallel.h"
#include "tests/gates/gate_test.h"

namespace perseid::testing {
namespace {

using gates::balanced_hash_table;
using gates::clustered_hash_table;
using gates::dispersed_hash_table;
using Ids = std::vector<int64_t>;

Tensor keyed_integers(int64_t count, uint64_t seed, int64_t bound) {
  return random_tensor({count}, seed, 0, static_cast<double>(bound)).floor().to(at::kLong);
}

int64_t spread(const Ids& loads) {
  const auto [least, most] = std::minmax_element(loads.begin(), loads.end());
  return *most - *least;
}

/// Sums of `amounts` by expert.
Ids loads_of(const Tensor& table, const Ids& amounts, int64_t num_experts) {
  Ids loads(static_cast<size_t>(num_experts), 0);
  const Ids experts = ids_of(table);
  for (size_t key = 0; key < experts.size(); ++key) loads.at(experts[key]) += amounts[key];
  return loads;
}

TEST(HashTables, BalancedExample) {
  // Order of keys: 2 (9), 0 (5), 4 (5), 1 (3), 5 (3), 3 (1).
  const Tensor table = balanced_hash_table(at::tensor({5, 3, 9, 1, 5, 3}, at::kInt), 3);
  EXPECT_EQ(table.scalar_type(), at::kInt);
  EXPECT_EQ(ids_of(table), (Ids{1, 1, 0, 1, 2, 2}));
}

TEST(HashTables, BalancedBound) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const int64_t E = Ids{1, 2, 3, 8, 64}[seed % 5];
    const int64_t V = Ids{1, 7, 100, 501}[seed % 4];
    const int64_t bound = seed % 3 == 0 ? 3 : 1000;
    Tensor frequencies = keyed_integers(V, seed, bound);
    if (seed % 7 == 0) frequencies[V / 2] = 50 * bound;  // one key heavier than an equal share
    const Ids amounts = ids_of(frequencies);
    const Ids loads = loads_of(balanced_hash_table(frequencies, E, seed), amounts, E);
    EXPECT_LE(spread(loads), *std::max_element(amounts.begin(), amounts.end())) << seed;
  }
}

TEST(HashTables, BalancedUnseen) {
  Tensor frequencies = keyed_integers(300, 5, 4);  // a quarter of them 0
  const Tensor table = balanced_hash_table(frequencies, 8, 42);
  int64_t unseen = 0;
  for (int64_t key = 0; key < 300; ++key) {
    if (frequencies[key].item<int64_t>() > 0) continue;
    ++unseen;
    EXPECT_EQ(table[key].item<int32_t>(), kernels::hash_bucket(key, 42, 8)) << key;
  }
  EXPECT_GT(unseen, 50);
}

TEST(HashTables, ClusteredBlobs) {
  // 6 blobs, keys dealt to them in turn.
  const int64_t V = 60, E = 6, D = 3;
  const Tensor centres = random_tensor({E, D}, 3, -100, 100);
  const Tensor blob = at::arange(V, at::kLong).remainder(E);
  const Tensor features =
      centres.index_select(0, blob).add(random_tensor({V, D}, 4, -.1, .1)).to(at::kFloat);
  const Ids table = ids_of(clustered_hash_table(features, E, 7));
  std::map<int64_t, int64_t> expert_of_blob;
  for (int64_t key = 0; key < V; ++key) {
    const auto [entry, _] = expert_of_blob.emplace(key % E, table[static_cast<size_t>(key)]);
    EXPECT_EQ(entry->second, table[static_cast<size_t>(key)]) << key;
  }
  Ids experts;
  for (const auto& [_, expert] : expert_of_blob) experts.push_back(expert);
  std::sort(experts.begin(), experts.end());
  EXPECT_EQ(experts, (Ids{0, 1, 2, 3, 4, 5}));
}

TEST(HashTables, ClusteredIsStable) {
  const int64_t V = 400, E = 7, D = 5;
  const Tensor features = random_tensor({V, D}, 9);
  for (const uint64_t seed : {0, 1, 2}) {
    const Tensor table = clustered_hash_table(features, E, seed).to(at::kLong);
    const Tensor members = at::one_hot(table, E).to(at::kDouble);  // [V, E]
    ASSERT_GT(members.sum(0).min().item<double>(), 0);
    const Tensor means = members.t().mm(features) / members.sum(0).unsqueeze(1);
    EXPECT_TRUE(at::equal(at::cdist(features, means).argmin(1), table)) << seed;
  }
}

TEST(HashTables, ClusteredEdges) {
  EXPECT_EQ(ids_of(clustered_hash_table(random_tensor({5, 2}, 1), 1)), Ids(5, 0));
  EXPECT_EQ(ids_of(clustered_hash_table(at::ones({1, 2}), 4)), (Ids{0}));
  EXPECT_EQ(ids_of(clustered_hash_table(at::ones({5, 2}), 4)), Ids(5, 0));
  const Tensor two = at::tensor({1., 3., 1., 3., 1.}, at::kDouble).unsqueeze(1);
  const Ids table = ids_of(clustered_hash_table(two, 4));
  EXPECT_EQ(table, (Ids{table[0], table[1], table[0], table[1], table[0]}));
  EXPECT_NE(table[0], table[1]);
}

TEST(HashTables, DispersedBound) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const int64_t V = Ids{1, 9, 100, 501}[seed % 4], E = Ids{1, 2, 5, 8, 64}[seed % 5];
    const Tensor clusters = keyed_integers(V, seed, 6).sub(3);  // ids may be negative
    const Tensor table = dispersed_hash_table(clusters, E, seed);
    EXPECT_LE(spread(loads_of(table, Ids(static_cast<size_t>(V), 1), E)), 1) << seed;
    for (int64_t cluster = -3; cluster < 3; ++cluster) {
      const Ids is_member = ids_of(clusters.eq(cluster));
      EXPECT_LE(spread(loads_of(table, is_member, E)), 1) << seed << " " << cluster;
    }
  }
}

TEST(HashTables, DispersedOrder) {
  const Ids table = ids_of(dispersed_hash_table(at::zeros({64}, at::kLong), 8));
  Ids in_turn;
  for (int64_t key = 0; key < 64; ++key) in_turn.push_back(key % 8);
  EXPECT_NE(table, in_turn);
}

TEST(HashTables, Deterministic) {
  const Tensor frequencies = keyed_integers(3000, 5, 4), clusters = keyed_integers(3000, 6, 9);
  const Tensor features = random_tensor({3000, 4}, 9);
  const std::vector<std::function<Tensor(uint64_t)>> builders = {
      [&](uint64_t seed) { return balanced_hash_table(frequencies, 8, seed); },
      [&](uint64_t seed) { return clustered_hash_table(features, 8, seed, 5); },
      [&](uint64_t seed) { return dispersed_hash_table(clusters, 8, seed); },
  };
  const int threads_before = at::get_num_threads();
  for (const auto& build : builders) {
    const Tensor expected = build(1);
    EXPECT_FALSE(at::equal(build(2), expected));
    kernels::set_parallel_for(
        [](int64_t begin, int64_t end, int64_t grain,
           const std::function<void(int64_t, int64_t)>& body) {
          at::parallel_for(begin, end, grain, body);
        },
        [] { return at::get_num_threads(); });
    for (const int threads : {1, 3}) {
      at::set_num_threads(threads);
      EXPECT_TRUE(same_bits(build(1), expected)) << threads;
    }
    kernels::set_parallel_for({}, {});
    at::set_num_threads(threads_before);
  }
}

TEST(HashTables, ThroughTheGate) {
  const Tensor table = balanced_hash_table(keyed_integers(50, 5, 9), 8);
  gates::HashGate gate(gates::HashGateOptions(8).mode(gates::HashMode::kTable).table(table));
  GateInput input = input_of(at::zeros({50, 3}));
  input.keys = at::arange(49, -1, -1, at::kLong);
  EXPECT_EQ(ids_of(gate.forward(input).routing.expert_idx), ids_of(table.flip(0)));
}

TEST(HashTables, Errors) {
  const auto text = [](const std::function<void()>& call) { return error_text<ConfigError>(call); };
  const Tensor counts = at::ones({3}, at::kLong);
  EXPECT_EQ(text([&] { balanced_hash_table(counts, 0); }),
            "[balanced_hash_table] num_experts=0 is outside [1, 2147483647]");
  EXPECT_EQ(text([&] { balanced_hash_table(at::ones({3}), 2); }),
            "[balanced_hash_table] frequencies=Float[3] is not an integer [V] tensor with V >= 1");
  EXPECT_EQ(text([&] {
              balanced_hash_table(at::tensor({1, -2}, at::kLong), 2);
            }),
            "[balanced_hash_table] frequencies[1]=-2 is negative; give a count");
  EXPECT_EQ(text([&] { dispersed_hash_table(counts, -1); }),
            "[dispersed_hash_table] num_experts=-1 is outside [1, 2147483647]");
  EXPECT_EQ(text([&] { dispersed_hash_table({}, 2); }),
            "[dispersed_hash_table] clusters=undefined is not an integer [V] tensor with V >= 1");
  EXPECT_EQ(text([&] {
              clustered_hash_table(at::ones({3, 2}), 0);
            }),
            "[clustered_hash_table] num_experts=0 is outside [1, 2147483647]");
  EXPECT_EQ(text([&] { clustered_hash_table(counts, 2); }),
            "[clustered_hash_table] features=Long[3] is not a floating [V, D] tensor with V >= 1 "
            "and D >= 1");
  EXPECT_EQ(text([&] {
              clustered_hash_table(at::full({3, 2}, NAN), 2);
            }),
            "[clustered_hash_table] features=Float[3, 2] holds a NaN or an infinity; give finite "
            "features");
  EXPECT_EQ(text([&] {
              clustered_hash_table(at::ones({3, 2}), 2, 0, 0);
            }),
            "[clustered_hash_table] max_iterations=0 is below 1; 100 is usual");
}

}  // namespace
}  // namespace perseid::testing
