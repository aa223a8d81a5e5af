// Layers whose gates meet experts in another order, float64.
//   EqualsDense      every gate, soft and hard: outputs and all gradients = every expert run on every
//                    token with weights of a formula, 1e-12
//   Ranks            1, 2 and 4 ranks, one of them empty, equal one process, phi as well, 1e-12
//   BalancingBias    moves by the outputs of the gate, not by the experts
//   Training         a relaxed order through its whole stage: equal on all ranks, saved and loaded
//   Refuses          scopes without trees, ranks with different orders
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>

#include <map>
#include <mutex>
#include <sstream>

#include "gates/tree_gate.h"
#include "moe/gradients.h"
#include "tests/moe/conformance_gates.h"
#include "tests/refused.h"

namespace perseid::testing {
namespace {

using at::Tensor;
using gates::PermScope;
using gates::PermSearch;
using gates::PermutationOptions;

constexpr int64_t kE = 6, kTokens = 13;

std::shared_ptr<MoELayer> layer_of(const std::vector<std::shared_ptr<gates::Gate>>& gates,
                                   const ParallelGroups& groups, PermutationOptions permutation) {
  const comm::Group& ep = groups.expert_parallel;
  const auto placement = ExpertPlacement::contiguous(kE, ep.size());
  MoELayerOptions options;
  options.permutation = permutation.until(.5);
  auto layer = std::make_shared<MoELayer>(
      gates, make_experts(ExpertKind::kGatedBias, placement, ep.rank(), at::kDouble), placement,
      groups, options);
  // Maps and relaxed orders far from the identity, equal on all ranks.
  uint64_t seed = 60;
  const at::NoGradGuard no_grad;
  for (const auto& p : layer->permutations()) {
    p->to(at::kDouble);
    const Tensor keys = random_tensor({p->num_units(), kE}, seed++, 0, 1);
    p->set_map(keys.argsort(1));
    if (p->phi.defined()) p->phi.copy_(random_tensor(p->phi.sizes(), seed++, -2e-3, 2e-3));
  }
  return layer;
}

MoEInput input_of(const Tensor& tokens, int64_t first, double progress) {
  MoEInput input(tokens);
  input.keys = at::arange(first, first + tokens.size(0)).mul(7);
  input.progress = progress;
  return input;
}

/// The mix of all experts by a formula: weights by output, then the order, hard or relaxed.
Tensor dense_output(MoELayer& layer, size_t g, const MoEInput& in) {
  gates::GateInput input;
  input.tokens = in.tokens;
  input.keys = in.keys;
  input.progress = in.progress;
  input.training = layer.is_training();
  gates::Gate& gate = *layer.gates()[g];
  const gates::ExpertPermutation& p =
      *layer.permutations()[layer.permutations().size() == 1 ? 0 : g];
  const bool per_tree = p.options().scope() == PermScope::kPerTree;
  const Tensor by_output =
      per_tree ? dynamic_cast<gates::TreeGate&>(gate).tree_weights(input)
               : gates::dense_weights(gate.forward(input).routing, kE).unsqueeze(1);
  Tensor order = at::zeros({p.num_units(), kE, kE}, at::kDouble)
                     .scatter(2, p.expert_map.to(at::kLong).unsqueeze(2), 1);
  if (p.is_soft(input)) order = p.relaxed_now(in.progress);
  Tensor weights = at::einsum("tul,ulm->tm", {by_output, order});
  if (p.is_soft(input)) {
    weights = weights / weights.sum(1, true).clamp_min(1e-300) * by_output.sum({1, 2}).unsqueeze(1);
  }
  Tensor y = at::zeros({in.tokens.size(0), kDOut}, at::kDouble);
  for (int64_t e = 0; e < kE; ++e) {
    y = y + weights.narrow(1, e, 1) * dense_expert(*layer.experts(), e, in.tokens);
  }
  return y;
}

struct Step {
  std::vector<Tensor> outputs;
  Tensor tokens;
  std::map<std::string, Tensor> gradients;
};

template <typename Forward>
Step step_of(MoELayer& layer, const Tensor& values, double progress, Forward&& forward) {
  for (Tensor& parameter : layer.parameters()) parameter.mutable_grad() = Tensor();
  const Tensor tokens = values.clone().set_requires_grad(true);
  Step step;
  step.outputs = forward(input_of(tokens, 0, progress));
  weighted_loss(step.outputs, 0).backward();
  step.tokens = tokens.grad();
  for (const auto& parameter : layer.named_parameters()) {
    const Tensor& grad = parameter.value().grad();
    step.gradients[parameter.key()] = grad.defined() ? grad.clone() : at::zeros_like(parameter.value());
  }
  return step;
}

/// Options of a search, and how far the training is: 0 is in the soft stage of kSinkhorn.
struct Case {
  PermSearch search;
  PermScope scope;
  double progress;
};
const std::vector<Case>& cases() {
  static const std::vector<Case> list = {
      {PermSearch::kSwap, PermScope::kShared, 0},      {PermSearch::kSwap, PermScope::kPerGate, 0},
      {PermSearch::kSinkhorn, PermScope::kShared, 0},  {PermSearch::kSinkhorn, PermScope::kPerGate, 0},
      {PermSearch::kSinkhorn, PermScope::kShared, .7}, {PermSearch::kSwap, PermScope::kPerTree, 0},
      {PermSearch::kSinkhorn, PermScope::kPerTree, 0}};
  return list;
}

class LayerPermutation : public ::testing::TestWithParam<ConformingGate> {
 protected:
  void SetUp() override { at::set_num_threads(1); }
  static std::vector<std::shared_ptr<gates::Gate>> gates(int count) {
    std::vector<std::shared_ptr<gates::Gate>> list;
    for (int g = 0; g < count; ++g) list.push_back(GetParam().make({kE, 2, g}));
    return list;
  }
  static bool has_trees() {
    return dynamic_cast<gates::TreeGate*>(gates(1).front().get()) != nullptr;
  }
  /// Weights that a cut-off removes are still in the formula by trees.
  static bool has_cut_off() {
    return std::string(GetParam().name).find("min_weight") != std::string::npos;
  }
};
INSTANTIATE_TEST_SUITE_P(All, LayerPermutation, ::testing::ValuesIn(conforming_gates()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(LayerPermutation, EqualsDense) {
  for (const Case& c : cases()) {
    if (c.scope == PermScope::kPerTree && (!has_trees() || has_cut_off())) continue;
    for (const int num_gates : {1, 2}) {
      SCOPED_TRACE(std::to_string(static_cast<int>(c.search)) + " " +
                   std::to_string(static_cast<int>(c.scope)) + " " + std::to_string(num_gates));
      const auto layer =
          layer_of(gates(num_gates), make_parallel_groups(comm::self_group()),
                   PermutationOptions().search(c.search).scope(c.scope));
      const Tensor tokens = case_tokens(kTokens);
      const Step sparse = step_of(*layer, tokens, c.progress,
                                  [&](const MoEInput& in) { return layer->forward(in).outputs; });
      const Step dense = step_of(*layer, tokens, c.progress, [&](const MoEInput& in) {
        std::vector<Tensor> outputs;
        for (size_t g = 0; g < layer->gates().size(); ++g) {
          outputs.push_back(dense_output(*layer, g, in));
        }
        return outputs;
      });
      for (size_t g = 0; g < sparse.outputs.size(); ++g) {
        EXPECT_TRUE(close_to(sparse.outputs[g], dense.outputs[g], 1e-11));
      }
      EXPECT_TRUE(close_to(sparse.tokens, dense.tokens, 1e-10));
      for (const auto& [name, expected] : dense.gradients) {
        // phi is divided by the temperature, and rounding with it.
        const double tolerance = name.find("phi") != std::string::npos ? 1e-8 : 1e-10;
        EXPECT_LE((sparse.gradients.at(name) - expected).abs().max().item<double>(),
                  tolerance * (1 + expected.abs().max().item<double>()))
            << name;
      }
      if (HasFailure()) return;
    }
  }
}

struct RankStep {
  Tensor outputs, tokens;
  std::map<std::string, Tensor> gradients;  ///< experts by "name/global id"
  double loss = 0;
};

std::vector<RankStep> run_ranks(const ConformingGate& gate, const Case& c, int num_ranks) {
  std::vector<RankStep> steps(static_cast<size_t>(num_ranks));
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    const ParallelGroups groups = make_parallel_groups(world);
    const auto layer = layer_of({gate.make({kE, 2, 0}), gate.make({kE, 2, 1})}, groups,
                                PermutationOptions().search(c.search).scope(c.scope));
    // The last of several ranks has no tokens.
    const int sharers = std::max(1, num_ranks - 1);
    const int64_t each = kTokens / sharers, first = world.rank() * each;
    const int64_t count = world.rank() >= sharers       ? 0
                          : world.rank() + 1 == sharers ? kTokens - first
                                                        : each;
    const int64_t begin = world.rank() >= sharers ? kTokens : first;
    const Tensor tokens =
        case_tokens(kTokens).narrow(0, begin, count).clone().set_requires_grad(true);
    const MoEOutput out = layer->forward(input_of(tokens, begin, c.progress));
    const Tensor loss = weighted_loss(out.outputs, begin) + out.loss();
    loss.backward();
    sum_gradients(*layer, groups);
    layer->after_step(out.stats);
    RankStep& step = steps[static_cast<size_t>(world.rank())];
    step.loss = loss.item<double>();
    step.outputs = at::cat(out.outputs, 1).detach();
    step.tokens = tokens.grad();
    for (const auto& parameter : layer->named_parameters()) {
      const Tensor& grad = parameter.value().grad();
      const std::string& name = parameter.key();
      if (name.rfind("experts.", 0) != 0) {
        step.gradients[name] = grad.defined() ? grad.clone() : Tensor();
        continue;
      }
      const std::vector<int64_t>& ids = layer->experts()->expert_ids();
      for (size_t slot = 0; slot < ids.size(); ++slot) {
        step.gradients[name + "/" + std::to_string(ids[slot])] =
            grad[static_cast<int64_t>(slot)].clone();
      }
    }
    for (const auto& p : layer->permutations()) {
      step.gradients["map" + std::to_string(step.gradients.size())] =
          p->host_map().to(at::kDouble);
    }
  });
  return steps;
}

TEST_P(LayerPermutation, Ranks) {
  for (const Case& c : cases()) {
    if (c.scope == PermScope::kPerTree && !has_trees()) continue;
    SCOPED_TRACE(std::to_string(static_cast<int>(c.search)) + " " +
                 std::to_string(static_cast<int>(c.scope)));
    const RankStep one = run_ranks(GetParam(), c, 1)[0];
    for (const int num_ranks : {2, 4}) {
      const std::vector<RankStep> many = run_ranks(GetParam(), c, num_ranks);
      std::vector<Tensor> outputs, tokens;
      double loss = 0;
      std::map<std::string, Tensor> gradients;
      for (const RankStep& step : many) {
        outputs.push_back(step.outputs);
        tokens.push_back(step.tokens);
        loss += step.loss;
        for (const auto& [name, grad] : step.gradients) gradients[name] = grad;
      }
      EXPECT_TRUE(close_to(at::cat(outputs), one.outputs, 1e-11));
      EXPECT_TRUE(close_to(at::cat(tokens), one.tokens, 1e-11));
      EXPECT_NEAR(loss, one.loss, 1e-11 * (1 + std::abs(one.loss)));
      for (const auto& [name, expected] : one.gradients) {
        if (name.rfind("map", 0) == 0) continue;
        ASSERT_EQ(gradients.count(name), 1u) << name;
        if (!expected.defined()) continue;
        EXPECT_LE((gradients[name] - expected).abs().max().item<double>(),
                  1e-9 * (1 + expected.abs().max().item<double>()))
            << name;
      }
      // Maps have the same bits on every rank, and as in one process.
      for (const RankStep& step : many) {
        std::vector<Tensor> maps, expected;
        for (const auto& [name, value] : step.gradients) {
          if (name.rfind("map", 0) == 0) maps.push_back(value);
        }
        for (const auto& [name, value] : one.gradients) {
          if (name.rfind("map", 0) == 0) expected.push_back(value);
        }
        ASSERT_EQ(maps.size(), expected.size());
        for (size_t i = 0; i < maps.size(); ++i) EXPECT_TRUE(maps[i].equal(expected[i]));
      }
      if (HasFailure()) return;
    }
  }
}

// ---- One gate ----

std::shared_ptr<MoELayer> top_k_layer(const ParallelGroups& groups,
                                      const PermutationOptions& options, double bias_rate = 0) {
  auto gate = random_gate<gates::TopKGate>(
      top_k_options({kE, 2, 0}).bias_update_rate(bias_rate).aux_loss_coeff(.1));
  return layer_of({gate}, groups, options);
}

TEST(LayerPermutationState, BalancingBias) {
  const ParallelGroups groups = make_parallel_groups(comm::self_group());
  const auto moved = top_k_layer(groups, PermutationOptions().search(PermSearch::kSwap), .1);
  const auto plain = top_k_layer(groups, PermutationOptions(), .1);
  const Tensor tokens = case_tokens(kTokens);
  for (const auto& layer : {moved, plain}) {
    const MoEOutput out = layer->forward(MoEInput(tokens));
    layer->after_step(out.stats);
  }
  const auto bias = [](const MoELayer& layer) {
    return dynamic_cast<gates::TopKGate&>(*layer.gates().front()).expert_bias;
  };
  EXPECT_GT(bias(*plain).abs().max().item<float>(), 0);
  EXPECT_TRUE(bias(*moved).equal(bias(*plain)));
}

/// Some steps of training, with a relaxed order until the middle: the same order on 1 and 2 ranks,
/// no gradient afterwards, and a copy that is loaded goes on with the same bits.
TEST(LayerPermutationState, Training) {
  at::set_num_threads(1);
  std::vector<Tensor> maps;
  for (const int num_ranks : {1, 2}) {
    comm::run_local(num_ranks, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world);
      const auto layer =
          top_k_layer(groups, PermutationOptions().search(PermSearch::kSinkhorn).entropy_coeff(1));
      gates::ExpertPermutation& permutation = *layer->permutations().front();
      torch::optim::Adam optimizer(layer->parameters(),
                                   torch::optim::AdamOptions(.02).weight_decay(.1));
      const int64_t count = 12 / num_ranks;
      const Tensor tokens = random_tensor({12, kDModel}, 30, -1, 1)
                                .narrow(0, world.rank() * count, count);
      Tensor frozen_phi, frozen_map;
      constexpr int kSteps = 8;
      for (int step = 0; step < kSteps; ++step) {
        const double progress = static_cast<double>(step) / kSteps;
        const MoEOutput out = layer->forward(input_of(tokens, world.rank() * count, progress));
        EXPECT_EQ(out.stats.relaxed_permutations.size(), progress < .5 ? 1u : 0u);
        EXPECT_EQ(out.stats.rows_processed, progress < .5 ? 12 * kE : 12 * 2);
        optimizer.zero_grad();
        (weighted_loss(out.outputs, world.rank() * count) + out.loss()).backward();
        sum_gradients(*layer, groups);
        EXPECT_EQ(permutation.phi.grad().defined(), progress < .5);
        optimizer.step();
        layer->after_step(out.stats);
        if (progress == .5) {
          frozen_phi = permutation.phi.detach().clone();
          frozen_map = permutation.host_map();
        }
      }
      EXPECT_TRUE(permutation.phi.equal(frozen_phi));
      EXPECT_TRUE(permutation.host_map().equal(frozen_map));
      if (world.rank() > 0) return;
      maps.push_back(permutation.host_map());
      if (num_ranks > 1) return;

      std::stringstream file;
      torch::serialize::OutputArchive archive;
      layer->save(archive);
      archive.save_to(file);
      const auto copy =
          top_k_layer(groups, PermutationOptions().search(PermSearch::kSinkhorn).entropy_coeff(1));
      torch::serialize::InputArchive loaded;
      loaded.load_from(file);
      copy->load(loaded);
      EXPECT_TRUE(copy->permutations().front()->host_map().equal(frozen_map));
      layer->eval();
      copy->eval();
      EXPECT_TRUE(copy->forward(MoEInput(tokens)).output().equal(
          layer->forward(MoEInput(tokens)).output()));
    });
  }
  ASSERT_EQ(maps.size(), 2u);
  EXPECT_TRUE(maps[0].equal(maps[1]));
  EXPECT_FALSE(maps[0].equal(at::arange(kE, at::kInt).unsqueeze(0)));
}

TEST(LayerPermutationState, MicroBatches) {
  const ParallelGroups groups = make_parallel_groups(comm::self_group());
  const auto layer = top_k_layer(groups, PermutationOptions().search(PermSearch::kSinkhorn));
  MoEOutput first = layer->forward(MoEInput(case_tokens(5)));
  const MoEOutput second = layer->forward(MoEInput(case_tokens(7)));
  first.stats += second.stats;
  EXPECT_EQ(first.stats.relaxed_permutations.size(), 1u);
  EXPECT_NO_THROW(layer->after_step(first.stats));
}

TEST(LayerPermutationState, Refuses) {
  const ParallelGroups groups = make_parallel_groups(comm::self_group());
  const auto with = [&](PermutationOptions options) {
    return [&groups, options] { top_k_layer(groups, options); };
  };
  expect_refused({with(PermutationOptions().search(PermSearch::kSwap).scope(PermScope::kPerTree)),
                  "moe_layer", "permutation.scope", "per_tree", "top_k_gate has none"});
  expect_refused({with(PermutationOptions().search(PermSearch::kSinkhorn).entropy_coeff(NAN)),
                  "moe_layer", "permutation.entropy_coeff", "nan", ""});
  const auto layer = top_k_layer(groups, PermutationOptions().search(PermSearch::kSwap));
  MoEOutput out = layer->forward(MoEInput(case_tokens(5)));
  out.stats.relaxed_permutations.resize(3);
  expect_refused({[&] { layer->after_step(out.stats); }, "moe_layer", "stats.relaxed_permutations",
                  "3", "1 permutations"});

  std::mutex mutex;
  int refused = 0;
  comm::run_local(2, [&](const comm::Group& world) {
    const auto mine =
        top_k_layer(make_parallel_groups(world), PermutationOptions().search(PermSearch::kSwap));
    if (world.rank() == 1) {
      mine->permutations().front()->set_map(at::arange(kE).unsqueeze(0));
    }
    try {
      mine->forward(MoEInput(case_tokens(4)));
    } catch (const RanksDisagree& error) {
      const std::lock_guard lock(mutex);
      refused += error.detail().argument == "expert_map.hash" ? 1 : 0;
    }
  });
  EXPECT_EQ(refused, 2);
}

}  // namespace
}  // namespace perseid::testing
