// Drop and grow criteria beyond magnitudes and dense gradients, one process. Sampled gradients are
// in sparse_sampled_test.cpp.
//   DropScores        |w| + lambda |g| and |w g| by hand; blocks, ragged ones too, by brute force
//   DropGradient      the gradient is that of the steps that end with the update's, at active
//                     entries, before clipping, in every order; the dropped are those of an oracle
//                     with ties
//   NoDropGradient    kTaylor without a gradient is skipped, kMest is magnitude
//   Momentum          the closed form of the average, with and without a link; frozen by `end`
//   Progress          norm^2 / L by hand and by brute force; of a layer; refused without a link
//   ProgressUnderRamp exact budgets that fall, and growth within them
//   Resume            save, load, go on: the uninterrupted run, bit for bit, for each criterion
//   LeftOutSteps      sums whose update was left out do not count for the next one
//   NonFinite         what is looked at must be finite, and nothing else
//   Refused           fields out of range; configurations that differ are told apart
//   Presets           3 updates of two experts keep their budget
#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <cmath>
#include <functional>
#include <set>
#include <sstream>

#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_criteria_fixture.h"

namespace perseid::testing {
namespace {

using kernels::random_key;

TEST(SparseCriteria, DropScores) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 2, 3, "w");
  PackedMask active(2, 3);
  for (const int64_t a : {0, 2, 3, 5}) active.set(a, true);
  const at::Tensor weight = at::tensor({1.0, 99.0, -2.0, 0.5, 99.0, -0.0}).view({2, 3});
  const at::Tensor gradient = at::tensor({-3.0, 0.5, 4.0, 10.0}).unsqueeze(0);
  UpdateRule rule;
  rule.drop = DropCriterion::kMest;
  rule.mest_lambda = 0.5;
  const auto scores = [&](const at::Tensor& w, const at::Tensor& g) {
    const at::Tensor all = drop_scores(layout, rule, active, w, g);
    std::vector<float> result;
    for (const int64_t a : {0, 2, 3, 5}) result.push_back(all[a].item<float>());
    return result;
  };
  using Scores = std::vector<float>;
  EXPECT_EQ(scores(weight, gradient), (Scores{2.5f, 2.25f, 2.5f, 5}));
  EXPECT_EQ(scores(weight.to(at::kBFloat16), gradient.to(at::kFloat)),
            (Scores{2.5f, 2.25f, 2.5f, 5}));
  EXPECT_EQ(scores(weight, {}), (Scores{1, 2, 0.5f, 0}));
  rule.drop = DropCriterion::kTaylor;
  EXPECT_EQ(scores(weight, gradient), (Scores{3, 1, 2, 0}));  // roots of 9, 1, 4, 0
  EXPECT_EQ(scores(weight.to(at::kHalf), gradient), (Scores{3, 1, 2, 0}));

  Structure blocks = Structure::blocks(3, 4);
  blocks.pad = true;
  const AtomLayout ragged = make_layout(blocks, 8, 10, "w");
  const PackedMask some = random_mask(ragged, 5 * ragged.granule(), random_key(3));
  const PackedMask positions = position_bits(ragged, some);
  const at::Tensor w = normal({8, 10}, 1), g = normal({8, 10}, 2);
  for (const DropCriterion drop : {DropCriterion::kMest, DropCriterion::kTaylor}) {
    rule.drop = drop;
    const at::Tensor all = drop_scores(ragged, rule, some, w, listed_values(positions, g));
    for (int64_t atom = 0; atom < ragged.num_atoms(); ++atom) {
      if (!some.test(atom)) continue;
      double sum = 0, count = 0;
      for (int64_t row = 0; row < 8; ++row) {
        for (int64_t col = 0; col < 10; ++col) {
          if (row / 3 * ragged.cols + col / 4 != atom) continue;
          const double value = std::abs(w[row][col].item<double>());
          const double slope = std::abs(g[row][col].item<double>());
          const double score = drop == DropCriterion::kMest ? value + 0.5 * slope : value * slope;
          sum += score * score;
          ++count;
        }
      }
      EXPECT_NEAR(all[atom].item<double>(), std::sqrt(sum / count), 1e-6);
    }
  }
}

/// Oracle: the k atoms of the smallest scores, equal ones by the update's key.
PackedMask smallest(const Sparsifier& sparsifier, const UnitKey& key, const PackedMask& active,
                    const at::Tensor& scores, int64_t k, int64_t step) {
  const AtomLayout& layout = sparsifier.layout(key);
  PackedMask result(layout.rows, layout.cols);
  const at::Tensor values = scores.to(at::kFloat).contiguous();
  kernels::select_atoms_reference({1, layout.num_atoms()}, kernels::AtomOrder::kSmallest,
                                  values.const_data_ptr<float>(), active.data(), &k,
                                  draw_key(sparsifier.config().seed, step, key, UnitDraw::kDrop),
                                  result.data());
  return result;
}

TEST(SparseCriteria, DropGradient) {
  for (const DropCriterion drop : {DropCriterion::kMest, DropCriterion::kTaylor}) {
    for (const UpdateOrder order :
         {UpdateOrder::kBeforeStep, UpdateOrder::kInsteadOfStep, UpdateOrder::kAfterStep}) {
      for (const GrowCriterion grow : {GrowCriterion::kRandom, GrowCriterion::kSampledGrad}) {
        TwoWeights model;
        SparsifierConfig config = config_of(drop, grow);
        config.order = order;
        config.grad_accum = 3;
        config.rule.mest_lambda = 0.7;
        Sparsifier sparsifier(model.units(), config);
        torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.01));
        sparsifier.attach(optimizer);
        // Coarse weights, so that scores are equal where there is no gradient: in row 3.
        const auto coarse = [&] { model.w0.detach()[3].mul_(4).round_().div_(4); };
        std::vector<at::Tensor> sums(2);
        int64_t num_updates = 0;
        for (int64_t step = 0; step < 30; ++step) {
          const StepPlan plan = sparsifier.begin_step(step);
          EXPECT_EQ(plan.actions[0] != UnitAction::kNone, step % 10 >= 7);
          optimizer.zero_grad();
          coarse();
          model.backward(step);
          model.w0.mutable_grad()[3].zero_();
          std::vector<PackedMask> before;
          for (size_t u = 0; u < 2; ++u) {
            const UnitKey& key = sparsifier.units()[u].key;
            before.push_back(sparsifier.mask(key));
            const at::Tensor active = model.parameters()[u].grad() *
                                      position_mask(sparsifier.layout(key), sparsifier.mask(key));
            if (step % 10 == 7) sums[u] = at::zeros_like(active);
            if (step % 10 >= 7) sums[u] += active;
          }
          std::vector<at::Tensor> weights = {model.w0.detach().clone(), model.w1.detach().clone()};
          UpdateReport report = sparsifier.end_backward(step);
          torch::nn::utils::clip_grad_norm_(model.parameters(), 1e-3);
          optimizer.step();
          if (order == UpdateOrder::kAfterStep) {
            weights = {model.w0.detach().clone(), model.w1.detach().clone()};
            optimizer.zero_grad();  // the gradient was taken before
          }
          const UpdateReport late = sparsifier.end_step(step);
          if (order == UpdateOrder::kAfterStep) report = late;
          if (step % 10 != 9) continue;
          ++num_updates;
          for (size_t u = 0; u < 2; ++u) {
            const UnitKey& key = sparsifier.units()[u].key;
            const at::Tensor value = weights[u].abs(), slope = (sums[u] / 3.0).abs();
            const at::Tensor scores =
                drop == DropCriterion::kMest ? value + 0.7 * slope : value * slope;
            const auto k =
                static_cast<int64_t>(drop_fraction(config.schedule, static_cast<double>(step)) *
                                     static_cast<double>(before[u].count()));
            EXPECT_EQ(report.units[u].num_dropped, k);
            EXPECT_EQ(without(before[u], sparsifier.mask(key)),
                      smallest(sparsifier, key, before[u], scores, k, step))
                << step << " " << u;
          }
        }
        EXPECT_EQ(num_updates, 3);
      }
    }
  }
}

TEST(SparseCriteria, NoDropGradient) {
  for (const DropCriterion drop :
       {DropCriterion::kMest, DropCriterion::kTaylor, DropCriterion::kMagnitude}) {
    Sparsifier sparsifier({unit_of(normal({6, 8}, 5), 0)},
                          config_of(drop, GrowCriterion::kRandom, 1));
    sparsifier.begin_step(0);
    const UpdateReport report = sparsifier.end_backward(0);
    const bool is_skipped = drop == DropCriterion::kTaylor;
    EXPECT_EQ(report.units[0].skipped,
              is_skipped ? SkipReason::kNoGradient : SkipReason::kNotSkipped);
    EXPECT_EQ(report.units[0].num_dropped, is_skipped ? 0 : 5);
    if (drop == DropCriterion::kMest) {
      Sparsifier other({unit_of(normal({6, 8}, 5), 0)},
                       config_of(DropCriterion::kMagnitude, GrowCriterion::kRandom, 1));
      other.begin_step(0);
      other.end_backward(0);
      EXPECT_EQ(other.mask({0}), sparsifier.mask({0}));
    }
  }
}

TEST(SparseCriteria, Momentum) {
  for (const bool has_link : {true, false}) {
    SparseLinear linear = linear_of(30, 9);
    SparsifierConfig config = config_of(DropCriterion::kMagnitude, GrowCriterion::kMomentum, 4);
    config.rule.momentum_decay = 0.75;
    config.schedule.end = 10;
    SparseUnit unit = linear->unit();
    if (!has_link) unit.link = nullptr;
    Sparsifier sparsifier({unit}, config);
    std::vector<at::Tensor> gradients;
    for (int64_t step = 0; step < 13; ++step) {
      const StepPlan plan = sparsifier.begin_step(step);
      EXPECT_EQ(plan.actions[0], step == 3 || step == 7 ? UnitAction::kUpdate
                                 : step < 10            ? UnitAction::kAccumulate
                                                        : UnitAction::kNone);
      linear->zero_grad();
      if (step == 5) {  // without rows it counts as 0
        gradients.push_back(at::zeros({9, 30}, at::kDouble));
      } else {
        const at::Tensor x = normal({6, 30}, static_cast<uint64_t>(step));
        const at::Tensor delta = normal({6, 9}, 100 + static_cast<uint64_t>(step));
        (linear->forward(x) * delta).sum().backward();
        gradients.push_back(dense_gradient(x, delta));
      }
      at::Tensor average = at::zeros({9, 30}, at::kDouble);
      for (int64_t i = 0; i <= step; ++i) {
        average += 0.25 * std::pow(0.75, static_cast<double>(step - i)) *
                   gradients[static_cast<size_t>(i)];
      }
      const PackedMask before = sparsifier.mask({});
      const UpdateReport report = sparsifier.end_backward(step);
      if (!report.units.empty()) {
        EXPECT_GT(report.units[0].num_grown, 10);
        // The largest inactive averages.
        const at::Tensor magnitude =
            average.abs().masked_fill(position_mask(sparsifier.layout({}), before), -1);
        const at::Tensor best =
            std::get<0>(magnitude.view({-1}).topk(report.units[0].num_grown)).min();
        const at::Tensor grown = at_positions(without(sparsifier.mask({}), before), magnitude);
        EXPECT_TRUE(grown.ge(best - 1e-12).all().item<bool>());
      }
      sparsifier.end_step(step);
      const at::Tensor kept = sparsifier.state_dict().units[0].grad_sum;
      ASSERT_EQ(kept.defined(), step < 10);
      if (kept.defined()) {
        EXPECT_TRUE(at::allclose(kept, average, 1e-12, 1e-14)) << step;
      }
    }
    EXPECT_EQ(sparsifier.stats({}).num_updates, 2);
  }
}

TEST(SparseCriteria, Progress) {
  // Columns of energy 4, 1 and 0; the greatest gradient is not the greatest progress.
  const AtomLayout layout = make_layout(Structure::unstructured(), 2, 3, "w");
  const at::Tensor gradient = at::tensor({6.0, -4.0, 0.0, 2.0, 1.0, 0.0}).view({2, 3});
  const at::Tensor energy = at::tensor({4.0, 1.0, 0.0}).unsqueeze(0);
  const at::Tensor scores = progress_scores(layout, gradient, energy);
  EXPECT_TRUE(at::equal(scores.square(), at::tensor({9.0f, 16.0f, 0.0f, 1.0f, 1.0f, 0.0f})));

  Structure structure = Structure::blocks(3, 4);
  structure.pad = true;
  const AtomLayout blocks = make_layout(structure, 8, 10, "w");
  const at::Tensor x = normal({7, 10}, 1), delta = normal({7, 8}, 2);
  const at::Tensor g = delta.t().mm(x);
  const at::Tensor of_blocks =
      progress_scores(blocks, g, x.square().sum(0, true)).square().to(at::kDouble);
  for (int64_t r = 0; r < blocks.rows; ++r) {
    for (int64_t c = 0; c < blocks.cols; ++c) {
      const int64_t height = std::min<int64_t>(3, 8 - 3 * r),
                    width = std::min<int64_t>(4, 10 - 4 * c);
      const double norm =
          g.narrow(0, 3 * r, height).narrow(1, 4 * c, width).square().sum().item<double>();
      const double l = x.narrow(1, 4 * c, width).square().sum().item<double>();
      EXPECT_NEAR(of_blocks[r * blocks.cols + c].item<double>() / (norm / l), 1, 1e-6);
    }
  }

  for (const Structure& of : {Structure::unstructured(), Structure::blocks(3, 5)}) {
    SparseLinear linear = linear_of(30, 9);
    SparsifierConfig config = config_of(DropCriterion::kMagnitude, GrowCriterion::kGreedyProgress);
    config.grad_accum = 3;
    config.structure = of;
    Sparsifier sparsifier({linear->unit()}, config);
    at::Tensor sum = at::zeros({9, 30}, at::kDouble), squares = at::zeros({1, 30}, at::kDouble);
    for (int64_t step = 0; step < 10; ++step) {
      sparsifier.begin_step(step);
      linear->zero_grad();
      for (int pass = 0; pass < 2; ++pass) {
        const at::Tensor in = normal({6, 30}, static_cast<uint64_t>(2 * step + pass)) *
                              at::linspace(0.1, 5, 30, at::kDouble);
        const at::Tensor out = normal({6, 9}, static_cast<uint64_t>(100 + 2 * step + pass));
        (linear->forward(in) * out).sum().backward();
        if (step < 7) continue;
        sum += dense_gradient(in, out);
        squares += in.square().sum(0, true);
      }
      const PackedMask before = sparsifier.mask({});
      const UpdateReport report = sparsifier.end_backward(step);
      sparsifier.end_step(step);
      if (step < 9) continue;
      const AtomLayout& mine = sparsifier.layout({});
      const at::Tensor expected = progress_scores(mine, sum, squares);
      const int64_t num_grown = report.units.at(0).num_grown;
      ASSERT_GT(num_grown, 0);
      const PackedMask grown = without(sparsifier.mask({}), before);
      double lowest = 1e9, highest = 0;
      for (int64_t a = 0; a < mine.num_atoms(); ++a) {
        if (before.test(a)) continue;
        const double score = expected[a].item<double>();
        (grown.test(a) ? lowest : highest) =
            grown.test(a) ? std::min(lowest, score) : std::max(highest, score);
      }
      EXPECT_GE(lowest, highest);
    }
  }
  EXPECT_EQ(config_error([&] {
              Sparsifier({unit_of(normal({6, 8}, 5), 0)},
                         config_of(DropCriterion::kMagnitude, GrowCriterion::kGreedyProgress));
            }),
            "[sparsifier] grow=greedy_progress needs the inputs of layer0, which only a link hands "
            "over; use SparseLinear, or grad");
}

/// tanh of one sparse layer after the other.
struct TwoLayers {
  explicit TwoLayers(at::ScalarType type = at::kDouble)
      : first(linear_of(20, 24, type, 0)), second(linear_of(24, 15, type, 1)) {}
  std::vector<at::Tensor> parameters() const { return {first->weight, second->weight}; }
  std::vector<SparseUnit> units() const { return {first->unit(), second->unit()}; }
  void backward(int64_t step) {
    const at::Tensor x =
        normal({6, 20}, 100 + static_cast<uint64_t>(step), first->weight.scalar_type());
    second->forward(first->forward(x).tanh()).square().sum().backward();
  }
  SparseLinear first, second;
};

template <typename Model>
void expect_resumes(const SparsifierConfig& config, int64_t stop) {
  Model model, other;
  Sparsifier sparsifier(model.units(), config), resumed(other.units(), config);
  torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(0.01));
  torch::optim::AdamW other_optimizer(other.parameters(), torch::optim::AdamWOptions(0.01));
  sparsifier.attach(optimizer);
  resumed.attach(other_optimizer);
  // Whatever it did before is forgotten.
  for (int64_t step = 0; step < 13; ++step) train_step(other, resumed, other_optimizer, step + 1);
  for (int64_t step = 0; step < 45; ++step) {
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
    const UnitKey& key = sparsifier.units()[u].key;
    EXPECT_TRUE(at::equal(model.parameters()[u], other.parameters()[u])) << stop;
    EXPECT_EQ(sparsifier.mask(key), resumed.mask(key)) << stop;
    EXPECT_EQ(sparsifier.stats(key).num_updates, 4);
    const UnitState mine = sparsifier.state_dict().units[u], its = resumed.state_dict().units[u];
    EXPECT_EQ(mine.grad_sum.defined(), its.grad_sum.defined());
    if (mine.grad_sum.defined()) {
      EXPECT_TRUE(at::equal(mine.grad_sum, its.grad_sum));
    }
  }
}

TEST(SparseCriteria, ProgressUnderRamp) {
  TwoLayers model;
  SparsifierConfig config = config_of(DropCriterion::kMagnitude, GrowCriterion::kGreedyProgress);
  config.schedule.density_ramp.emplace();
  Sparsifier sparsifier(model.units(), config);
  torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.01));
  sparsifier.attach(optimizer);
  int64_t size = 0, num_grown = 0;
  for (const SparseUnit& unit : sparsifier.units()) size += unit.parameter.numel();
  for (int64_t step = 0; step < 95; ++step) {
    std::vector<PackedMask> before;
    for (const SparseUnit& unit : sparsifier.units()) before.push_back(sparsifier.mask(unit.key));
    train_step(model, sparsifier, optimizer, step);
    for (size_t u = 0; u < before.size(); ++u) {
      const PackedMask& after = sparsifier.mask(sparsifier.units()[u].key);
      EXPECT_LE(after.count(), before[u].count());
      num_grown += without(after, before[u]).count();
    }
    EXPECT_EQ(sparsifier.nnz(),
              ramp_density(config.schedule, config.budget.density, window_of(config.schedule, step))
                  .of(size))
        << step;
  }
  EXPECT_GT(num_grown, 50);
}

TEST(SparseCriteria, Resume) {
  for (const int64_t stop : {16, 18, 19, 20}) {  // updates at 9, 19, ...; windows of 3 steps
    for (const GrowCriterion grow : {GrowCriterion::kMomentum, GrowCriterion::kSampledGrad,
                                     GrowCriterion::kGreedyProgress, GrowCriterion::kRandom}) {
      for (const DropCriterion drop : {DropCriterion::kMest, DropCriterion::kTaylor}) {
        SparsifierConfig config = config_of(drop, grow);
        config.grad_accum = grow == GrowCriterion::kMomentum ? 1 : 3;
        expect_resumes<TwoLayers>(config, stop);
        if (grow != GrowCriterion::kGreedyProgress) {
          expect_resumes<TwoWeights>(config, stop);
          continue;
        }
        config.schedule.density_ramp.emplace();
        expect_resumes<TwoLayers>(config, stop);
      }
    }
  }
}

TEST(SparseCriteria, LeftOutSteps) {
  // A window that was begun and whose update was left out does not count for the next one.
  std::vector<PackedMask> masks;
  for (const bool begins : {true, false}) {
    TwoLayers model;
    SparsifierConfig config = config_of(DropCriterion::kMest, GrowCriterion::kSampledGrad);
    config.grad_accum = 3;
    Sparsifier sparsifier(model.units(), config);
    torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.0));
    sparsifier.attach(optimizer);
    if (begins) train_step(model, sparsifier, optimizer, 8);
    for (int64_t step = 17; step < 20; ++step) train_step(model, sparsifier, optimizer, step);
    EXPECT_EQ(sparsifier.stats(model.units()[0].key).num_updates, 1);
    masks.push_back(sparsifier.mask(model.units()[0].key));
  }
  EXPECT_EQ(masks[0], masks[1]);
}

std::string diverged(const std::function<void()>& body) {
  try {
    body();
  } catch (const Diverged& error) {
    return error.what();
  }
  return "";
}

TEST(SparseCriteria, NonFinite) {
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {nan, infinity}) {
    for (const bool is_candidate : {true, false}) {
      const at::Tensor weight = normal({6, 8}, 5).requires_grad_(true);
      SparsifierConfig config =
          config_of(DropCriterion::kMagnitude, GrowCriterion::kSampledGrad, 1);
      config.rule.candidates_per_grown = 1;
      Sparsifier sparsifier({unit_of(weight, 0)}, config);
      sparsifier.begin_step(0);
      (weight * normal({6, 8}, 6)).sum().backward();
      const PackedMask candidates = candidates_of(sparsifier, {0}, 0),
                       before = sparsifier.mask({0});
      int64_t place = 0;
      while (before.test(place) || candidates.test(place) != is_candidate) ++place;
      weight.mutable_grad().view({-1})[place].fill_(bad);
      const std::string text = diverged([&] { sparsifier.end_backward(0); });
      EXPECT_EQ(text, is_candidate ? "[sparsifier] scores of layer0=1 are NaN or infinite; the "
                                     "training has diverged (layer 0, step 0)"
                                   : "");
      EXPECT_EQ(sparsifier.mask({0}) == before, is_candidate);
    }
    for (const DropCriterion drop : {DropCriterion::kMest, DropCriterion::kTaylor}) {
      for (const bool is_active : {true, false}) {
        const at::Tensor weight = normal({6, 8}, 5).requires_grad_(true);
        Sparsifier sparsifier({unit_of(weight, 0)}, config_of(drop, GrowCriterion::kRandom, 1));
        sparsifier.begin_step(0);
        (weight * normal({6, 8}, 6)).sum().backward();
        int64_t place = 0;
        while (sparsifier.mask({0}).test(place) != is_active) ++place;
        weight.mutable_grad().view({-1})[place].fill_(bad);
        EXPECT_EQ(diverged([&] { sparsifier.end_backward(0); }).empty(), !is_active);
      }
    }
    // An input of a row makes the energy of its column bad, and the gradient with it.
    SparseLinear linear = linear_of(8, 6);
    Sparsifier sparsifier({linear->unit()},
                          config_of(DropCriterion::kMagnitude, GrowCriterion::kGreedyProgress, 1));
    sparsifier.begin_step(0);
    at::Tensor x = normal({5, 8}, 1);
    x[2][3] = bad;
    (linear->forward(x) * normal({5, 6}, 2)).sum().backward();
    EXPECT_NE(diverged([&] { sparsifier.end_backward(0); }), "");
    SparseLinear other = linear_of(8, 6);
    Sparsifier averaging({other->unit()},
                         config_of(DropCriterion::kMagnitude, GrowCriterion::kMomentum, 1));
    averaging.begin_step(0);
    (other->forward(x) * normal({5, 6}, 2)).sum().backward();
    EXPECT_NE(diverged([&] { averaging.end_backward(0); }), "");
  }
}

TEST(SparseCriteria, Refused) {
  const auto text = [](const std::function<void(SparsifierConfig&)>& spoil) {
    SparsifierConfig bad = config_of(DropCriterion::kMest, GrowCriterion::kSampledGrad);
    spoil(bad);
    return config_error([&] { Sparsifier({unit_of(normal({6, 8}, 5), 0)}, bad); });
  };
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.mest_lambda = -1; }),
            "[update_mask] mest_lambda=-1 is not a finite number of 0 or more");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.momentum_decay = 1; }),
            "[update_mask] momentum_decay=1 is outside [0, 1)");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.candidates_per_grown = 0.5; }),
            "[update_mask] candidates_per_grown=0.5 is not a finite number of 1 or more");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.exclude_just_dropped = false; }),
            "[update_mask] exclude_just_dropped=false cannot be kept by sampled_grad, whose "
            "candidates are inactive before the update");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.grad_accum = 11; }),
            "[sparsifier] grad_accum=11 is outside [1, every=10]");
  EXPECT_EQ(text([](SparsifierConfig& c) {
              c.rule.grow = GrowCriterion::kMomentum;
              c.grad_accum = 2;
            }),
            "[sparsifier] grad_accum=2 is above 1, but momentum looks at all steps");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.state.second_moment = GrownSecondMoment::kGradient; }),
            "[sparsifier] second_moment=gradient needs grow = grad, which looks at gradients");
  EXPECT_EQ(text([](SparsifierConfig&) {}), "no ConfigError");

  const SparsifierConfig good = config_of(DropCriterion::kMest, GrowCriterion::kSampledGrad);
  const Sparsifier sparsifier({unit_of(normal({6, 8}, 5), 0)}, good);
  for (const std::function<void(UpdateRule&)>& change :
       std::vector<std::function<void(UpdateRule&)>>{
           [](UpdateRule& rule) { rule.drop = DropCriterion::kTaylor; },
           [](UpdateRule& rule) { rule.grow = GrowCriterion::kMomentum; },
           [](UpdateRule& rule) { rule.mest_lambda = 0.1 + 0.2; },
           [](UpdateRule& rule) { rule.momentum_decay = 0.3; },
           [](UpdateRule& rule) { rule.candidates_per_grown = 3; }}) {
    SparsifierConfig config = good;
    change(config.rule);
    Sparsifier other({unit_of(normal({6, 8}, 5), 0)}, config);
    EXPECT_NE(config_error([&] { other.load(sparsifier.state_dict()); }).find("config_hash"),
              std::string::npos);
  }
  // Sums of another window's candidates.
  SparsifierConfig windows = good;
  windows.grad_accum = 3;
  const at::Tensor weight = normal({6, 8}, 5).requires_grad_(true);
  Sparsifier saved({unit_of(weight, 0)}, windows);
  saved.begin_step(7);
  weight.sum().backward();
  saved.end_backward(7);
  saved.end_step(7);
  SparsifierState state = saved.state_dict();
  state.units[0].grad_sum = at::zeros({1, 3}, at::kDouble);
  saved.load(state);
  EXPECT_NE(config_error([&] { saved.begin_step(8); }).find("grad_sum of layer0=3 of the loaded"),
            std::string::npos);
}

TEST(SparseCriteria, Presets) {
  struct Case {
    const char* name;
    SparsifierConfig config;
    int64_t per_weight;  ///< budget of each of two weights of 128 x 64
  };
  const double density = 0.25;
  std::vector<Case> cases = {{"snfs", presets::snfs(density, 100, 10), 2048},
                             {"rigl_itop", presets::rigl_itop(density, 30, 10), 2048},
                             {"dsl", presets::dsl(30, 10), 4096},
                             {"sampled", presets::sampled(density, 100, 10), 2048},
                             {"rigl_block", presets::rigl_block(density, 100, 16, 10), 2048},
                             {"greedy_block", presets::greedy_block(density, 100, 16, 10), 2048},
                             {"rigl_official", presets::rigl_official(density, 100, 10), 2048},
                             {"set_official", presets::set_official(13, 10, 4), 0}};
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    std::vector<SparseLinear> experts = {linear_of(64, 128, at::kFloat, 0),
                                         linear_of(64, 128, at::kFloat, 1)};
    Sparsifier sparsifier({experts[0]->unit(), experts[1]->unit()}, c.config);
    std::vector<at::Tensor> parameters = {experts[0]->weight, experts[1]->weight};
    torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(0.01));
    sparsifier.attach(optimizer);
    const int64_t nnz = sparsifier.nnz();
    EXPECT_EQ(nnz, c.per_weight > 0 ? 2 * c.per_weight : nnz);
    int64_t num_grown = 0;
    for (int64_t step = 0; step < 30; ++step) {
      sparsifier.begin_step(step);
      optimizer.zero_grad();
      for (size_t e = 0; e < 2; ++e) {
        const at::Tensor x = normal({80, 64}, static_cast<uint64_t>(2 * step) + e, at::kFloat);
        experts[e]->forward(x).square().sum().backward();
      }
      for (const UnitUpdate& unit : sparsifier.end_backward(step).units)
        num_grown += unit.num_grown;
      optimizer.step();
      for (const UnitUpdate& unit : sparsifier.end_step(step).units) num_grown += unit.num_grown;
      EXPECT_EQ(sparsifier.nnz(), nnz);
      EXPECT_EQ(sparsifier.stats({0, 0}).nnz, nnz / 2);
    }
    EXPECT_GT(num_grown, 0);
    const SparsityTotals totals = sparsifier.totals();
    EXPECT_EQ(totals.num_updates, 6);
    EXPECT_EQ(totals.num_skipped, 0);
    EXPECT_GT(totals.itop_rate(), totals.density());
  }
  const SparsifierConfig itop = presets::rigl_itop(0.1, 1000);
  EXPECT_EQ(itop.order, UpdateOrder::kAfterStep);
  EXPECT_EQ(itop.schedule.every, 4000);
  EXPECT_DOUBLE_EQ(drop_fraction(itop.schedule, 0), 0.5);
  EXPECT_DOUBLE_EQ(drop_fraction(itop.schedule, 500), 0.25);
  EXPECT_DOUBLE_EQ(drop_fraction(itop.schedule, 999), 0.005);
  EXPECT_TRUE(is_update_step(presets::dsl(1000, 333).schedule, 999, 0));
  EXPECT_EQ(presets::dsl(1000).budget.density, Density::ratio(1, 2));
  EXPECT_EQ(presets::sampled(0.1, 1000).rule.candidates_per_grown, 4);
  EXPECT_EQ(presets::rigl_block(0.1, 1000).structure.atom_rows, 64);
  EXPECT_TRUE(presets::greedy_block(0.1, 1000).schedule.stagger);
  EXPECT_FALSE(presets::rigl_official(0.1, 1000).rule.exclude_just_dropped);
  EXPECT_FALSE(presets::set_official(20, 10, 5).rule.exclude_just_dropped);
}

}  // namespace
}  // namespace perseid::testing
