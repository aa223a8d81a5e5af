// The Sparsifier with LibTorch's optimizers, float64.
//   NoCost            density 1 and static masks: training is that of the dense or masked model,
//   bit
//                     for bit
//   InactiveStayZero  100 steps of each optimizer, two passes a step, clipping: inactive weights
//   are
//                     exactly 0, the budget is exact, the norm is that of the masked gradient
//   Untouched         an update leaves weights and states of untouched entries bit for bit; dropped
//                     and grown ones are 0, or what the policy says
//   FirstStep         of a weight grown under Adam against the closed form of each policy
//   SetSignedDrops    SET moves floor(zeta * count) of each sign in a step, after the optimizer
//   InsteadOfStep     RigL leaves the parameter and its states alone in an update step
//   Experts           an expert without rows, or with too few, is skipped and unchanged; one row, a
//                     gradient of rank 1, updates; other experts do not notice
//                     Rows count from the last update that was done
//   Order             shuffled units and other units beside them: the same masks
//   Staggered         each unit once per window, none after the end, also after a resume
//   Resume            save, load into a new model, go on: the uninterrupted run, bit for bit, in a
//                     window of summed gradients too
//   LoadRefused       versions, configurations, missing units and masks off budget
//   Diverged          NaN in a gradient names unit and step, and changes nothing
#include "moe/sparsifier.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <cmath>
#include <functional>
#include <sstream>

#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"

namespace perseid {
namespace {

using testing::config_error;
using testing::normal;
using testing::train_step;
using testing::TwoWeights;
using testing::unit_of;
using torch::optim::Optimizer;

using MakeOptimizer = std::function<std::unique_ptr<Optimizer>(std::vector<at::Tensor>)>;
struct NamedOptimizer {
  const char* name;
  MakeOptimizer make;
};
std::vector<NamedOptimizer> optimizers() {
  using torch::optim::Adam;
  using torch::optim::AdamOptions;
  using torch::optim::AdamW;
  using torch::optim::AdamWOptions;
  using torch::optim::SGD;
  using torch::optim::SGDOptions;
  return {{"sgd",
           [](auto p) {
             return std::make_unique<SGD>(
                 p, SGDOptions(0.01).momentum(0.9).nesterov(true).weight_decay(0.01));
           }},
          {"adam",
           [](auto p) {
             return std::make_unique<Adam>(p, AdamOptions(0.01).weight_decay(0.01).amsgrad(true));
           }},
          {"adamw", [](auto p) {
             return std::make_unique<AdamW>(p, AdamWOptions(0.01).weight_decay(0.1));
           }}};
}

SparsifierConfig config_of(double density, GrowCriterion grow, UpdateOrder order,
                           int64_t every = 10) {
  SparsifierConfig config;
  config.budget.distribution = Distribution::kUniform;
  config.budget.density = density;
  config.rule.grow = grow;
  config.schedule.every = every;
  config.schedule.begin = every - 1;
  config.schedule.end = 90;
  config.order = order;
  return config;
}

at::Tensor mask_of(const Sparsifier& sparsifier, const SparseUnit& unit) {
  return position_mask(sparsifier.layout(unit.key), sparsifier.mask(unit.key));
}
void expect_zero_outside(const Sparsifier& sparsifier) {
  for (const SparseUnit& unit : sparsifier.units()) {
    const at::Tensor outside = unit.weight().masked_select(mask_of(sparsifier, unit).logical_not());
    ASSERT_EQ(outside.abs().sum().item<double>(), 0) << unit.name;
  }
}

/// Momentum first, then second moments.
std::vector<at::Tensor> states(Optimizer& optimizer, const at::Tensor& parameter) {
  auto* const state = optimizer.state().at(parameter.unsafeGetTensorImpl()).get();
  if (auto* sgd = dynamic_cast<torch::optim::SGDParamState*>(state)) {
    return {sgd->momentum_buffer()};
  }
  if (auto* adam = dynamic_cast<torch::optim::AdamParamState*>(state)) {
    return {adam->exp_avg(), adam->exp_avg_sq(), adam->max_exp_avg_sq()};
  }
  auto* const adamw = dynamic_cast<torch::optim::AdamWParamState*>(state);
  return {adamw->exp_avg(), adamw->exp_avg_sq()};
}
std::vector<at::Tensor> copies(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) result.push_back(tensor.detach().clone());
  return result;
}

TEST(Sparsifier, NoCost) {
  for (const auto& [name, make] : optimizers()) {
    for (const double density : {1.0, 0.4}) {
      TwoWeights sparse, plain;
      SparsifierConfig config =
          config_of(density, GrowCriterion::kGrad, UpdateOrder::kBeforeStep, 3);
      if (density < 1) config.schedule.end = 0;
      Sparsifier sparsifier(sparse.units(), config);
      const auto optimizer = make(sparse.parameters()), other = make(plain.parameters());
      sparsifier.attach(*optimizer);
      std::vector<at::Tensor> masks;
      for (size_t u = 0; u < 2; ++u) {
        masks.push_back(mask_of(sparsifier, sparsifier.units()[u]));
        plain.parameters()[u].detach().mul_(masks[u]);
      }
      for (int64_t step = 0; step < 20; ++step) {
        train_step(sparse, sparsifier, *optimizer, step);
        other->zero_grad();
        plain.backward(step);
        for (size_t u = 0; u < 2; ++u) plain.parameters()[u].mutable_grad().mul_(masks[u]);
        other->step();
      }
      for (size_t u = 0; u < 2; ++u) {
        EXPECT_TRUE(at::equal(sparse.parameters()[u], plain.parameters()[u])) << name;
        const UnitStats stats = sparsifier.stats(sparsifier.units()[u].key);
        EXPECT_EQ(stats.density, stats.ever_active);
      }
    }
  }
}

TEST(Sparsifier, InactiveStayZero) {
  for (const auto& [name, make] : optimizers()) {
    for (const GrowCriterion grow :
         {GrowCriterion::kRandom, GrowCriterion::kGrad, GrowCriterion::kUnfired}) {
      for (const UpdateOrder order :
           {UpdateOrder::kBeforeStep, UpdateOrder::kInsteadOfStep, UpdateOrder::kAfterStep}) {
        TwoWeights model;
        SparsifierConfig config = config_of(0.3, grow, order, 5);
        config.state.weight = GrownWeight::kNormal;
        config.grad_accum = 2;
        Sparsifier sparsifier(model.units(), config);
        const auto optimizer = make(model.parameters());
        sparsifier.attach(*optimizer);
        EXPECT_EQ(sparsifier.nnz(), 40);  // round(0.3 * (77 + 55))
        int64_t num_grown = 0;
        for (int64_t step = 0; step < 100; ++step) {
          const StepPlan plan = sparsifier.begin_step(step);
          optimizer->zero_grad();
          for (int64_t pass = 0; pass < 2; ++pass) model.backward(2 * step + pass);
          const std::vector<at::Tensor> dense = {model.w0.grad().clone(), model.w1.grad().clone()};
          UpdateReport report = sparsifier.end_backward(step);
          double squares = 0;
          for (size_t u = 0; u < 2; ++u) {
            if (order == UpdateOrder::kInsteadOfStep && plan.has_update()) {
              EXPECT_FALSE(model.parameters()[u].grad().defined());
              continue;
            }
            const at::Tensor masked = dense[u] * mask_of(sparsifier, sparsifier.units()[u]);
            ASSERT_TRUE(at::equal(model.parameters()[u].grad(), masked));
            squares += masked.square().sum().item<double>();
          }
          const double norm = torch::nn::utils::clip_grad_norm_(model.parameters(), 1.0);
          EXPECT_NEAR(norm, std::sqrt(squares), 1e-12 * std::sqrt(squares));
          optimizer->step();
          if (order == UpdateOrder::kAfterStep) {
            EXPECT_TRUE(report.units.empty());
            report = sparsifier.end_step(step);
          } else {
            EXPECT_TRUE(sparsifier.end_step(step).units.empty());
          }
          EXPECT_EQ(report.units.size(), plan.has_update() ? 2u : 0u);
          for (const UnitUpdate& unit : report.units) {
            EXPECT_EQ(unit.num_dropped, unit.num_grown);
            num_grown += unit.num_grown;
          }
          expect_zero_outside(sparsifier);
        }
        EXPECT_EQ(sparsifier.nnz(), 40);
        EXPECT_GT(num_grown, 50) << name;
        EXPECT_GT(sparsifier.stats({0}).ever_active, 0.4);
      }
    }
  }
}

TEST(Sparsifier, Untouched) {
  for (const auto& [name, make] : optimizers()) {
    for (const GrownSecondMoment policy : {GrownSecondMoment::kZero, GrownSecondMoment::kMean}) {
      TwoWeights model;
      SparsifierConfig config = config_of(0.4, GrowCriterion::kGrad, UpdateOrder::kBeforeStep, 100);
      config.schedule.begin = 6;
      config.state.second_moment = policy;
      Sparsifier sparsifier(model.units(), config);
      const auto optimizer = make(model.parameters());
      sparsifier.attach(*optimizer);
      for (int64_t step = 0; step < 6; ++step) train_step(model, sparsifier, *optimizer, step);
      const SparseUnit& unit = sparsifier.units()[0];
      const at::Tensor before = mask_of(sparsifier, unit);
      const at::Tensor weight = model.w0.detach().clone();
      const auto old_states = copies(states(*optimizer, model.w0));
      sparsifier.begin_step(6);
      optimizer->zero_grad();
      model.backward(6);
      const UpdateReport report = sparsifier.end_backward(6);
      EXPECT_GT(report.units[0].num_grown, 4);
      const at::Tensor after = mask_of(sparsifier, unit);
      const at::Tensor kept = before.logical_and(after);
      const at::Tensor grown = after.logical_and(before.logical_not());
      const auto at_places = [](const at::Tensor& values, const at::Tensor& mask) {
        return values.detach().masked_select(mask);
      };
      EXPECT_TRUE(at::equal(at_places(model.w0, kept), at_places(weight, kept)));
      EXPECT_TRUE(at_places(model.w0, kept.logical_not()).eq(0).all().item<bool>());
      const auto new_states = states(*optimizer, model.w0);
      for (size_t s = 0; s < new_states.size(); ++s) {
        const at::Tensor &mine = new_states[s], &old = old_states[s];
        EXPECT_TRUE(at::equal(at_places(mine, kept), at_places(old, kept))) << name << s;
        EXPECT_TRUE(at_places(mine, after.logical_not()).eq(0).all().item<bool>()) << name << s;
        const double mean = s == 0 || policy == GrownSecondMoment::kZero
                                ? 0
                                : at_places(old, kept).mean().item<double>();
        EXPECT_TRUE(at::allclose(at_places(mine, grown),
                                 at::full({grown.sum().item<int64_t>()}, mean, at::kDouble), 1e-13,
                                 0))
            << name << s;
      }
    }
  }
}

TEST(Sparsifier, FirstStep) {
  // With a step count so high that bias correction is 1, beta 0.9 and 0.999: the first step is
  // 3.1623 lr under kZero, (1 - beta1) r / sqrt(beta2 + (1 - beta2) r^2) lr under kMean.
  constexpr double kRate = 0.01, kBeta1 = 0.9, kBeta2 = 0.999;
  for (const GrownSecondMoment policy : {GrownSecondMoment::kZero, GrownSecondMoment::kMean}) {
    TwoWeights model;
    SparsifierConfig config = config_of(0.4, GrowCriterion::kGrad, UpdateOrder::kBeforeStep, 100);
    config.schedule.begin = 6;
    config.state.second_moment = policy;
    Sparsifier sparsifier(model.units(), config);
    torch::optim::Adam optimizer(model.parameters(), torch::optim::AdamOptions(kRate).eps(1e-30));
    sparsifier.attach(optimizer);
    for (int64_t step = 0; step < 6; ++step) train_step(model, sparsifier, optimizer, step);
    auto& state = static_cast<torch::optim::AdamParamState&>(
        *optimizer.state().at(model.w0.unsafeGetTensorImpl()));
    state.step(10'000'000);
    const at::Tensor before = mask_of(sparsifier, sparsifier.units()[0]);
    const at::Tensor moments = state.exp_avg_sq().clone();
    train_step(model, sparsifier, optimizer, 6);
    const at::Tensor after = mask_of(sparsifier, sparsifier.units()[0]);
    const at::Tensor grown = after.logical_and(before.logical_not());
    const double mean = moments.masked_select(before.logical_and(after)).mean().item<double>();
    const at::Tensor steps = model.w0.detach().masked_select(grown).div(kRate).abs();
    const at::Tensor r = model.w0.grad().masked_select(grown).abs().div(std::sqrt(mean));
    const at::Tensor expected =
        policy == GrownSecondMoment::kZero
            ? at::full_like(steps, (1 - kBeta1) / std::sqrt(1 - kBeta2))
            : (1 - kBeta1) * r / (kBeta2 + (1 - kBeta2) * r.square()).sqrt();
    ASSERT_GT(steps.numel(), 4);
    EXPECT_TRUE(at::allclose(steps, expected, 1e-11, 0));
  }
}

TEST(Sparsifier, SetSignedDrops) {
  TwoWeights model;
  SparsifierConfig config = presets::set(3, 4, 3);
  Sparsifier sparsifier(model.units(), config);
  torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.01).momentum(0.9));
  sparsifier.attach(optimizer);
  std::vector<int64_t> update_steps;
  for (int64_t step = 0; step < 12; ++step) {
    sparsifier.begin_step(step);
    optimizer.zero_grad();
    model.backward(step);
    sparsifier.end_backward(step);
    optimizer.step();
    const at::Tensor before = mask_of(sparsifier, sparsifier.units()[0]);
    const at::Tensor active = model.w0.detach().masked_select(before);
    const int64_t negative = active.lt(0).sum().item<int64_t>();
    const int64_t positive = active.numel() - negative;
    const UpdateReport report = sparsifier.end_step(step);
    if (report.units.empty()) continue;
    update_steps.push_back(step);
    EXPECT_EQ(report.units[0].num_dropped, negative * 3 / 10 + positive * 3 / 10);
    const at::Tensor grown =
        mask_of(sparsifier, sparsifier.units()[0]).logical_and(before.logical_not());
    const at::Tensor started = model.w0.detach().masked_select(grown);
    EXPECT_TRUE(started.ne(0).all().item<bool>());
    EXPECT_LT(started.abs().max().item<double>(), 0.5);
  }
  EXPECT_EQ(update_steps, (std::vector<int64_t>{3, 7}));  // after each epoch but the last
}

TEST(Sparsifier, InsteadOfStep) {
  TwoWeights model;
  SparsifierConfig config = presets::rigl(0.4, 100, 5);
  Sparsifier sparsifier(model.units(), config);
  torch::optim::Adam optimizer(model.parameters(), torch::optim::AdamOptions(0.01));
  sparsifier.attach(optimizer);
  for (int64_t step = 0; step < 11; ++step) {
    const at::Tensor weight = model.w0.detach().clone();
    sparsifier.begin_step(step);
    optimizer.zero_grad();
    model.backward(step);
    const UpdateReport report = sparsifier.end_backward(step);
    const at::Tensor masked = weight * mask_of(sparsifier, sparsifier.units()[0]);
    optimizer.step();
    sparsifier.end_step(step);
    EXPECT_EQ(report.units.empty(), step % 5 != 0);
    EXPECT_EQ(at::equal(model.w0, masked), step % 5 == 0);
  }
  auto& state = static_cast<torch::optim::AdamParamState&>(
      *optimizer.state().at(model.w0.unsafeGetTensorImpl()));
  EXPECT_EQ(state.step(), 8);
}

TEST(Sparsifier, Experts) {
  for (const GrowCriterion grow : {GrowCriterion::kGrad, GrowCriterion::kRandom}) {
    const at::Tensor experts = normal({4, 6, 8}, 5).requires_grad_(true);
    std::vector<SparseUnit> units =
        expert_units("experts.w1", experts, 2, Matrix::kW1, {3, 5, 8, 9});
    for (SparseUnit& unit : units) unit.counts_rows = true;
    SparsifierConfig config = config_of(0.25, grow, UpdateOrder::kBeforeStep, 4);
    config.min_rows = 1;
    Sparsifier sparsifier(units, config);
    torch::optim::Adam optimizer({experts}, torch::optim::AdamOptions(0.01));
    sparsifier.attach(optimizer);
    const std::vector<int64_t> rows = {20, 0, 1,
                                       20};  // of each step, but expert 8 of the last only
    for (int64_t step = 0; step < 4; ++step) {
      sparsifier.begin_step(step);
      optimizer.zero_grad();
      at::Tensor loss = experts.sum() * 0;
      for (int64_t e = 0; e < 4; ++e) {
        const int64_t count = e == 2 && step < 3 ? 0 : rows[static_cast<size_t>(e)];
        const at::Tensor x = normal({count, 8}, static_cast<uint64_t>(10 * step + e));
        loss = loss + x.mm(experts.select(0, e).t()).square().sum();
        sparsifier.count_rows(units[static_cast<size_t>(e)].key, count);
      }
      loss.backward();
      const at::Tensor before = experts.detach().clone();
      const auto masks_before = sparsifier.state_dict();
      const UpdateReport report = sparsifier.end_backward(step);
      if (step == 3) {
        ASSERT_EQ(report.units.size(), 4u);
        const auto masks_after = sparsifier.state_dict();
        for (size_t e = 0; e < 4; ++e) {
          const bool is_skipped = e == 1;
          EXPECT_EQ(report.units[e].skipped,
                    is_skipped ? SkipReason::kFewRows : SkipReason::kNotSkipped);
          EXPECT_EQ(report.units[e].num_grown > 0, !is_skipped);
          EXPECT_EQ(masks_after.units[e].mask == masks_before.units[e].mask, is_skipped);
          EXPECT_EQ(
              at::equal(before[static_cast<int64_t>(e)], experts.detach()[static_cast<int64_t>(e)]),
              is_skipped);
          EXPECT_EQ(sparsifier.stats(units[e].key).nnz, 12);
          EXPECT_EQ(sparsifier.stats(units[e].key).num_skipped, is_skipped ? 1 : 0);
        }
      }
      optimizer.step();
      sparsifier.end_step(step);
      expect_zero_outside(sparsifier);
    }
  }
}

TEST(Sparsifier, RowsSinceTheLastUpdate) {
  SparseUnit unit = unit_of(normal({6, 8}, 5), 0);
  unit.counts_rows = true;
  SparsifierConfig config = config_of(0.25, GrowCriterion::kRandom, UpdateOrder::kBeforeStep, 2);
  config.min_rows = 5;
  Sparsifier sparsifier({unit}, config);
  const std::vector<int64_t> rows = {3, 3, 2, 2, 1, 0, 4, 0};
  std::vector<SkipReason> reasons;
  for (int64_t step = 0; step < 8; ++step) {
    sparsifier.begin_step(step);
    sparsifier.count_rows(unit.key, rows[static_cast<size_t>(step)]);
    for (const UnitUpdate& update : sparsifier.end_backward(step).units) {
      reasons.push_back(update.skipped);
    }
    sparsifier.end_step(step);
  }
  // 6 rows; 4; 5, as a skipped update keeps them; 4.
  EXPECT_EQ(reasons, (std::vector<SkipReason>{SkipReason::kNotSkipped, SkipReason::kFewRows,
                                              SkipReason::kNotSkipped, SkipReason::kFewRows}));
}

TEST(Sparsifier, NoGradientIsSkipped) {
  // Rows are not counted here, but every gradient is 0.
  const at::Tensor weight = normal({6, 8}, 5).requires_grad_(true);
  Sparsifier sparsifier({unit_of(weight, 0)},
                        config_of(0.25, GrowCriterion::kGrad, UpdateOrder::kBeforeStep, 1));
  const PackedMask before = sparsifier.mask({0});
  for (int64_t step = 0; step < 2; ++step) {
    sparsifier.begin_step(step);
    if (step == 1) (weight.sum() * 0).backward();
    const UpdateReport report = sparsifier.end_backward(step);
    EXPECT_EQ(report.units[0].skipped, SkipReason::kNoGradient);
    sparsifier.end_step(step);
  }
  EXPECT_EQ(sparsifier.mask({0}), before);
  EXPECT_EQ(sparsifier.stats({0}).num_skipped, 2);
}

std::vector<PackedMask> masks_after(std::vector<SparseUnit> units, const UnitKey& key,
                                    const std::vector<UnitKey>& all) {
  SparsifierConfig config = config_of(0.25, GrowCriterion::kRandom, UpdateOrder::kBeforeStep, 8);
  config.schedule.begin = 0;
  config.schedule.stagger = true;
  config.all_units = all;
  Sparsifier sparsifier(std::move(units), config);
  std::vector<PackedMask> masks;
  for (int64_t step = 0; step < 20; ++step) {
    sparsifier.begin_step(step);
    sparsifier.end_backward(step);
    sparsifier.end_step(step);
    masks.push_back(sparsifier.mask(key));
  }
  return masks;
}

TEST(Sparsifier, Order) {
  const auto units_of = [](const std::vector<int64_t>& ids) {
    at::Tensor experts = at::zeros({static_cast<int64_t>(ids.size()), 6, 8}, at::kDouble);
    for (size_t slot = 0; slot < ids.size(); ++slot) {
      experts[static_cast<int64_t>(slot)].copy_(normal({6, 8}, static_cast<uint64_t>(ids[slot])));
    }
    return expert_units("w1", experts, 0, Matrix::kW1, ids);
  };
  std::vector<UnitKey> all;
  for (int64_t id = 0; id < 8; ++id) all.push_back({0, id, Matrix::kW1});
  const auto everyone = masks_after(units_of({0, 1, 2, 3, 4, 5, 6, 7}), all[5], all);
  const auto shuffled = masks_after(units_of({7, 5, 3, 1, 0, 2, 4, 6}), all[5], all);
  const auto rank_two = masks_after(units_of({4, 5}), all[5], all);
  std::reverse(all.begin(), all.end());
  const auto listed_otherwise = masks_after(units_of({5, 4}), {0, 5, Matrix::kW1}, all);
  EXPECT_EQ(everyone, shuffled);
  EXPECT_EQ(everyone, rank_two);
  EXPECT_EQ(everyone, listed_otherwise);
  EXPECT_NE(everyone.front(), everyone.back());
}

TEST(Sparsifier, Staggered) {
  const at::Tensor experts = normal({4, 6, 8}, 5);
  const auto units = expert_units("w1", experts, 0, Matrix::kW1, {0, 1, 2, 3});
  SparsifierConfig config = config_of(0.25, GrowCriterion::kGrad, UpdateOrder::kBeforeStep, 12);
  config.schedule.begin = 5;
  config.schedule.stagger = true;
  const Sparsifier sparsifier(units, config);
  std::vector<int64_t> counts(4, 0);
  for (int64_t step = 0; step < 200; ++step) {
    const StepPlan plan = sparsifier.plan(step);
    int64_t now = 0;
    for (size_t u = 0; u < 4; ++u) {
      const bool is_update = plan.actions[u] == UnitAction::kUpdate;
      now += is_update ? 1 : 0;
      counts[u] += is_update ? 1 : 0;
      if (step >= 90) {
        EXPECT_FALSE(is_update);
      }
    }
    EXPECT_LE(now, 1);
    if (step >= 5 && step < 89 && (step - 5) % 12 == 11) {
      EXPECT_EQ(counts, std::vector<int64_t>(4, (step - 5) / 12 + 1));
    }
  }
}

TEST(Sparsifier, Resume) {
  for (const int64_t stop : {17, 18, 19, 20}) {  // updates at 9, 19, ...; windows of 3 steps
    SparsifierConfig config = config_of(0.4, GrowCriterion::kGrad, UpdateOrder::kBeforeStep);
    config.grad_accum = 3;
    config.rule.random_share = 0.3;
    TwoWeights model;
    Sparsifier sparsifier(model.units(), config);
    torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(0.01));
    sparsifier.attach(optimizer);
    TwoWeights other;
    Sparsifier resumed(other.units(), config);
    torch::optim::AdamW other_optimizer(other.parameters(), torch::optim::AdamWOptions(0.01));
    resumed.attach(other_optimizer);
    // Whatever it did before is forgotten.
    for (int64_t step = 0; step < 13; ++step) {
      train_step(other, resumed, other_optimizer, step + 1);
    }
    for (int64_t step = 0; step < 60; ++step) {
      if (step == stop) {
        for (size_t u = 0; u < 2; ++u) {
          other.parameters()[u].detach().copy_(model.parameters()[u].detach());
        }
        std::stringstream saved;
        torch::save(optimizer, saved);
        torch::load(other_optimizer, saved);
        resumed.load(sparsifier.state_dict());
      }
      train_step(model, sparsifier, optimizer, step);
      if (step >= stop) train_step(other, resumed, other_optimizer, step);
    }
    for (size_t u = 0; u < 2; ++u) {
      EXPECT_TRUE(at::equal(model.parameters()[u], other.parameters()[u])) << stop;
      const UnitKey& key = sparsifier.units()[u].key;
      EXPECT_EQ(sparsifier.mask(key), resumed.mask(key));
      EXPECT_EQ(sparsifier.stats(key).ever_active, resumed.stats(key).ever_active);
      EXPECT_EQ(sparsifier.stats(key).num_updates, resumed.stats(key).num_updates);
    }
    EXPECT_GT(sparsifier.stats({0}).num_updates, 4);
  }
}

TEST(Sparsifier, LoadRefused) {
  TwoWeights model;
  const SparsifierConfig config = config_of(0.4, GrowCriterion::kGrad, UpdateOrder::kBeforeStep);
  Sparsifier sparsifier(model.units(), config);
  const SparsifierState good = sparsifier.state_dict();
  sparsifier.load(good);
  const auto text = [&](const std::function<void(SparsifierState&)>& spoil) {
    SparsifierState bad = good;
    spoil(bad);
    return config_error([&] { sparsifier.load(bad); });
  };
  EXPECT_EQ(text([](SparsifierState& s) { s.version = 0; }),
            "[sparsifier] version=0 is not 3, which this build reads");
  EXPECT_NE(text([](SparsifierState& s) { ++s.config_hash; }).find("resume with the one"),
            std::string::npos);
  EXPECT_EQ(text([](SparsifierState& s) { s.units.pop_back(); }),
            "[sparsifier] state=layer1 has no mask in it (layer 1, expert 0, weight)");
  EXPECT_EQ(
      text([](SparsifierState& s) {
        int64_t place = 0;
        while (!s.units[0].mask.test(place)) ++place;
        s.units[0].mask.set(place, false);
      }),
      "[sparsifier] mask of layer0=30 active atoms do not keep its budget of 31 in equal cells");
  EXPECT_EQ(text([](SparsifierState& s) { s.units[0].mask = PackedMask(7, 11); }),
            "[sparsifier] mask of layer0=7x11 is not of 11x7 atoms");
  // Units of other ranks do not matter.
  SparsifierState more = good;
  more.units.push_back(good.units[0]);
  more.units.back().key = {7, 7, Matrix::kW2};
  sparsifier.load(more);
  EXPECT_EQ(sparsifier.mask({0}), good.units[0].mask);
}

TEST(Sparsifier, Diverged) {
  TwoWeights model;
  Sparsifier sparsifier(model.units(),
                        config_of(0.4, GrowCriterion::kGrad, UpdateOrder::kBeforeStep, 1));
  sparsifier.begin_step(7);
  model.backward(0);
  model.w1.mutable_grad().masked_fill_(mask_of(sparsifier, sparsifier.units()[1]).logical_not(),
                                       std::nan(""));
  const SparsifierState before = sparsifier.state_dict();
  const at::Tensor weight = model.w0.detach().clone();
  std::string text;
  try {
    sparsifier.end_backward(7);
  } catch (const Diverged& error) {
    text = error.what();
  }
  EXPECT_EQ(
      text,
      "[sparsifier] scores of layer1=33 are NaN or infinite; the training has diverged (layer "
      "1, step 7)");
  // Nor has the unit before it changed.
  for (size_t u = 0; u < 2; ++u) {
    EXPECT_EQ(sparsifier.state_dict().units[u].mask, before.units[u].mask);
  }
  EXPECT_TRUE(at::equal(model.w0, weight));
}

TEST(Sparsifier, ResetWeights) {
  const at::Tensor weight = at::empty({300, 200}, at::kDouble);
  SparsifierConfig config = presets::static_mask(0.1);
  config.structure = Structure::constant_fan_in();
  Sparsifier sparsifier({unit_of(weight, 0)}, config);
  sparsifier.reset_weights(1.5);
  expect_zero_outside(sparsifier);
  const at::Tensor active = weight.masked_select(mask_of(sparsifier, sparsifier.units()[0]));
  EXPECT_EQ(active.numel(), 6000);
  EXPECT_EQ(sparsifier.budget_rest(), 0);
  EXPECT_NEAR(active.std().item<double>(), 1.5 / std::sqrt(20), 0.02);
}

TEST(Sparsifier, Refused) {
  TwoWeights model;
  const SparsifierConfig config = config_of(0.4, GrowCriterion::kGrad, UpdateOrder::kBeforeStep);
  const auto text = [&](const std::function<void(SparsifierConfig&)>& spoil) {
    SparsifierConfig bad = config;
    spoil(bad);
    return config_error([&] { Sparsifier(model.units(), bad); });
  };
  EXPECT_EQ(text([](SparsifierConfig& c) { c.grad_accum = 11; }),
            "[sparsifier] grad_accum=11 is outside [1, every=10]");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.structure = Structure::n_of_m(1, 1); }),
            "[sparsifier] density=0.4 differs from 1, which N:M fixes; set that");
  EXPECT_NE(text([](SparsifierConfig& c) { c.budget.density = 0.01; }).find("the floors need 16"),
            std::string::npos);
  EXPECT_EQ(config_error([&] {
              Sparsifier({unit_of(model.w0, 0), unit_of(model.w1, 0)}, config);
            }).substr(0, 45),
            "[sparsifier] units=layer0 has the key of laye");
  EXPECT_EQ(config_error([&] {
              Sparsifier({unit_of(model.w0, 0), unit_of(model.w0, 1)}, config);
            }),
            "[sparsifier] units=layer1 is the same weight as layer0");
  EXPECT_EQ(config_error([&] {
              Sparsifier sparsifier(model.units(), config);
              sparsifier.end_backward(3);
            }),
            "[sparsifier] step=3 of end_backward was not begun");
  EXPECT_EQ(config_error([&] {
              Sparsifier sparsifier(model.units(), config);
              sparsifier.begin_step(2);
              sparsifier.end_backward(3);
            }),
            "[sparsifier] step=3 of end_backward differs from step=2 of begin_step");
  EXPECT_EQ(config_error([&] {
              const Sparsifier sparsifier(model.units(), config);
              sparsifier.mask({9});
            }),
            "[sparsifier] unit=layer 9, expert 0, weight is not of this Sparsifier");
  const at::Tensor foreign = normal({2, 2}, 1).requires_grad_(true);
  EXPECT_EQ(config_error([&] {
              Sparsifier sparsifier(model.units(), config);
              torch::optim::SGD optimizer({foreign}, torch::optim::SGDOptions(0.1));
              sparsifier.attach(optimizer);
            }),
            "[sparsifier] optimizer=given holds no parameter of a unit");
}

}  // namespace
}  // namespace perseid
