// Orders in which outputs of gates meet experts.
//   Schedule     temperature and iterations at both ends, and beyond
//   Renumbered   ties, NaN and empty rows; equals the routing of the permuted table
//   Hard         routing, statistics and balance terms by expert, and back; the identity changes no bit
//   Soft         weights g Pi scaled to the sum of g, in a formula of its own, with gradients
//   Stage        the map follows Pi in training alone, and freezes; an optimiser leaves phi alone
#include "gates/expert_permutation.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <cmath>

#include "gates/comet_gate.h"
#include "gates/dselect_k_gate.h"
#include "gates/hash_gate.h"
#include "gates/remoe_gate.h"
#include "gates/tree_gate.h"
#include "tests/gates/gate_test.h"
#include "tests/gradcheck.h"
#include "tests/refused.h"

namespace perseid::testing {
namespace {

using gates::ExpertPermutation;
using gates::PermScope;
using gates::PermSearch;
using gates::PermutationOptions;

constexpr int64_t kE = 5, kT = 9, kD = 4;
const std::vector<int64_t> kMap = {3, 0, 4, 1, 2};

PermutationOptions sinkhorn_options(PermScope scope = PermScope::kShared) {
  return PermutationOptions().search(PermSearch::kSinkhorn).scope(scope).until(.5);
}
PermutationOptions swap_options() { return PermutationOptions().search(PermSearch::kSwap); }

Tensor tokens() { return random_tensor({kT, kD}, 3, -1, 1); }

GateInput training_input(double progress) {
  GateInput input = input_of(tokens());
  input.training = true;
  input.progress = progress;
  return input;
}

std::shared_ptr<TopKGate> top_k_gate(int64_t top_k = 2) {
  return float64_gate(TopKGateOptions(kD, kE).top_k(top_k), random_tensor({kE, kD}, 4, -2, 2));
}

template <typename GateType, typename Options>
std::shared_ptr<GateType> tree_gate(Options options) {
  auto gate = std::make_shared<GateType>(options);
  gate->to(at::kDouble);
  uint64_t seed = 20;
  for (const Tensor& parameter : gate->parameters()) {
    parameter.set_data(random_tensor(parameter.sizes(), seed++, -.6, .6));
  }
  return gate;
}

TEST(ExpertPermutation, Schedule) {
  EXPECT_NEAR(gates::sinkhorn_schedule(0).temperature, 1e-3, 1e-15);
  EXPECT_EQ(gates::sinkhorn_schedule(0).iterations, 20);
  EXPECT_NEAR(gates::sinkhorn_schedule(1).temperature, 1e-7, 1e-19);
  EXPECT_EQ(gates::sinkhorn_schedule(1).iterations, 150);
  EXPECT_NEAR(gates::sinkhorn_schedule(.5).temperature, 1e-5, 1e-17);
  EXPECT_EQ(gates::sinkhorn_schedule(.5).iterations, 85);
  EXPECT_EQ(gates::sinkhorn_schedule(20).temperature, gates::sinkhorn_schedule(1).temperature);
  EXPECT_EQ(gates::sinkhorn_schedule(-1).iterations, 20);
  EXPECT_THROW(gates::sinkhorn_schedule(std::nan("")), ConfigError);
}

// ---- Renumbered routing ----

Tensor as_map(const std::vector<int64_t>& map) { return at::tensor(map, at::kInt); }

void expect_same(const Routing& actual, const Routing& expected) {
  EXPECT_EQ(actual.num_tokens, expected.num_tokens);
  EXPECT_TRUE(gates::explicit_offsets(actual).equal(gates::explicit_offsets(expected)));
  EXPECT_TRUE(actual.expert_idx.equal(expected.expert_idx))
      << actual.expert_idx << expected.expert_idx;
  EXPECT_TRUE(at::allclose(actual.weights, expected.weights, 0, 0, /*equal_nan=*/true));
}

/// A table of weights with ties, zeros and a NaN, by column.
TEST(ExpertPermutation, Renumbered) {
  const Tensor table = at::tensor({.3, .3, .1, 0., .3,  //
                                   0., 0., 0., 0., 0.,  //
                                   .5, .2, .2, .2, .1,  //
                                   .1, .4, .2, .9, .3},
                                  at::kDouble)
                           .view({4, kE});
  table[3].fill_(NAN);
  const Tensor permuted = at::zeros_like(table).index_copy(1, at::tensor(kMap), table);
  expect_same(gates::renumbered(gates::routing_from_dense(table), as_map(kMap)),
              gates::routing_from_dense(permuted));
  // float32, and tokens without ties: weights are those of before, not copies.
  const Tensor distinct = random_tensor({6, kE}, 5, 0, 1, at::kFloat);
  const Routing before = gates::routing_from_dense(distinct);
  const Routing after = gates::renumbered(before, as_map(kMap));
  EXPECT_EQ(after.weights.data_ptr(), before.weights.data_ptr());
  expect_same(after, gates::routing_from_dense(
                         at::zeros_like(distinct).index_copy(1, at::tensor(kMap), distinct)));
}

TEST(ExpertPermutation, RenumberedGradients) {
  Tensor table = at::tensor({.3, .3, .1, 0., .3, .5, .2, .2, .2, .1}, at::kDouble).view({2, kE});
  const auto loss_weights = random_tensor({2, kE}, 6, -1, 1);
  EXPECT_TRUE(gradients_match(
      [&] {
        const Routing routing =
            gates::renumbered(gates::routing_from_dense(table), as_map(kMap));
        return std::vector<Tensor>{gates::dense_weights(routing, kE) * loss_weights};
      },
      {table.masked_fill_(table.eq(0), .05)}, 1e-7));
}

// ---- Hard ----

TEST(ExpertPermutation, IdentityChangesNoBit) {
  const auto gate = top_k_gate();
  const ExpertPermutation permutation(1, kE, swap_options());
  const GateInput input = training_input(0);
  const GateOutput plain = gate->forward(input);
  const GateOutput same = permutation.forward(*gate, input, {});
  expect_same(same.routing, plain.routing);
  EXPECT_TRUE(same.balance.score_sum.equal(plain.balance.score_sum));
  EXPECT_TRUE(same.stats.tokens_per_expert.equal(plain.stats.tokens_per_expert));
}

TEST(ExpertPermutation, ByExpertAndBack) {
  const auto gate = std::make_shared<TopKGate>(
      TopKGateOptions(kD, kE).top_k(2).bias_update_rate(.1).aux_loss_coeff(.1));
  ExpertPermutation permutation(1, kE, swap_options());
  permutation.set_map(at::tensor(kMap).unsqueeze(0));
  const GateInput input = training_input(0);
  const GateOutput plain = gate->forward(input);
  const GateOutput moved = permutation.forward(*gate, input, {});
  for (int64_t l = 0; l < kE; ++l) {
    const int64_t m = kMap[static_cast<size_t>(l)];
    EXPECT_EQ(moved.stats.tokens_per_expert[m].item<int64_t>(),
              plain.stats.tokens_per_expert[l].item<int64_t>());
    EXPECT_EQ(moved.balance.tokens_per_expert[m].item<int64_t>(),
              plain.balance.tokens_per_expert[l].item<int64_t>());
    EXPECT_EQ(moved.balance.score_sum[m].item<float>(), plain.balance.score_sum[l].item<float>());
  }
  EXPECT_TRUE(dense(moved, kE).index_select(1, at::tensor(kMap)).equal(dense(plain, kE)));
  EXPECT_TRUE(permutation.by_gate_output(moved.stats)
                  .tokens_per_expert.equal(plain.stats.tokens_per_expert));
  // The aux loss sees the same pairs of counts and scores.
  EXPECT_NEAR(aux_loss(moved).value.item<float>(), aux_loss(plain).value.item<float>(), 1e-7);
}

TEST(ExpertPermutation, HashedBuckets) {
  gates::HashGate gate(gates::HashGateOptions(kE).num_hashes(2));
  ExpertPermutation permutation(1, kE, swap_options());
  permutation.set_map(at::tensor(kMap).unsqueeze(0));
  GateInput input = training_input(0);
  input.keys = at::arange(kT);
  const Tensor plain = dense(gate.forward(input), kE);
  const Tensor moved = dense(permutation.forward(gate, input, {}), kE);
  EXPECT_TRUE(moved.index_select(1, at::tensor(kMap)).equal(plain));
}

/// Each tree has its own order: output l of tree u is added at map[u][l].
TEST(ExpertPermutation, TreesHaveTheirOwn) {
  const Tensor map = at::tensor({3, 0, 4, 1, 2, 1, 2, 0, 4, 3}, at::kLong).view({2, kE});
  for (const bool is_comet : {true, false}) {
    std::shared_ptr<gates::TreeGate> gate;
    if (is_comet) {
      gate = tree_gate<gates::CometGate>(gates::CometGateOptions(kD, kE));
    } else {
      gate = tree_gate<gates::DSelectKGate>(gates::DSelectKGateOptions(kD, kE));
    }
    ExpertPermutation permutation(
        2, kE, PermutationOptions().search(PermSearch::kSwap).scope(PermScope::kPerTree));
    permutation.set_map(map);
    const GateInput input = training_input(.3);
    const Tensor weights = gate->tree_weights(input);
    Tensor expected = at::zeros({kT, kE}, at::kDouble);
    for (int64_t u = 0; u < 2; ++u) {
      expected = expected.index_add(1, map[u], weights.select(1, u));
    }
    EXPECT_TRUE(close_to(dense(permutation.forward(*gate, input, {}), kE), expected, 1e-12));
  }
}

// ---- Soft ----

/// phi moderately sized for the temperature, so that Pi is far from a permutation.
void soften(ExpertPermutation& permutation) {
  permutation.to(at::kDouble);
  permutation.phi.set_data(random_tensor(permutation.phi.sizes(), 8, -2e-3, 2e-3));
}

TEST(ExpertPermutation, SoftWeights) {
  // A gate whose weights do not sum to 1 and may be none: the sum stays.
  const auto remoe = tree_gate<gates::ReMoEGate>(gates::ReMoEGateOptions(kD, kE).top_k(2));
  const auto top_k = top_k_gate();
  for (gates::Gate* gate : std::initializer_list<gates::Gate*>{top_k.get(), remoe.get()}) {
    ExpertPermutation permutation(1, kE, sinkhorn_options());
    soften(permutation);
    const GateInput input = training_input(0);
    ASSERT_TRUE(permutation.is_soft(input));
    const Tensor pi = permutation.relaxed_now(input.progress);
    const GateOutput soft = permutation.forward(*gate, input, pi);
    const Tensor plain = dense(gate->forward(input), kE);
    Tensor expected = plain.mm(pi[0]);
    expected = expected / expected.sum(1, true).clamp_min(1e-300) * plain.sum(1, true);
    EXPECT_TRUE(close_to(dense(soft, kE), expected, 1e-12));
    const int64_t with_experts = plain.sum(1).gt(0).sum().item<int64_t>();
    EXPECT_EQ(soft.routing.num_assignments(), with_experts * kE);
    EXPECT_EQ(soft.stats.num_assignments, with_experts * kE);
    EXPECT_FALSE(soft.balance.score_sum.defined());
  }
}

TEST(ExpertPermutation, SoftGradients) {
  const auto comet = tree_gate<gates::CometGate>(gates::CometGateOptions(kD, kE));
  const auto dselect = tree_gate<gates::DSelectKGate>(gates::DSelectKGateOptions(kD, kE));
  const auto top_k = top_k_gate();
  struct Row {
    gates::Gate* gate;
    PermScope scope;
  };
  for (const Row& row : {Row{top_k.get(), PermScope::kShared}, Row{comet.get(), PermScope::kShared},
                         Row{comet.get(), PermScope::kPerTree},
                         Row{dselect.get(), PermScope::kPerTree}}) {
    ExpertPermutation permutation(row.scope == PermScope::kPerTree ? 2 : 1, kE,
                                  sinkhorn_options(row.scope));
    soften(permutation);
    const GateInput input = training_input(0);
    std::vector<Tensor> inputs = row.gate->parameters();
    inputs.push_back(permutation.phi);
    GradcheckOptions options;
    options.step = 1e-7;  // phi is of the size 1e-3
    EXPECT_TRUE(gradients_match(
        [&] {
          const Tensor pi = permutation.relaxed_now(0);
          const GateOutput output = permutation.forward(*row.gate, input, pi);
          return std::vector<Tensor>{dense(output, kE), permutation.loss(pi, 2).value};
        },
        inputs, 1e-5, options));
  }
}

TEST(ExpertPermutation, EntropyLoss) {
  // Pi = I has no entropy; all entries 1/E have E log E in both sums.
  ExpertPermutation permutation(1, kE, sinkhorn_options().entropy_coeff(.25));
  EXPECT_NEAR(permutation.loss(at::eye(kE, at::kDouble).unsqueeze(0), 1).raw.item<double>(), 0,
              2e-5);
  const Tensor flat = at::full({1, kE, kE}, 1.0 / kE, at::kDouble);
  const double expected = 2 * kE * std::log(kE);
  EXPECT_NEAR(permutation.loss(flat, 1).raw.item<double>(), expected, 1e-4);
  EXPECT_NEAR(permutation.loss(flat, 1).value.item<double>(), .25 * expected, 1e-4);
  EXPECT_NEAR(permutation.loss(flat, 4).raw.item<double>(), expected / 4, 1e-4);
}

// ---- Stage ----

TEST(ExpertPermutation, Stage) {
  ExpertPermutation permutation(1, kE, sinkhorn_options());
  const auto gate = top_k_gate();
  const Tensor identity = at::arange(kE, at::kInt).unsqueeze(0);
  EXPECT_TRUE(permutation.expert_map.equal(identity));

  GateInput evaluation = input_of(tokens());
  EXPECT_FALSE(permutation.is_soft(evaluation));
  EXPECT_FALSE(permutation.is_soft(training_input(.5)));
  EXPECT_TRUE(permutation.is_soft(training_input(.49)));
  EXPECT_TRUE(permutation.is_soft(training_input(-3)));

  // phi near a permutation: Pi is that permutation, and the map follows.
  const at::NoGradGuard no_grad;
  permutation.phi.fill_(-.05);
  for (int64_t l = 0; l < kE; ++l) permutation.phi[0][l][kMap[static_cast<size_t>(l)]] = .05;
  const Tensor pi = permutation.relaxed_now(0);
  EXPECT_TRUE(permutation.expert_map.equal(identity));
  permutation.after_step(pi);
  EXPECT_TRUE(permutation.expert_map[0].equal(as_map(kMap)));
  EXPECT_TRUE(dense(permutation.forward(*gate, evaluation, {}), kE)
                  .index_select(1, at::tensor(kMap))
                  .equal(dense(gate->forward(evaluation), kE)));

  // At the end of the stage nothing moves any more.
  permutation.phi.neg_();
  permutation.after_step({});
  EXPECT_TRUE(permutation.expert_map[0].equal(as_map(kMap)));
  EXPECT_FALSE(permutation.phi.requires_grad());
  // Long after the end, as at 20 times its length, nothing overflows.
  EXPECT_TRUE(permutation.relaxed_now(10).isfinite().all().item<bool>());
}

TEST(ExpertPermutation, OptimiserLeavesFrozenPhiAlone) {
  ExpertPermutation permutation(1, kE, sinkhorn_options());
  torch::optim::AdamW optimizer(permutation.parameters(),
                                torch::optim::AdamWOptions(.1).weight_decay(.5));
  permutation.loss(permutation.relaxed_now(0), 1).value.backward();
  const Tensor before = permutation.phi.detach().clone();
  optimizer.step();
  EXPECT_FALSE(permutation.phi.equal(before));
  permutation.freeze();
  EXPECT_FALSE(permutation.phi.grad().defined());
  const Tensor frozen = permutation.phi.detach().clone();
  for (int i = 0; i < 3; ++i) optimizer.step();
  EXPECT_TRUE(permutation.phi.equal(frozen));
}

TEST(ExpertPermutation, CastsKeepTheMap) {
  ExpertPermutation permutation(1, kE, sinkhorn_options());
  permutation.set_map(at::tensor(kMap).unsqueeze(0));
  permutation.to(at::kDouble);
  EXPECT_EQ(permutation.expert_map.scalar_type(), at::kInt);
  EXPECT_TRUE(permutation.expert_map[0].equal(as_map(kMap)));
  EXPECT_EQ(permutation.phi.scalar_type(), at::kDouble);
}

TEST(ExpertPermutation, SameOnEveryRankAndKeyed) {
  const ExpertPermutation one(1, kE, sinkhorn_options(), 3, 1), same(1, kE, sinkhorn_options(), 3, 1),
      other_layer(1, kE, sinkhorn_options(), 4, 1), other_index(1, kE, sinkhorn_options(), 3, 0);
  EXPECT_TRUE(one.phi.equal(same.phi));
  EXPECT_FALSE(one.phi.equal(other_layer.phi));
  EXPECT_FALSE(one.phi.equal(other_index.phi));
  EXPECT_LE(one.phi.abs().max().item<float>(), .05f);
  EXPECT_EQ(one.hash(), same.hash());
  ExpertPermutation moved(1, kE, sinkhorn_options(), 3, 1);
  moved.set_map(at::tensor(kMap).unsqueeze(0));
  EXPECT_NE(moved.hash(), one.hash());
}

TEST(ExpertPermutation, Refuses) {
  ExpertPermutation permutation(2, 3, swap_options());
  const std::string name = "expert_permutation";
  const auto options = [](auto change) {
    return [change] {
      PermutationOptions o = PermutationOptions().search(PermSearch::kSinkhorn);
      change(o);
      ExpertPermutation(1, 4, o);
    };
  };
  const std::vector<Refused> table = {
      {options([](auto& o) { o.until(1.5); }), name, "permutation.until", "1.5", "[0, 1]"},
      {options([](auto& o) { o.until(NAN); }), name, "permutation.until", "nan", "[0, 1]"},
      {options([](auto& o) { o.entropy_coeff(-1); }), name, "permutation.entropy_coeff", "-1", ""},
      {options([](auto& o) { o.search(PermSearch::kNone); }), name, "search", "none", "sinkhorn"},
      {[&] { ExpertPermutation(0, 4, swap_options()); }, name, "num_units", "0", "below 1"},
      {[&] { permutation.set_map(at::zeros({2, 3})); }, name, "map", "Float[2, 3]", "integer"},
      {[&] { permutation.set_map(at::arange(3).unsqueeze(0)); }, name, "map", "Long[1, 3]",
       "num_units=2"},
      {[&] { permutation.set_map(at::tensor({0, 1, 2, 0, 1, 1}).view({2, 3})); }, name, "map.row",
       "1", "permutation"},
      {[&] { permutation.set_map(at::tensor({0, 1, 3, 0, 1, 2}).view({2, 3})); }, name, "map.row",
       "0", "permutation"},
      {[&] { permutation.after_step(at::zeros({2, 3, 3})); }, name, "relaxed", "Float[2, 3, 3]",
       "forward"},
  };
  for (const Refused& row : table) expect_refused(row);
  EXPECT_TRUE(permutation.host_map().equal(at::arange(3, at::kInt).repeat({2, 1})));

  ExpertPermutation broken(1, 3, sinkhorn_options());
  EXPECT_THROW(broken.after_step(at::full({1, 3, 3}, NAN)), Diverged);
}

}  // namespace
}  // namespace perseid::testing
