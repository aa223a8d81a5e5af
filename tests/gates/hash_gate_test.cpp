// Gates without a router: hash, table, single; and the dense baseline.
//   Golden        buckets of keys 0..11 and -1 for two seeds and two expert counts
//   Histogram     chi-square of consecutive keys below its mean + 5 standard deviations
//   OrderFree     the expert of a key does not depend on its place in the batch
//   Table         entries are used, keys outside are hashed or refused
//   SeveralHashes ids as defined, from a list of the free experts; distinct, weights 1/n
//   SeveralSpread each hash is uniform over experts, and so are pairs of them (chi-square)
#include "gates/hash_gate.h"

#include <algorithm>
#include <cmath>

#include "gates/baseline_gates.h"
#include "kernels/hash.h"
#include "tests/gates/gate_test.h"

namespace perseid::testing {
namespace {

using gates::HashGate;
using gates::HashGateOptions;
using gates::HashMode;
using gates::OutOfTable;

GateInput keyed(const Tensor& keys, const std::optional<Tensor>& valid = {}) {
  GateInput input = input_of(at::zeros({keys.size(0), 3}), valid);
  input.keys = keys;
  return input;
}

std::vector<int64_t> experts_of(const HashGateOptions& options, const Tensor& keys) {
  return ids_of(HashGate(options).forward(keyed(keys)).routing.expert_idx);
}

HashGateOptions table_options(const std::vector<int64_t>& table, int64_t num_experts) {
  return HashGateOptions(num_experts).mode(HashMode::kTable).table(at::tensor(table, at::kLong));
}

TEST(HashGate, Golden) {
  const Tensor keys = at::arange(12, at::kLong);
  const Tensor minus_one = at::tensor({-1}, at::kLong);
  using Ids = std::vector<int64_t>;
  EXPECT_EQ(experts_of(HashGateOptions(8), keys), (Ids{7, 4, 4, 0, 3, 3, 5, 3, 4, 5, 0, 2}));
  EXPECT_EQ(experts_of(HashGateOptions(5), keys), (Ids{4, 2, 2, 0, 2, 1, 3, 1, 3, 3, 0, 1}));
  EXPECT_EQ(experts_of(HashGateOptions(8).seed(42), keys),
            (Ids{0, 1, 6, 0, 0, 3, 0, 5, 0, 3, 5, 3}));
  EXPECT_EQ(experts_of(HashGateOptions(5).seed(42), keys),
            (Ids{0, 1, 4, 0, 0, 2, 0, 3, 0, 2, 3, 1}));
  EXPECT_EQ(experts_of(HashGateOptions(8), minus_one), (Ids{7}));
  EXPECT_EQ(experts_of(HashGateOptions(8).seed(42), minus_one), (Ids{6}));
}

TEST(HashGate, Histogram) {
  const int64_t T = 20000;
  for (const int64_t E : {2, 5, 8, 64}) {
    for (const uint64_t seed : {0, 1, 42}) {
      const auto output =
          HashGate(HashGateOptions(E).seed(seed)).forward(keyed(at::arange(T, at::kLong)));
      const double mean = double(T) / double(E);
      const double chi_square =
          (output.stats.tokens_per_expert.to(at::kDouble) - mean).square().sum().item<double>() /
          mean;
      const double freedom = double(E - 1);
      EXPECT_LT(chi_square, freedom + 5 * std::sqrt(2 * freedom)) << E << " " << seed;
    }
  }
}

TEST(HashGate, OrderFree) {
  const Tensor keys = random_tensor({37}, 1, -1e9, 1e9).to(at::kLong);
  const Tensor order = random_tensor({37}, 2).argsort();
  HashGate gate(HashGateOptions(8).seed(3));
  const Routing routing = gate.forward(keyed(keys)).routing;
  EXPECT_TRUE(same_bits(gate.forward(keyed(keys)).routing.expert_idx, routing.expert_idx));
  EXPECT_TRUE(same_bits(gate.forward(keyed(keys.index_select(0, order))).routing.expert_idx,
                        routing.expert_idx.index_select(0, order)));
}

TEST(HashGate, OneExpertOfWeightOne) {
  HashGate gate(HashGateOptions(8));
  const Tensor valid = at::arange(12, at::kLong).remainder(4).ne(2);
  const GateOutput output = gate.forward(keyed(at::arange(12, at::kLong), valid));
  EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
  EXPECT_TRUE(same_bits(output.routing.weights, at::ones({9})));
  EXPECT_EQ(output.stats.num_tokens, 9);
  EXPECT_EQ(output.stats.tokens_without_expert, 0);
  EXPECT_EQ(output.stats.tokens_per_expert.sum().item<int64_t>(), 9);
  EXPECT_TRUE(output.losses.empty());
  EXPECT_FALSE(output.balance.score_sum.defined());
  EXPECT_TRUE(gate.parameters().empty());
  EXPECT_EQ(gate.top_k(), 1);
  EXPECT_EQ(gate.forward(keyed(at::arange(3, at::kLong))).routing.top_k, 1);
  EXPECT_EQ(gate.forward(keyed(at::arange(0, at::kLong))).routing.num_assignments(), 0);
  GateInput exact = keyed(at::arange(3, at::kLong));
  exact.tokens = exact.tokens.to(at::kDouble);
  EXPECT_TRUE(same_bits(gate.forward(exact).routing.weights, at::ones({3}, at::kDouble)));
}

TEST(HashGate, Table) {
  const Tensor keys = at::tensor({2, 0, 5, 1, -1, 2}, at::kLong);
  HashGateOptions options = table_options({3, 1, 4}, 5).seed(7);
  const auto hashed = [](int64_t key) { return int64_t{kernels::hash_bucket(key, 7, 5)}; };
  EXPECT_EQ(experts_of(options, keys), (std::vector<int64_t>{4, 3, hashed(5), 1, hashed(-1), 4}));
  options.oov(OutOfTable::kError);
  EXPECT_EQ(error_text<DataError>([&] { experts_of(options, keys); }),
            "[hash_gate] keys[2]=5 is outside the table [0, 3); choose oov=hash or extend it");
  EXPECT_EQ(error_text<DataError>([&] { experts_of(options, keys.slice(0, 3)); }),
            "[hash_gate] keys[1]=-1 is outside the table [0, 3); choose oov=hash or extend it");
  // Padding may hold any key.
  const auto output = HashGate(options).forward(keyed(keys, keys.ge(0).logical_and(keys.lt(3))));
  EXPECT_EQ(ids_of(output.routing.expert_idx), (std::vector<int64_t>{4, 3, 1, 4}));
}

/// Hashes 0 .. n-1 of a key by their definition.
std::vector<int64_t> drawn_experts(int64_t key, uint64_t seed, int64_t n, int64_t E,
                                   int64_t hash0) {
  std::vector<int64_t> free, taken{hash0};
  for (int64_t e = 0; e < E; ++e) free.push_back(e);
  free.erase(free.begin() + hash0);
  for (int64_t h = 1; h < n; ++h) {
    const uint64_t seed_h = kernels::random_key(seed).with(static_cast<uint64_t>(h)).value;
    const auto place = free.begin() + kernels::hash_bucket(key, seed_h, E - h);
    taken.push_back(*place);
    free.erase(place);
  }
  return taken;
}

TEST(HashGate, SeveralHashes) {
  const int64_t T = 37;
  const Tensor keys = random_tensor({T}, 1, -1e9, 1e9).to(at::kLong);
  const Tensor valid = at::arange(T, at::kLong).remainder(4).ne(2);
  for (const int64_t E : {1, 2, 5, 8}) {
    for (const int64_t n : {int64_t{1}, int64_t{2}, int64_t{3}, E}) {
      if (n > E) continue;
      HashGate gate(HashGateOptions(E).num_hashes(n).seed(42));
      EXPECT_EQ(gate.top_k(), n);
      const GateOutput output = gate.forward(keyed(keys));
      EXPECT_NO_THROW(gates::validate(output.routing, E, "test"));
      EXPECT_TRUE(same_bits(output.routing.weights, at::full({T * n}, 1. / double(n))));
      EXPECT_EQ(output.stats.num_tokens, T);
      EXPECT_EQ(output.stats.max_experts_per_token, n);
      EXPECT_NEAR(output.stats.entropy_sum, double(T) * std::log(double(n)), 1e-4);
      std::vector<int64_t> expected;
      for (int64_t t = 0; t < T; ++t) {
        const int64_t key = keys[t].item<int64_t>();
        auto row = drawn_experts(key, 42, n, E, kernels::hash_bucket(key, 42, E));
        std::sort(row.begin(), row.end());
        expected.insert(expected.end(), row.begin(), row.end());
      }
      EXPECT_EQ(ids_of(output.routing.expert_idx), expected) << E << " " << n;

      const GateOutput padded = gate.forward(keyed(keys, valid));
      EXPECT_EQ(padded.stats.num_tokens, 28);
      EXPECT_EQ(padded.stats.num_assignments, 28 * n);
      EXPECT_EQ(padded.stats.tokens_without_expert, 0);
      EXPECT_TRUE(close_to(gates::dense_weights(padded.routing, E),
                           gates::dense_weights(output.routing, E) * valid.unsqueeze(1), 0));
    }
  }
  // A table gives hash 0, the others avoid it.
  const auto options = table_options({3, 1, 4}, 5).num_hashes(3).seed(7);
  auto row = drawn_experts(2, 7, 3, 5, 4);
  std::sort(row.begin(), row.end());
  EXPECT_EQ(experts_of(options, at::tensor({2}, at::kLong)), row);
}

TEST(HashGate, SeveralSpread) {
  const int64_t T = 20000, E = 8;
  const auto experts = HashGate(HashGateOptions(E).num_hashes(2))
                           .forward(keyed(at::arange(T, at::kLong)))
                           .routing.expert_idx.view({T, 2});
  const Tensor pair = experts.select(1, 0).mul(E).add(experts.select(1, 1));
  const Tensor counts = at::bincount(pair, {}, E * E).to(at::kDouble);
  const double freedom = double(E * (E - 1) / 2 - 1), mean = double(T) / (freedom + 1);
  EXPECT_EQ(counts.gt(0).sum().item<int64_t>(), E * (E - 1) / 2);
  const double chi_square = (counts - mean).square().mul(counts.gt(0)).sum().item<double>() / mean;
  EXPECT_LT(chi_square, freedom + 5 * std::sqrt(2 * freedom));
}

TEST(HashGate, TableIsABuffer) {
  const Tensor table = at::full({300}, 257, at::kLong);
  HashGate gate(HashGateOptions(300).mode(HashMode::kTable).table(table));
  table.fill_(0);  // the gate has its own copy
  ASSERT_EQ(gate.named_buffers().keys(), (std::vector<std::string>{"table"}));
  // A cast of the module to a type that cannot hold every id leaves the table alone.
  gate.to(at::kBFloat16);
  gate.to(at::kCPU, at::kBFloat16);
  EXPECT_EQ(gate.buffers()[0].scalar_type(), at::kInt);
  const auto experts = [&] {
    return ids_of(gate.forward(keyed(at::tensor({299}, at::kLong))).routing.expert_idx);
  };
  EXPECT_EQ(experts(), std::vector<int64_t>{257});
  gate.buffers()[0].fill_(3);  // as a checkpoint does
  EXPECT_EQ(experts(), std::vector<int64_t>{3});
}

TEST(SingleGate, OneExpert) {
  gates::SingleGate gate(5, 3);
  const Tensor valid = at::tensor({1, 0, 1}, at::kInt).to(at::kBool);
  const GateOutput output = gate.forward(input_of(at::zeros({3, 2}), valid));
  EXPECT_NO_THROW(gates::validate(output.routing, 5, "test"));
  EXPECT_EQ(ids_of(output.routing.expert_idx), (std::vector<int64_t>{3, 3}));
  EXPECT_EQ(ids_of(output.routing.token_offsets), (std::vector<int64_t>{0, 1, 1, 2}));
  EXPECT_EQ(ids_of(output.stats.tokens_per_expert), (std::vector<int64_t>{0, 0, 0, 2, 0}));
  EXPECT_TRUE(same_bits(output.routing.weights, at::ones({2})));
  EXPECT_EQ(gate.forward(input_of(at::zeros({0, 2}))).routing.num_assignments(), 0);
}

TEST(DenseGate, IsSoftmax) {
  gates::DenseGate gate(TopKGateOptions(6, 8).top_k(2).z_loss_coeff(.1));
  gate.to(at::kDouble);
  const Tensor tokens = random_tensor({37, 6}, 1);
  const GateOutput output = gate.forward(input_of(tokens));
  const Tensor weight = gate.named_parameters()["router.weight"];
  EXPECT_TRUE(
      close_to(gates::dense_weights(output.routing, 8), tokens.mm(weight.t()).softmax(1), 1e-14));
  EXPECT_EQ(gate.top_k(), 8);
  EXPECT_FALSE(output.balance.score_sum.defined());
  EXPECT_EQ(output.losses.size(), 1u);
}

}  // namespace
}  // namespace perseid::testing
