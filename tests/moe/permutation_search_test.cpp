// The search over orders of experts, float64 where bits or differences matter.
//   ConstantExperts   a one-hot gate, expert m says m, the target is l: a scrambled order is found
//                     back, on 1, 2 and 4 ranks, and by the same moves
//   NeverRaises       20 random models: the loss never rises, evaluations stay within their limit
//   BruteForce        the best of all orders for up to 6 experts; each round the best exchange
//   Scores            M against central differences of the loss, per unit, for every gate
//   SampledScores     from every n-th token of all ranks, scaled to all
//   StackedLayers     two layers: scores are derivatives of the whole model, losses exact
//   KeepsState        parameters, gradients, buffers, modes and random numbers stay as they were
//   Refuses           wrong use is named, on every rank; a search that throws leaves a valid order
#include "moe/permutation_search.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "comm/collectives.h"
#include "gates/hash_gate.h"
#include "kernels/error.h"
#include "kernels/random.h"
#include "tests/moe/conformance_gates.h"
#include "tests/refused.h"

namespace perseid::testing {
namespace {

using at::Tensor;
using gates::PermScope;
using gates::PermSearch;
using gates::PermutationOptions;

std::vector<int64_t> shuffled(int64_t size, uint64_t seed) {
  std::vector<int64_t> row(static_cast<size_t>(size));
  std::iota(row.begin(), row.end(), 0);
  for (int64_t i = size - 1; i > 0; --i) {
    std::swap(
        row[static_cast<size_t>(i)],
        row[static_cast<size_t>(kernels::random_below(
            kernels::random_key(seed), static_cast<uint64_t>(i), static_cast<uint64_t>(i + 1)))]);
  }
  return row;
}

Tensor random_map(int64_t num_units, int64_t num_experts, uint64_t seed) {
  std::vector<Tensor> rows;
  for (int64_t u = 0; u < num_units; ++u) {
    rows.push_back(at::tensor(shuffled(num_experts, seed * 100 + static_cast<uint64_t>(u))));
  }
  return at::stack(rows);
}

void scramble(MoELayer& layer, uint64_t seed) {
  for (const auto& permutation : layer.permutations()) {
    permutation->set_map(random_map(permutation->num_units(), permutation->num_experts(), seed++));
  }
}

PermutationOptions swap_options(PermScope scope = PermScope::kShared) {
  return PermutationOptions().search(PermSearch::kSwap).scope(scope);
}

std::shared_ptr<MoELayer> layer_of(std::vector<std::shared_ptr<gates::Gate>> gates,
                                   std::shared_ptr<Experts> experts,
                                   const ExpertPlacement& placement, const ParallelGroups& groups,
                                   const PermutationOptions& permutation) {
  MoELayerOptions options;
  options.permutation = permutation;
  return std::make_shared<MoELayer>(std::move(gates), std::move(experts), placement, groups,
                                    options);
}

// ---- One-hot gate, constant experts ----

constexpr int64_t kConstants = 8;

/// Expert m returns m; key l goes to output l.
std::shared_ptr<MoELayer> constant_layer(const ParallelGroups& groups, int64_t num_experts) {
  const comm::Group& ep = groups.expert_parallel;
  const auto placement = ExpertPlacement::contiguous(num_experts, ep.size());
  auto experts =
      std::make_shared<GroupedLinear>(GroupedLinearOptions(kDModel, 1), placement, ep.rank());
  experts->to(at::kDouble);
  {
    const at::NoGradGuard no_grad;
    experts->weight.zero_();
    const std::vector<int64_t>& ids = experts->expert_ids();
    for (size_t slot = 0; slot < ids.size(); ++slot) {
      experts->bias[static_cast<int64_t>(slot)].fill_(static_cast<double>(ids[slot]));
    }
  }
  auto gate = std::make_shared<gates::HashGate>(gates::HashGateOptions(num_experts)
                                                    .mode(gates::HashMode::kTable)
                                                    .table(at::arange(num_experts)));
  return layer_of({gate}, experts, placement, groups, swap_options());
}

/// Squared error of key l against target l over tokens [first, first + count) of `total`.
Tensor constant_loss(MoELayer& layer, int64_t first, int64_t count, int64_t total,
                     int64_t num_experts) {
  MoEInput input(at::zeros({count, kDModel}, at::kDouble));
  input.keys = at::arange(first, first + count).remainder(num_experts);
  const Tensor target = input.keys->to(at::kDouble).unsqueeze(1);
  return (layer.forward(input).output() - target).square().sum() / static_cast<double>(total);
}

/// What the search did on every rank.
struct Outcome {
  std::vector<Tensor> maps;
  PermutationReport report;
};

std::vector<Outcome> search_constants(int num_ranks, uint64_t seed, Probe probe = Probe::kAll) {
  constexpr int64_t kTokens = 4 * kConstants;
  std::vector<Outcome> outcomes(static_cast<size_t>(num_ranks));
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    const auto layer = constant_layer(make_parallel_groups(world), kConstants);
    scramble(*layer, seed);
    // The last of several ranks holds no tokens.
    const int64_t sharers = std::max(1, num_ranks - 1);
    const int64_t each = kTokens / sharers;
    const int64_t first = world.rank() * each;
    const int64_t count = world.rank() >= sharers       ? 0
                          : world.rank() + 1 == sharers ? kTokens - first
                                                        : each;
    PermutationSearchOptions options;
    options.probe = probe;
    // All candidates of a round: a squared error is far from its first order here, and the exchange
    // that helps, which there always is, need not be among those of the best scores.
    options.candidates_per_round = 1 + kConstants * (kConstants - 1) / 2;
    options.max_evaluations = 400;
    PermutationSearch search(*layer, options);
    Outcome& mine = outcomes[static_cast<size_t>(world.rank())];
    mine.report = search.search_now(
        2, [&](size_t) { return constant_loss(*layer, first, count, kTokens, kConstants); });
    mine.maps = {layer->permutations().front()->host_map()};
  });
  return outcomes;
}

TEST(PermutationSearch, ConstantExperts) {
  const Tensor identity = at::arange(kConstants, at::kInt).unsqueeze(0);
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    const std::vector<Outcome> one = search_constants(1, seed);
    EXPECT_GT(one[0].report.loss_before, 1);
    EXPECT_EQ(one[0].report.loss_after, 0);
    EXPECT_LE(one[0].report.evaluations, 400);
    EXPECT_TRUE(one[0].maps[0].equal(identity)) << one[0].maps[0];
    for (const int num_ranks : {2, 4}) {
      for (const Outcome& rank : search_constants(num_ranks, seed)) {
        EXPECT_TRUE(rank.maps[0].equal(identity));
        EXPECT_EQ(rank.report.evaluations, one[0].report.evaluations);
        ASSERT_EQ(rank.report.moves.size(), one[0].report.moves.size());
        for (size_t i = 0; i < rank.report.moves.size(); ++i) {
          EXPECT_EQ(rank.report.moves[i].a, one[0].report.moves[i].a);
          EXPECT_EQ(rank.report.moves[i].b, one[0].report.moves[i].b);
        }
      }
    }
  }
}

/// Without a dense pass no exchange has a score here: each output knows one expert. The first
/// candidates by number are then evaluated, and the loss does not rise.
TEST(PermutationSearch, SelectedExpertsAlone) {
  for (const int num_ranks : {1, 2}) {
    const std::vector<Outcome> outcomes = search_constants(num_ranks, 1, Probe::kSelected);
    EXPECT_LT(outcomes[0].report.loss_after, outcomes[0].report.loss_before);
    for (const PermutationMove& move : outcomes[0].report.moves) {
      EXPECT_TRUE(std::isnan(move.predicted));
      EXPECT_LT(move.actual, 0);
    }
  }
}

// ---- Random models ----

struct Model {
  std::shared_ptr<MoELayer> layer;
  Tensor tokens, target;

  Tensor loss() const {
    const std::vector<Tensor> outputs = layer->forward(tokens).outputs;
    Tensor sum = at::zeros({}, at::kDouble);
    for (size_t g = 0; g < outputs.size(); ++g) {
      sum = sum + (outputs[g] - target.select(0, static_cast<int64_t>(g))).square().mean();
    }
    return sum;
  }
  PermutationReport search(const PermutationSearchOptions& options = {}) const {
    return PermutationSearch(*layer, options).search_now(1, [&](size_t) { return loss(); });
  }
};

enum class Kind { kTopK, kDSelectK, kComet };
constexpr Kind kKinds[] = {Kind::kTopK, Kind::kDSelectK, Kind::kComet};

std::shared_ptr<gates::Gate> gate_of_kind(Kind kind, int64_t num_experts, int64_t gate_id) {
  const GateSizes sizes{num_experts, std::min<int64_t>(2, num_experts), gate_id};
  switch (kind) {
    case Kind::kTopK:
      return random_gate<gates::TopKGate>(top_k_options(sizes), 1.0 + static_cast<double>(gate_id));
    case Kind::kDSelectK:
      return random_gate<gates::DSelectKGate>(
          gates::DSelectKGateOptions(kDModel, num_experts).top_k(sizes.top_k),
          .5 + static_cast<double>(gate_id));
    case Kind::kComet:
      break;
  }
  return random_gate<gates::CometGate>(comet_options(sizes), .5 + static_cast<double>(gate_id));
}

Model random_model(Kind kind, PermScope scope, int64_t num_experts, uint64_t seed,
                   int num_gates = 1) {
  const ParallelGroups groups = make_parallel_groups(comm::Group());
  const auto placement = ExpertPlacement::contiguous(num_experts, 1);
  std::vector<std::shared_ptr<gates::Gate>> gates;
  for (int g = 0; g < num_gates; ++g) gates.push_back(gate_of_kind(kind, num_experts, g));
  Model model;
  model.layer = layer_of(gates, make_experts(ExpertKind::kGatedBias, placement, 0, at::kDouble),
                         placement, groups, swap_options(scope));
  model.tokens = random_tensor({24, kDModel}, seed, -1, 1);
  model.target = random_tensor({num_gates, 24, kDOut}, seed + 1, -2, 2);
  return model;
}

TEST(PermutationSearch, NeverRaises) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Kind kind = kKinds[seed % 3];
    const PermScope scope = kind == Kind::kTopK ? PermScope::kPerGate : PermScope::kPerTree;
    const Model model = random_model(kind, scope, 7, 500 + seed, 1 + static_cast<int>(seed % 2));
    scramble(*model.layer, seed);
    const double before = model.loss().item<double>();
    PermutationSearchOptions options;
    options.max_evaluations = 5 + static_cast<int64_t>(seed);
    const PermutationReport report = model.search(options);
    EXPECT_LE(report.evaluations, options.max_evaluations);
    EXPECT_NEAR(report.loss_before, before, 1e-12 * before);
    EXPECT_LE(report.loss_after, report.loss_before);
    EXPECT_NEAR(model.loss().item<double>(), report.loss_after, 1e-12 * before);
    double expected = report.loss_before;
    for (const PermutationMove& move : report.moves) expected += move.actual;
    EXPECT_NEAR(expected, report.loss_after, 1e-12 * before);
  }
}

/// Loss of every order of a model with one unit, by map.
std::vector<std::pair<double, std::vector<int64_t>>> all_orders(const Model& model, int64_t E) {
  std::vector<int64_t> row(static_cast<size_t>(E));
  std::iota(row.begin(), row.end(), 0);
  std::vector<std::pair<double, std::vector<int64_t>>> orders;
  const at::NoGradGuard no_grad;
  do {
    model.layer->permutations().front()->set_map(at::tensor(row).unsqueeze(0));
    orders.emplace_back(model.loss().item<double>(), row);
  } while (std::next_permutation(row.begin(), row.end()));
  return orders;
}

TEST(PermutationSearch, BruteForce) {
  for (const int64_t E : {2, 3, 4, 5}) {
    const Model model = random_model(Kind::kTopK, PermScope::kShared, E, 40);
    const auto orders = all_orders(model, E);
    const auto best = std::min_element(orders.begin(), orders.end());
    model.layer->permutations().front()->set_map(random_map(1, E, 3));
    PermutationSearchOptions options;
    options.max_evaluations = 120;
    const PermutationReport report = model.search(options);
    EXPECT_NEAR(report.loss_after, best->first, 1e-12 * best->first);
    EXPECT_TRUE(model.layer->permutations().front()->host_map()[0].equal(
        at::tensor(best->second, at::kInt)))
        << "E=" << E;
    EXPECT_EQ(report.evaluations, orders.size());
    EXPECT_EQ(report.rounds, 0);
  }
}

/// With room for all candidates, each round makes the move of the lowest loss: an exchange, or one
/// that is lower than all exchanges.
TEST(PermutationSearch, BestMoveOfARound) {
  constexpr int64_t E = 5;
  const Model model = random_model(Kind::kTopK, PermScope::kShared, E, 41);
  gates::ExpertPermutation& permutation = *model.layer->permutations().front();
  permutation.set_map(random_map(1, E, 4));
  PermutationSearchOptions options;
  options.exhaustive_up_to = 0;
  options.candidates_per_round = 1 + E * (E - 1) / 2;
  options.max_evaluations = 1 + options.candidates_per_round;  // one round
  int moves = 0;
  for (int round = 0; round < 10; ++round) {
    const Tensor map = permutation.host_map();
    double lowest = INFINITY;
    Tensor expected;
    const at::NoGradGuard no_grad;
    for (int64_t a = 0; a < E; ++a) {
      for (int64_t b = a + 1; b < E; ++b) {
        Tensor next = map.clone();
        next[0][a] = map[0][b];
        next[0][b] = map[0][a];
        permutation.set_map(next);
        const double loss = model.loss().item<double>();
        if (loss < lowest) {
          lowest = loss;
          expected = next;
        }
      }
    }
    permutation.set_map(map);
    const PermutationReport report = model.search(options);
    EXPECT_EQ(report.rounds, 1);
    if (report.moves.empty()) {
      EXPECT_GE(lowest, report.loss_before * (1 - 1e-6));
      break;
    }
    ++moves;
    if (report.moves[0].a >= 0) {
      EXPECT_TRUE(permutation.host_map().equal(expected));
    } else {
      EXPECT_LE(report.loss_after, lowest);
    }
  }
  EXPECT_GE(moves, 1);
}

// ---- Scores ----

/// The loss with output l of unit u sharing its weight, (1 - eps) with its own expert and eps with
/// that of output m: the derivative at 0 is M[l, map m] - M[l, map l].
double mixed_loss(const Model& model, PermScope scope, int64_t unit, int64_t l, int64_t m,
                  double eps) {
  MoELayer& layer = *model.layer;
  const at::NoGradGuard no_grad;
  gates::GateInput input;
  input.tokens = model.tokens;
  const int64_t E = layer.permutations().front()->num_experts();
  std::vector<Tensor> f;
  for (int64_t e = 0; e < E; ++e) f.push_back(dense_expert(*layer.experts(), e, model.tokens));
  Tensor sum = at::zeros({}, at::kDouble);
  for (size_t g = 0; g < layer.gates().size(); ++g) {
    const size_t p = layer.permutations().size() == 1 ? 0 : g;
    const Tensor map = layer.permutations()[p]->host_map();
    gates::Gate& gate = *layer.gates()[g];
    const bool per_tree = scope == PermScope::kPerTree;
    const Tensor weights = per_tree
                               ? dynamic_cast<gates::TreeGate&>(gate).tree_weights(input)
                               : gates::dense_weights(gate.forward(input).routing, E).unsqueeze(1);
    Tensor y = at::zeros({model.tokens.size(0), kDOut}, at::kDouble);
    int64_t first = 0;  // units of one gate are counted from that of the first one
    for (size_t q = 0; q < p; ++q) first += layer.permutations()[q]->num_units();
    for (int64_t u = 0; u < weights.size(1); ++u) {
      for (int64_t o = 0; o < E; ++o) {
        const Tensor w = weights.select(1, u).narrow(1, o, 1);
        const auto own = static_cast<size_t>(map[u][o].item<int64_t>());
        const auto other = static_cast<size_t>(map[u][m].item<int64_t>());
        const double share = first + u == unit && o == l ? eps : 0;
        y = y + w * ((1 - share) * f[own] + share * f[other]);
      }
    }
    sum = sum + (y - model.target.select(0, static_cast<int64_t>(g))).square().mean();
  }
  return sum.item<double>();
}

TEST(PermutationSearch, Scores) {
  constexpr int64_t E = 4;
  for (const Kind kind : kKinds) {
    for (const PermScope scope : {PermScope::kShared, PermScope::kPerGate, PermScope::kPerTree}) {
      if (kind == Kind::kTopK && scope == PermScope::kPerTree) continue;
      const Model model = random_model(kind, scope, E, 43, 2);
      scramble(*model.layer, 6);
      std::vector<Tensor> rows;
      for (const auto& p : model.layer->permutations()) {
        const Tensor map = p->host_map();
        for (int64_t u = 0; u < map.size(0); ++u) rows.push_back(map[u].to(at::kLong));
      }
      const std::vector<Tensor> scores =
          PermutationSearch(*model.layer).scores(1, [&](size_t) { return model.loss(); });
      ASSERT_EQ(scores.size(), rows.size());
      double scale = 0;
      for (const Tensor& score : scores) scale = std::max(scale, score.abs().max().item<double>());
      constexpr double kStep = 1e-5;
      for (int64_t u = 0; u < static_cast<int64_t>(scores.size()); ++u) {
        for (int64_t l = 0; l < E; ++l) {
          for (int64_t m = 0; m < E; ++m) {
            const double difference = (mixed_loss(model, scope, u, l, m, kStep) -
                                       mixed_loss(model, scope, u, l, m, -kStep)) /
                                      (2 * kStep);
            const Tensor& row = rows[static_cast<size_t>(u)];
            const Tensor score = scores[static_cast<size_t>(u)][l];
            const double expected = (score[row[m]] - score[row[l]]).item<double>();
            EXPECT_NEAR(expected, difference, 1e-6 * scale) << u << " " << l << " " << m;
          }
        }
      }
    }
  }
}

/// Those of the loss of the tokens that every expert ran for, times their inverse share.
TEST(PermutationSearch, SampledScores) {
  for (const Kind kind : kKinds) {
    const Model model = random_model(kind, PermScope::kShared, 5, 47);
    scramble(*model.layer, 6);
    const auto loss_of = [&](const Tensor& kept) {
      const Tensor error = model.layer->forward(model.tokens).output() - model.target[0];
      return error.index_select(0, kept).square().sum();
    };
    PermutationSearchOptions options;
    options.max_probe_tokens = 9;  // of 24: every third
    const Tensor sampled = PermutationSearch(*model.layer, options).scores(1, [&](size_t) {
      return loss_of(at::arange(24));
    })[0];
    const Tensor expected = PermutationSearch(*model.layer).scores(1, [&](size_t) {
      return loss_of(at::arange(0, 24, 3));
    })[0];
    EXPECT_TRUE(close_to(sampled, expected * 3, 1e-12));
  }
}

// ---- Stacked layers ----

/// Two layers, the first below the second; its outputs have the width of tokens.
struct Stack : torch::nn::Module {
  explicit Stack(const ParallelGroups& groups, PermSearch second = PermSearch::kSwap) {
    const comm::Group& ep = groups.expert_parallel;
    const auto placement = ExpertPlacement::contiguous(5, ep.size());
    for (int i = 0; i < 2; ++i) {
      auto experts = std::make_shared<GroupedMLP>(
          GroupedMLPOptions(kDModel, kDFf).seed(3 + static_cast<uint64_t>(i)), placement,
          ep.rank());
      experts->to(at::kDouble);
      PermutationOptions permutation = swap_options();
      if (i == 1) permutation.search(second);
      layers.push_back(register_module(
          "layer_" + std::to_string(i),
          layer_of({gate_of_kind(Kind::kTopK, 5, i)}, experts, placement, groups, permutation)));
    }
  }
  Tensor loss(const Tensor& tokens, const Tensor& target) const {
    Tensor x = tokens;
    for (const auto& layer : layers) x = x + layer->forward(x).output();
    return (x - target).square().sum();
  }
  std::vector<std::shared_ptr<MoELayer>> layers;
};

/// Scores of both layers are derivatives of the whole model, and outputs of experts that are kept
/// are those of the order of the moment: what the report says is what the model does.
void search_stacked(int64_t max_probe_tokens) {
  std::vector<std::vector<Tensor>> maps;
  for (const int num_ranks : {1, 2}) {
    maps.emplace_back();
    comm::run_local(num_ranks, [&](const comm::Group& world) {
      auto model = std::make_shared<Stack>(make_parallel_groups(world));
      for (size_t i = 0; i < 2; ++i) scramble(*model->layers[i], 7 + i);
      const int64_t count = 20 / num_ranks;
      const Tensor tokens =
          random_tensor({20, kDModel}, 50, -1, 1).narrow(0, world.rank() * count, count);
      const Tensor target =
          random_tensor({20, kDModel}, 51, -2, 2).narrow(0, world.rank() * count, count);
      const auto loss = [&](size_t) { return model->loss(tokens, target); };
      PermutationSearchOptions options;
      options.exhaustive_up_to = 0;
      options.max_evaluations = 200;
      options.max_probe_tokens = max_probe_tokens;
      const PermutationReport report = PermutationSearch(*model, options).search_now(1, loss);
      model->eval();
      const at::NoGradGuard no_grad;
      double after = model->loss(tokens, target).item<double>();
      double sum = after;
      comm::all_reduce(&sum, 1, comm::ReduceOp::kSum, world);
      EXPECT_NEAR(sum, report.loss_after, 1e-12 * sum);
      EXPECT_GE(report.moves.size(), 2u);
      EXPECT_LT(report.loss_after, report.loss_before);
      if (world.rank() == 0) {
        for (const auto& layer : model->layers) {
          maps.back().push_back(layer->permutations().front()->host_map());
        }
      }
    });
  }
  for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(maps[0][i].equal(maps[1][i]));
}

TEST(PermutationSearch, StackedLayers) { search_stacked(1024); }
TEST(PermutationSearch, StackedSampled) { search_stacked(6); }  // every fourth token of all ranks

TEST(PermutationSearch, StackedScores) {
  constexpr int64_t E = 5;
  auto model = std::make_shared<Stack>(make_parallel_groups(comm::Group()));
  const Tensor tokens = random_tensor({20, kDModel}, 50, -1, 1);
  const Tensor target = random_tensor({20, kDModel}, 51, -2, 2);
  const std::vector<Tensor> scores =
      PermutationSearch(*model).scores(1, [&](size_t) { return model->loss(tokens, target); });
  // The derivative along the weight of an expert that gates select is that of the pair's weight:
  // M[l, l] is the sum of w dL/dw over the tokens of output l.
  model->eval();
  for (size_t i = 0; i < 2; ++i) {
    LayerProbe probe;
    probe.record = true;
    model->layers[i]->set_probe(&probe);
    const Tensor loss = model->loss(tokens, target);
    const Tensor grad = torch::autograd::grad({loss}, {probe.delta})[0].squeeze(1);
    model->layers[i]->set_probe(nullptr);
    const Tensor expected = at::zeros({E}, at::kDouble)
                                .index_add(0, probe.pairs.expert_idx.to(at::kLong),
                                           probe.pairs.weights.detach() * grad);
    EXPECT_TRUE(close_to(scores[i].diagonal(), expected, 1e-10)) << "layer " << i;
  }
}

// ---- State ----

TEST(PermutationSearch, KeepsState) {
  const Model model = random_model(Kind::kComet, PermScope::kPerTree, 7, 44);
  MoELayer& layer = *model.layer;
  scramble(layer, 2);
  layer.train();
  layer.gates().front()->eval();
  for (Tensor& parameter : layer.parameters()) parameter.mutable_grad() = at::ones_like(parameter);
  std::vector<Tensor> before;
  for (const Tensor& parameter : layer.parameters()) before.push_back(parameter.detach().clone());
  at::manual_seed(5);
  const Tensor expected_draw = at::rand({3});
  at::manual_seed(5);
  const PermutationReport report = PermutationSearch(layer).search_now(2, [&](size_t) {
    at::rand({7});
    EXPECT_FALSE(layer.is_training());
    return model.loss();
  });
  EXPECT_GE(report.moves.size(), 1u);
  EXPECT_TRUE(at::rand({3}).equal(expected_draw));
  EXPECT_TRUE(layer.is_training());
  EXPECT_TRUE(layer.experts()->is_training());
  EXPECT_FALSE(layer.gates().front()->is_training());
  const std::vector<Tensor> after = layer.parameters();
  for (size_t i = 0; i < before.size(); ++i) {
    const Tensor& parameter = after[i];
    EXPECT_TRUE(parameter.equal(before[i]));
    EXPECT_TRUE(parameter.grad().equal(at::ones_like(parameter)));
  }
}

/// No tokens to compare orders by, or one expert: nothing changes.
TEST(PermutationSearch, NothingToDo) {
  const auto layer = constant_layer(make_parallel_groups(comm::Group()), kConstants);
  scramble(*layer, 1);
  const Tensor map = layer->permutations().front()->host_map();
  const PermutationReport report = PermutationSearch(*layer).search_now(
      2, [&](size_t) { return constant_loss(*layer, 0, 0, 1, kConstants); });
  EXPECT_TRUE(report.moves.empty());
  EXPECT_TRUE(layer->permutations().front()->host_map().equal(map));

  const auto one = constant_layer(make_parallel_groups(comm::Group()), 1);
  const PermutationReport of_one = PermutationSearch(*one).search_now(
      1, [&](size_t) { return constant_loss(*one, 0, 4, 4, 1); });
  EXPECT_TRUE(of_one.moves.empty());
  EXPECT_EQ(of_one.loss_after, 0);
}

// ---- Wrong use ----

TEST(PermutationSearch, Refuses) {
  const Model model = random_model(Kind::kTopK, PermScope::kShared, 4, 45);
  const auto search = [&](auto change) {
    PermutationSearchOptions options;
    change(options);
    return [&model, options] { model.search(options); };
  };
  const auto held = [&](size_t) { return model.loss(); };
  const ParallelGroups groups = make_parallel_groups(comm::Group());
  LayerCase plain;
  const auto without = make_layer(plain, groups);
  const std::vector<Refused> table = {
      {search([](auto& o) { o.max_evaluations = 0; }), "permutation_search", "max_evaluations", "0",
       "below 1"},
      {search([](auto& o) { o.candidates_per_round = 0; }), "permutation_search",
       "candidates_per_round", "0", "below 1"},
      {search([](auto& o) { o.min_relative_gain = NAN; }), "permutation_search",
       "min_relative_gain", "nan", "finite"},
      {search([](auto& o) { o.max_probe_tokens = 0; }), "permutation_search", "max_probe_tokens",
       "0", "below 1"},
      {search([](auto& o) { o.max_bytes = 100; }), "moe_layer", "probe.bytes", "3072",
       "max_bytes=100"},
      {[&] { PermutationSearch(*model.layer).search_now(0, held); }, "permutation_search",
       "num_batches", "0", "held batches"},
      {[&] { PermutationSearch(*model.layer).search_now(1, nullptr); }, "permutation_search",
       "held_loss", "none", "function"},
      {[&] { PermutationSearch(*model.layer).search_now(1, [](size_t) { return Tensor(); }); },
       "permutation_search", "held_loss", "undefined", "scalar"},
      {[&] {
         PermutationSearch(*model.layer).search_now(1, [&](size_t) {
           model.loss();
           return model.loss();
         });
       },
       "permutation_search", "num_forwards", "2", "num_batches=1"},
      {[&] { PermutationSearch of_plain(*without); }, "permutation_search", "model", "moe_layer",
       "MoELayerOptions::permutation"},
  };
  for (const Refused& row : table) expect_refused(row);

  for (const double loss : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    expect_refused<Diverged>({[&] {
                                PermutationSearch(*model.layer).search_now(1, [&](size_t) {
                                  return model.loss() * 0 + loss;
                                });
                              },
                              "permutation_search", "held_loss", std::isnan(loss) ? "nan" : "inf",
                              "not finite"});
  }
}

/// A loss that is not finite for some orders: they are not taken.
TEST(PermutationSearch, AvoidsNaN) {
  const Model model = random_model(Kind::kTopK, PermScope::kShared, 7, 46);
  scramble(*model.layer, 9);
  int calls = 0;
  const PermutationReport report = PermutationSearch(*model.layer).search_now(1, [&](size_t) {
    const Tensor loss = model.loss();
    return ++calls % 3 == 0 ? loss * NAN : loss;
  });
  EXPECT_TRUE(std::isfinite(report.loss_after));
  EXPECT_LE(report.loss_after, report.loss_before);
  EXPECT_NEAR(model.loss().item<double>(), report.loss_after, 1e-12);
}

/// An error in the middle of a round: the order is the best one so far, and layers work as before.
TEST(PermutationSearch, Interrupted) {
  const Model model = random_model(Kind::kTopK, PermScope::kShared, 7, 47);
  scramble(*model.layer, 3);
  const Tensor start = model.layer->permutations().front()->host_map();
  const double before = model.loss().item<double>();
  for (const int limit : {2, 5, 12, 15}) {
    model.layer->permutations().front()->set_map(start);
    int calls = 0;
    EXPECT_THROW(PermutationSearch(*model.layer)
                     .search_now(1,
                                 [&](size_t) {
                                   if (++calls == limit) {
                                     throw DataError({"test", "", "", ""});
                                   }
                                   return model.loss();
                                 }),
                 DataError);
    EXPECT_LE(model.loss().item<double>(), before * (1 + 1e-12));
    if (limit < 11) {
      EXPECT_TRUE(model.layer->permutations().front()->host_map().equal(start));
    }
  }
}

}  // namespace
}  // namespace perseid::testing
