// The Sparsifier on the experts of a layer, over ranks (threads), float64.
//   SameMasks      P = 1, 2, 4, 8, any ep_size; static, SET, RigL, staggered, constant fan-in: the
//                  masks of one process, per global expert; weights within 1e-11
//   SameBits       one replica of each expert, strict: weights too, bit for bit
//   IgnoresOrder   other host seeds on each rank and shuffled units: the same masks
//   RowsOfThePlan  rows of each expert: once for two gates, after capacity, of all ranks
//   Idle           an expert without tokens is skipped and unchanged; one token, a gradient of
//                  rank 1, keeps the budget
//   Checkpoint     P 4 -> 2 -> 8 inside a window of gradients: the run of one process; the same P:
//                  bit for bit
//   Units          names and keys of experts of all kinds, shared ones and modules; patterns
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/embedding.h>
#include <torch/optim/adam.h>

#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_ranks_fixture.h"

namespace perseid::testing {
namespace {

TEST(SparseRanks, SameMasks) {
  at::set_num_threads(1);
  SparsifierConfig rigl = config_of(GrowCriterion::kGrad);
  rigl.grad_accum = 2;
  SparsifierConfig staggered = config_of(GrowCriterion::kGrad);
  staggered.schedule.stagger = true;
  staggered.schedule.every = 4;
  SparsifierConfig instead = config_of(GrowCriterion::kGrad, UpdateOrder::kInsteadOfStep);
  SparsifierConfig set = config_of(GrowCriterion::kRandom, UpdateOrder::kAfterStep);
  set.rule.drop = DropCriterion::kSetSigned;
  set.state.weight = GrownWeight::kNormal;
  SparsifierConfig fan_in = config_of(GrowCriterion::kGrad);
  fan_in.structure = Structure::constant_fan_in();
  const std::vector<SparsifierConfig> configs = {
      presets::static_mask(0.5), set, rigl, staggered, instead, fan_in};
  for (size_t c = 0; c < configs.size(); ++c) {
    const Trained one = train(1, 1, configs[c]);
    EXPECT_EQ(one.totals.size, 708);  // (5 + 1) (2 * 6 * 7 + 7 * 4) + 4 * 9
    if (c < 5) {
      EXPECT_EQ(one.totals.nnz, 354);
    }
    EXPECT_EQ(one.num_grown > 20, c > 0) << c;
    for (const auto& [num_ranks, ep_size] : layouts()) {
      SCOPED_TRACE("config " + std::to_string(c) + " P=" + std::to_string(num_ranks) +
                   " ep=" + std::to_string(ep_size));
      const Trained many = train(num_ranks, ep_size, configs[c]);
      expect_close(many, one, 1e-11);
      EXPECT_EQ(many.totals.nnz, one.totals.nnz);
      EXPECT_EQ(many.totals.size, one.totals.size);
      EXPECT_EQ(many.totals.ever_active, one.totals.ever_active);
      EXPECT_EQ(many.totals.num_updates, one.totals.num_updates);
      EXPECT_NEAR(many.totals.churn, one.totals.churn, 1e-12);
    }
  }
}

TEST(SparseRanks, SameBits) {
  at::set_num_threads(1);
  for (const GrowCriterion grow : {GrowCriterion::kRandom, GrowCriterion::kGrad}) {
    RunOptions options;
    options.has_head = false;
    const Trained one = train(1, 1, config_of(grow), options);
    for (const int num_ranks : {2, 4}) {
      const Trained many = train(num_ranks, num_ranks, config_of(grow), options);
      EXPECT_EQ(many.masks, one.masks);
      for (const auto& [key, weight] : one.weights) {
        EXPECT_TRUE(same_bits(weight, many.weights.at(key))) << to_string(key) << " " << num_ranks;
      }
    }
  }
}

TEST(SparseRanks, IgnoresOrder) {
  at::set_num_threads(1);
  SparsifierConfig config = config_of(GrowCriterion::kRandom);
  config.schedule.stagger = true;
  RunOptions shuffled;
  shuffled.shuffles = true;
  const Trained plain = train(4, 2, config), other = train(4, 2, config, shuffled);
  EXPECT_EQ(plain.masks, other.masks);
  for (const auto& [key, weight] : plain.weights) {
    EXPECT_TRUE(same_bits(weight, other.weights.at(key))) << to_string(key);
  }
}

TEST(SparseRanks, RowsOfThePlan) {
  at::set_num_threads(1);
  for (const ExpertKind kind : {ExpertKind::kPlain, ExpertKind::kLinear, ExpertKind::kModule}) {
    for (const int num_ranks : {1, 2, 4}) {
      for (int64_t ep_size = 1; ep_size <= num_ranks; ep_size *= 2) {
        comm::run_local(num_ranks, [&](const comm::Group& world) {
          const ParallelGroups groups = make_parallel_groups(world, ep_size);
          LayerCase c{kE, 2, kTokens, 2, kind, {}};
          c.capacity.capacity_factor = .8;
          const auto layer = make_layer(c, groups);
          Sparsifier sparsifier(layer->experts()->sparse_units(0),
                                config_of(GrowCriterion::kRandom), groups);
          const auto [first, count] = shard(world.rank(), num_ranks);
          int64_t rows = 0, num_dropped = 0;
          for (int64_t pass = 0; pass < 2; ++pass) {  // two micro-batches of step 0
            if (pass == 0) sparsifier.begin_step(0);
            const MoEOutput out =
                layer->forward(MoEInput(case_tokens(kTokens).narrow(0, first, count)));
            {
              const at::NoGradGuard no_grad;
              layer->forward(MoEInput(case_tokens(count)));
            }
            weighted_loss(out.outputs, first).backward();
            rows += out.stats.rows_processed;
            num_dropped += out.stats.num_dropped;
          }
          EXPECT_GT(num_dropped, 0);
          sum_gradients(*layer, groups);
          sparsifier.end_backward(0);
          sparsifier.end_step(0);
          std::map<Matrix, int64_t> counted;
          for (const UnitState& unit : sparsifier.state_dict().units) {
            counted[unit.key.matrix] += unit.num_rows;
          }
          for (const auto& [matrix, number] : counted) EXPECT_EQ(number, rows) << num_ranks;
        });
      }
    }
  }
}

TEST(SparseRanks, Idle) {
  at::set_num_threads(1);
  for (const int num_ranks : {1, 2}) {
    comm::run_local(num_ranks, [&](const comm::Group& world) {
      const ParallelGroups groups = make_parallel_groups(world);
      SparseModel model(groups, false,
                        std::make_shared<TableGate>(3, 3));  // expert 3: token 0; 4: none
      const std::vector<SparseUnit> units = model.units();
      Sparsifier sparsifier(units, config_of(GrowCriterion::kGrad), groups);
      torch::optim::Adam optimizer(model.parameters(), torch::optim::AdamOptions(0.01));
      sparsifier.attach(optimizer);
      const SparsifierState first = sparsifier.state_dict();
      std::map<UnitKey, at::Tensor> weights;
      for (const SparseUnit& unit : units) weights[unit.key] = unit.weight().clone();
      for (int64_t step = 0; step < 5; ++step) {
        sparsifier.begin_step(step);
        optimizer.zero_grad();
        model.backward(step);
        sum_gradients(model, groups);
        for (const UnitUpdate& update : sparsifier.end_backward(step).units) {
          const bool is_idle = update.key.expert == 4;
          EXPECT_EQ(update.skipped, is_idle ? SkipReason::kFewRows : SkipReason::kNotSkipped)
              << to_string(update.key);
          EXPECT_EQ(update.num_grown > 0, !is_idle) << to_string(update.key);
        }
        optimizer.step();
        sparsifier.end_step(step);
      }
      const SparsifierState last = sparsifier.state_dict();
      ASSERT_EQ(last.units.size(), 15u);
      for (size_t u = 0; u < 15; ++u) {
        EXPECT_EQ(last.units[u].mask.count(), first.units[u].mask.count());
        const bool is_idle = last.units[u].key.expert == 4;
        EXPECT_EQ(last.units[u].mask == first.units[u].mask, is_idle);
        EXPECT_EQ(last.units[u].num_skipped, is_idle ? 2 : 0);
        EXPECT_EQ(last.units[u].num_updates, is_idle ? 0 : 2);
      }
      for (const SparseUnit& unit : units) {
        if (unit.key.expert != 4) continue;
        const auto& state = static_cast<const torch::optim::AdamParamState&>(
            *optimizer.state().at(unit.parameter.unsafeGetTensorImpl()));
        EXPECT_EQ(unit.part_of(state.exp_avg()).abs().max().item<double>(), 0);
        EXPECT_EQ(unit.part_of(state.exp_avg_sq()).abs().max().item<double>(), 0);
        const at::Tensor mask =
            position_mask(sparsifier.layout(unit.key), sparsifier.mask(unit.key));
        EXPECT_TRUE(same_bits(unit.weight(), weights[unit.key] * mask)) << unit.name;
      }
    });
  }
}

TEST(SparseRanks, Checkpoint) {
  at::set_num_threads(1);
  for (const GrowCriterion grow : {GrowCriterion::kGrad, GrowCriterion::kUnfired}) {
    SparsifierConfig config = config_of(grow);
    config.schedule.every = 4;
    config.schedule.stagger = true;
    config.grad_accum = 3;
    const Trained one = train(1, 1, config);
    const auto piece = [&](auto... arguments) { return train_piece(config, arguments...); };
    const Trained a = piece(4, 2, 0, 4, nullptr);
    if (grow == GrowCriterion::kGrad) {
      int64_t num_sums = 0;
      for (const UnitState& unit : a.state.units) num_sums += unit.grad_sum.defined() ? 1 : 0;
      EXPECT_GT(num_sums, 3);
    }
    const Trained b = piece(2, 1, 4, 9, &a);
    const Trained c = piece(8, 4, 9, 13, &b);
    expect_close(c, one, 1e-11);
    EXPECT_EQ(c.totals.num_updates, one.totals.num_updates);
    EXPECT_EQ(c.totals.ever_active, one.totals.ever_active);
    // The same ranks: bit for bit.
    const Trained whole = piece(4, 2, 0, 13, nullptr);
    const Trained half = piece(4, 2, 0, 6, nullptr);
    const Trained rest = piece(4, 2, 6, 13, &half);
    expect_same_bits(whole, rest);
  }
}

std::vector<std::string> names_of(const std::vector<SparseUnit>& units) {
  std::vector<std::string> names;
  for (const SparseUnit& unit : units) names.push_back(unit.name);
  return names;
}

struct Mixed : torch::nn::Module {
  Mixed() {
    layer = register_module("layer", make_layer(LayerCase(), ParallelGroups()));
    words = register_module("words", torch::nn::Embedding(4, 6));
    tail = register_module("tail", torch::nn::Linear(4, 3));
    head = register_module("head", torch::nn::Linear(4, 3));
  }
  std::shared_ptr<MoELayer> layer;
  torch::nn::Embedding words{nullptr};
  torch::nn::Linear tail{nullptr}, head{nullptr};
};

TEST(SparseRanks, Units) {
  const auto placement = ExpertPlacement::contiguous(4, 2);
  const auto gated = make_experts(ExpertKind::kGatedBias, placement, 1, at::kDouble);
  const auto units = gated->sparse_units(7);
  EXPECT_EQ(names_of(units), (std::vector<std::string>{"layer7.expert2.w1", "layer7.expert2.w3",
                                                       "layer7.expert2.w2", "layer7.expert3.w1",
                                                       "layer7.expert3.w3", "layer7.expert3.w2"}));
  EXPECT_EQ(units[1].key, (UnitKey{7, 2, Matrix::kW3}));
  auto& mlp = dynamic_cast<GroupedMLP&>(*gated);
  EXPECT_TRUE(units[4].weight().equal(mlp.up_proj[1].narrow(0, kDFf, kDFf)));
  EXPECT_TRUE(units[5].weight().equal(mlp.down_proj[1]));
  EXPECT_EQ(names_of(gated->sparse_units(0, "w2")).size(), 2u);
  EXPECT_EQ(config_error([&] { gated->sparse_units(0, "w4"); }),
            "[grouped_mlp] pattern=w4 fits none of w1, w3, w2; correct it");
  EXPECT_EQ(names_of(make_experts(ExpertKind::kPlain, placement, 0, at::kDouble)->sparse_units(0)),
            (std::vector<std::string>{"layer0.expert0.w1", "layer0.expert0.w2", "layer0.expert1.w1",
                                      "layer0.expert1.w2"}));
  EXPECT_EQ(names_of(make_experts(ExpertKind::kLinear, placement, 1, at::kDouble)->sparse_units(0)),
            (std::vector<std::string>{"layer0.expert2.w1", "layer0.expert3.w1"}));

  const auto modules = make_experts(ExpertKind::kModule, placement, 1, at::kDouble);
  const auto firsts = modules->sparse_units(1, "first.*");
  EXPECT_EQ(names_of(firsts), (std::vector<std::string>{"layer1.expert2.first.weight",
                                                        "layer1.expert3.first.weight"}));
  EXPECT_EQ(firsts[1].key, (UnitKey{1, 3, numbered_matrix(0)}));
  EXPECT_EQ(modules->sparse_units(1, "second.*")[0].key, (UnitKey{1, 2, numbered_matrix(1)}));
  EXPECT_EQ(config_error([&] { modules->sparse_units(1, "third*"); }),
            "[module_experts] pattern=third* fits none of first.weight, second.weight; correct it");

  const auto shared =
      make_experts(ExpertKind::kGated, ExpertPlacement::contiguous(1, 1), 0, at::kDouble);
  shared->set_replicated(true);
  const auto of_shared = shared->sparse_units(7, "w1");
  EXPECT_EQ(of_shared[0].name, "layer7.shared0.w1");
  EXPECT_EQ(to_string(of_shared[0].key), "layer 7, shared expert 0, w1");
  EXPECT_EQ(of_shared[0].holders, Holders::kAllRanks);

  // Gates, experts, embeddings and biases are left out.
  const Mixed mixed;
  EXPECT_EQ(names_of(sparse_units(mixed, "*", 3)),
            (std::vector<std::string>{"layer3.head.weight", "layer3.tail.weight"}));
  EXPECT_EQ(sparse_units(mixed, "tail*", 3)[0].key, (UnitKey{3, 0, numbered_matrix(1)}));
  EXPECT_NE(config_error([&] {
              sparse_units(mixed, "*bias", 3);
            }).find("pattern=*bias fits none of head.weight, tail.weight; correct it"),
            std::string::npos);
  EXPECT_NE(config_error([&] {
              sparse_units(torch::nn::EmbeddingImpl(2, 3), "*", 0);
            }).find("fits no matrix"),
            std::string::npos);
}

}  // namespace
}  // namespace perseid::testing
