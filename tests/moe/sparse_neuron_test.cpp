// Coupled neurons under a Sparsifier, float64: hidden units of experts. Those of a plain network
// are in sparse_neuron_network_test.cpp.
//   Coupled       after the start and each update w1, w3 and w2 of an expert have the same hidden
//                 units, exactly as many as the budget says; the rest of the weights is 0
//   Free          candidates leave outputs as they are, bit for bit; so does growth, once what is
//                 dropped is gone; a grown unit has its candidate's rows, column 0 and a gradient
//   Scores        the smallest Frobenius norms go, the candidates with the largest gradient of
//                 their column come, by the norm over the window; as many candidates as asked for
//   Untouched     candidates are the same in all steps of a window, and gone after it: weights,
//                 gradients and states of inactive units are 0 under weight decay; those of units
//                 that stay do not notice an update
//   Skipped       an expert without rows or gradient keeps its units
//   Compact       compact_experts of neurons() has the same output
//   Resume        save, load, go on: the uninterrupted run, bit for bit, within a window, too, and
//                 with compressed states; weights that were loaded in a step survive load
//   LoadRefused   other units in one matrix, half units, other numbers of units
//   Ranks         masks of P = 1, 2, 4 and all layouts; SameBits: weights bit for bit
//   Turns         staggered: all matrices of an expert in one step
//   Preset        three updates of two experts keep the budget
//   Bounds        least and largest density hold for hidden units
//   Bfloat16      a grown unit's master copy is its row
//   Refused       texts
#include <ATen/Parallel.h>
#include <torch/optim/adamw.h>
#include <torch/serialize.h>

#include <cmath>
#include <functional>
#include <set>
#include <sstream>

#include "moe/compact_experts.h"
#include "moe/sparse_optimizer.h"
#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"
#include "tests/moe/sparse_neuron_fixture.h"

namespace perseid::testing {
namespace {

constexpr int64_t kExperts = 3, kWidth = 20;

/// One expert, views of the weights of all.
struct ExpertWeights {
  at::Tensor w1;  ///< [F, D]
  at::Tensor w3;  ///< [F, D]; undefined: a plain expert
  at::Tensor w2;  ///< [d_out, F]
};

/// A layer of experts with 20 hidden units, 8 of which are active at density 0.4.
struct Layer {
  explicit Layer(bool gated, bool has_bias = false)
      : experts(std::make_shared<GroupedMLP>(
            GroupedMLPOptions(kDModel, kWidth)
                .d_out(kDOut)
                .gated(gated)
                .bias(has_bias)
                .activation(gated ? kernels::Activation::kSilu : kernels::Activation::kGelu)
                .seed(3),
            ExpertPlacement::contiguous(kExperts, 1), 0)) {
    experts->to(at::kDouble);
    if (has_bias) {
      const at::NoGradGuard no_grad;
      experts->up_bias.copy_(normal(experts->up_bias.sizes(), 8));
      experts->down_bias.copy_(normal(experts->down_bias.sizes(), 9));
    }
    layer = std::make_shared<MoELayer>(
        std::vector<std::shared_ptr<gates::Gate>>{std::make_shared<Thirds>()}, experts,
        ExpertPlacement::contiguous(kExperts, 1), ParallelGroups());
  }
  /// Token t runs experts t and t + 1 modulo `used`.
  struct Thirds : gates::Gate {
    Thirds() : Gate("thirds", kExperts, 2) {}
    gates::GateOutput forward(const gates::GateInput& input) override {
      const int64_t count = input.tokens.size(0);
      const at::Tensor ids = at::empty({count, 2}, at::kInt);
      const at::Tensor weights = at::empty({count, 2}, at::kDouble);
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t k = 0; k < 2; ++k) {
          ids[t][k] = (t + k) % used;
          weights[t][k] = 1.0 / static_cast<double>(2 + t + 3 * k);
        }
      }
      gates::GateOutput out;
      out.routing = gates::routing_from_table(ids, weights, kExperts);
      out.stats = gates::count_assignments(out.routing, kExperts, count);
      return out;
    }
    int64_t used = kExperts;
  };
  at::Tensor forward(int64_t step) const {
    return layer->forward(MoEInput(normal({17, kDModel}, 40 + static_cast<uint64_t>(step))))
        .output();
  }
  void backward(int64_t step) const { weighted_loss({forward(step)}, 0).backward(); }
  std::vector<SparseUnit> units() const { return experts->sparse_units(0); }
  ExpertWeights expert(int64_t e) const {
    const at::Tensor up = experts->up_proj.detach()[e];
    return {up.narrow(0, 0, kWidth),
            experts->options().gated() ? up.narrow(0, kWidth, kWidth) : at::Tensor(),
            experts->down_proj.detach()[e]};
  }

  std::shared_ptr<GroupedMLP> experts;
  std::shared_ptr<MoELayer> layer;
};
UnitKey w2_of(int64_t expert) { return {0, expert, Matrix::kW2}; }

/// Units of an expert that have a weight other than 0 in their rows.
Places places_with_rows(const ExpertWeights& expert) {
  Places places;
  for (int64_t j = 0; j < expert.w1.size(0); ++j) {
    if (expert.w1[j].ne(0).any().item<bool>()) places.push_back(j);
  }
  return places;
}
void expect_coupled(const Layer& layer, const Sparsifier& sparsifier, int64_t num_active) {
  for (int64_t e = 0; e < kExperts; ++e) {
    const PackedMask& active = sparsifier.neurons(w2_of(e));
    ASSERT_EQ(active.count(), num_active);
    const ExpertWeights expert = layer.expert(e);
    for (int64_t j = 0; j < kWidth; ++j) {
      const bool is_active = active.test(j);
      for (const Matrix matrix : {Matrix::kW1, Matrix::kW3, Matrix::kW2}) {
        if (matrix == Matrix::kW3 && !expert.w3.defined()) continue;
        const PackedMask& mask = sparsifier.mask({0, e, matrix});
        const int64_t other = matrix == Matrix::kW2 ? mask.rows() : mask.cols();
        for (int64_t i = 0; i < other; ++i) {
          ASSERT_EQ(matrix == Matrix::kW2 ? mask.test(i, j) : mask.test(j, i), is_active);
        }
      }
      if (is_active) continue;
      ASSERT_FALSE(expert.w1[j].ne(0).any().item<bool>());
      if (expert.w3.defined()) {
        ASSERT_FALSE(expert.w3[j].ne(0).any().item<bool>());
      }
      ASSERT_FALSE(expert.w2.select(1, j).ne(0).any().item<bool>());
    }
  }
}
TEST(SparseNeuron, Coupled) {
  at::set_num_threads(1);
  for (const bool gated : {true, false}) {
    for (const GrowCriterion grow : {GrowCriterion::kGrad, GrowCriterion::kRandom}) {
      for (const UpdateOrder order :
           {UpdateOrder::kBeforeStep, UpdateOrder::kInsteadOfStep, UpdateOrder::kAfterStep}) {
        const Layer layer(gated);
        Sparsifier sparsifier(layer.units(), coupled(grow, order));
        torch::optim::AdamW optimizer(layer.experts->parameters(),
                                      torch::optim::AdamWOptions(0.01));
        sparsifier.attach(optimizer);
        expect_coupled(layer, sparsifier, 8);
        EXPECT_EQ(sparsifier.nnz(), kExperts * 8 * (gated ? 16 : 10));
        std::set<uint64_t> seen;
        for (int64_t step = 0; step < 40; ++step) {
          train_step(layer, sparsifier, optimizer, step);
          expect_coupled(layer, sparsifier, 8);
          seen.insert(sparsifier.neurons(w2_of(1)).fingerprint());
        }
        EXPECT_GT(seen.size(), 10u);
        EXPECT_EQ(sparsifier.nnz(), kExperts * 8 * (gated ? 16 : 10));
        EXPECT_NEAR(sparsifier.stats({0, 0, Matrix::kW1}).density, 0.4, 1e-12);
        EXPECT_EQ(sparsifier.stats({0, 0, Matrix::kW1}).active_rows, 8);
        EXPECT_EQ(sparsifier.stats(w2_of(0)).active_columns, 8);
        EXPECT_EQ(sparsifier.totals().num_skipped, 0);
        sparsifier.reset_weights(1);
        EXPECT_FALSE(layer.experts->up_proj.isnan().any().item<bool>());
        expect_coupled(layer, sparsifier, 8);
      }
    }
  }
}

TEST(SparseNeuron, Free) {
  at::set_num_threads(1);
  for (const auto& [gated, has_bias] : std::vector<std::pair<bool, bool>>{
           {true, false}, {false, false}, {true, true}, {false, true}}) {
    for (const GrowCriterion grow : {GrowCriterion::kGrad, GrowCriterion::kRandom}) {
      const Layer layer(gated, has_bias);
      Sparsifier sparsifier(layer.units(), coupled(grow));
      layer.experts->zero_grad();
      const at::Tensor before = layer.forward(7);
      sparsifier.begin_step(1);
      std::vector<Places> candidates;
      std::vector<ExpertWeights> placed;
      for (int64_t e = 0; e < kExperts; ++e) {
        candidates.push_back(places_with_rows(layer.expert(e)));
        placed.push_back({layer.expert(e).w1.clone(),
                          gated ? layer.expert(e).w3.clone() : at::Tensor(),
                          layer.expert(e).w2.clone()});
        EXPECT_EQ(candidates.back().size(), grow == GrowCriterion::kGrad ? 16u : 8u);
      }
      EXPECT_TRUE(same_bits(layer.forward(7), before));
      layer.backward(1);
      std::vector<PackedMask> old;
      for (int64_t e = 0; e < kExperts; ++e) old.push_back(sparsifier.neurons(w2_of(e)));
      sparsifier.end_backward(1);
      sparsifier.end_step(1);
      const at::Tensor after = layer.forward(7);
      std::vector<Places> grown;
      {
        // The weights before the update without the dropped units.
        const at::NoGradGuard no_grad;
        const at::Tensor up = layer.experts->up_proj.clone(),
                         down = layer.experts->down_proj.clone();
        for (int64_t e = 0; e < kExperts; ++e) {
          const PackedMask& now = sparsifier.neurons(w2_of(e));
          grown.push_back(listed(without(now, old[static_cast<size_t>(e)])));
          EXPECT_EQ(grown.back().size(), 4u);
          const ExpertWeights expert = layer.expert(e), &from = placed[static_cast<size_t>(e)];
          for (const int64_t j : grown.back()) {
            EXPECT_FALSE(expert.w2.select(1, j).ne(0).any().item<bool>());
            EXPECT_TRUE(expert.w1[j].ne(0).all().item<bool>());
            EXPECT_LE(expert.w1[j].abs().max().item<double>(), 1 / std::sqrt(6.0));
            if (grow == GrowCriterion::kGrad) {
              EXPECT_TRUE(at::equal(expert.w1[j], from.w1[j]));
              if (gated) {
                EXPECT_TRUE(at::equal(expert.w3[j], from.w3[j]));
                EXPECT_FALSE(at::equal(expert.w3[j], expert.w1[j]));
              }
            }
            expert.w1[j].zero_();
            if (gated) expert.w3[j].zero_();
          }
          for (const int64_t j : listed(old[static_cast<size_t>(e)] & now)) {
            EXPECT_TRUE(at::equal(expert.w1[j], from.w1[j]));
            EXPECT_TRUE(at::equal(expert.w2.select(1, j), from.w2.select(1, j)));
          }
        }
        EXPECT_TRUE(same_bits(layer.forward(7), after));
        EXPECT_FALSE(same_bits(before, after));  // what was dropped
        layer.experts->up_proj.copy_(up);
        layer.experts->down_proj.copy_(down);
      }
      layer.experts->zero_grad();
      sparsifier.begin_step(2);
      layer.backward(2);
      sparsifier.end_backward(2);
      for (int64_t e = 0; e < kExperts; ++e) {
        for (const int64_t j : grown[static_cast<size_t>(e)]) {
          EXPECT_GT(layer.experts->down_proj.grad()[e].select(1, j).abs().min().item<double>(), 0);
        }
      }
    }
  }
}

TEST(SparseNeuron, Scores) {
  at::set_num_threads(1);
  for (const bool gated : {true, false}) {
    for (const int64_t wanted : {1, 2, 9}) {
      const Layer layer(gated, /*has_bias=*/true);
      SparsifierConfig config = coupled();
      config.grad_accum = 3;
      config.schedule.begin = 2;
      config.neurons.candidates = wanted;
      Sparsifier sparsifier(layer.units(), config);
      std::vector<PackedMask> old;
      std::vector<Places> candidates;
      at::Tensor sum = at::zeros_like(layer.experts->down_proj);
      for (int64_t step = 0; step < 3; ++step) {
        sparsifier.begin_step(step);
        layer.experts->zero_grad();
        layer.backward(step);
        sum += layer.experts->down_proj.grad();
        for (int64_t e = 0; step == 2 && e < kExperts; ++e) {
          old.push_back(sparsifier.neurons(w2_of(e)));
          Places places = places_with_rows(layer.expert(e));
          std::erase_if(places, [&](int64_t j) { return old.back().test(j); });
          EXPECT_EQ(places.size(), static_cast<size_t>(std::min<int64_t>(4 * wanted, 12)));
          candidates.push_back(places);
        }
        if (step < 2) {
          sparsifier.end_backward(step);
          sparsifier.end_step(step);
        }
      }
      std::vector<std::vector<std::pair<double, int64_t>>> drop(kExperts), grow(kExperts);
      for (int64_t e = 0; e < kExperts; ++e) {
        const auto i = static_cast<size_t>(e);
        const ExpertWeights expert = layer.expert(e);
        for (int64_t j = 0; j < kWidth; ++j) {
          double squares = expert.w1[j].square().sum().item<double>() +
                           expert.w2.select(1, j).square().sum().item<double>();
          if (gated) squares += expert.w3[j].square().sum().item<double>();
          if (old[i].test(j)) drop[i].emplace_back(squares, j);
          if (has(candidates[i], j)) {
            grow[i].emplace_back(-sum[e].select(1, j).square().sum().item<double>(), j);
          }
        }
        std::sort(drop[i].begin(), drop[i].end());
        std::sort(grow[i].begin(), grow[i].end());
      }
      const UpdateReport report = sparsifier.end_backward(2);
      EXPECT_EQ(report.units.size(), layer.units().size());
      EXPECT_EQ(report.units.front().num_grown, 4 * kDModel);
      for (int64_t e = 0; e < kExperts; ++e) {
        PackedMask expected = old[static_cast<size_t>(e)];
        for (size_t i = 0; i < 4; ++i) {
          expected.set(drop[static_cast<size_t>(e)][i].second, false);
          expected.set(grow[static_cast<size_t>(e)][i].second, true);
        }
        EXPECT_EQ(sparsifier.neurons(w2_of(e)), expected);
      }
    }
  }
}

TEST(SparseNeuron, Untouched) {
  at::set_num_threads(1);
  for (const UpdateOrder order : {UpdateOrder::kBeforeStep, UpdateOrder::kAfterStep}) {
    const Layer layer(true);
    SparsifierConfig config = coupled(GrowCriterion::kGrad, order);
    config.grad_accum = 3;
    config.schedule.every = 5;
    config.schedule.begin = 4;  // windows 2 3 4, 7 8 9, ...
    Sparsifier sparsifier(layer.units(), config);
    torch::optim::AdamW optimizer(layer.experts->parameters(),
                                  torch::optim::AdamWOptions(0.01).weight_decay(0.1));
    sparsifier.attach(optimizer);
    at::Tensor placed;
    for (int64_t step = 0; step < 30; ++step) {
      sparsifier.begin_step(step);
      const Places with_rows = places_with_rows(layer.expert(0));
      const bool is_window = step % 5 >= 2;
      EXPECT_EQ(with_rows.size(), is_window ? 16u : 8u) << step;
      const PackedMask active = sparsifier.neurons(w2_of(0));
      at::Tensor rows = layer.expert(0).w1.clone();
      for (const int64_t j : listed(active)) rows[j].zero_();
      if (step % 5 == 2) placed = rows;
      if (is_window) {
        EXPECT_TRUE(at::equal(rows, placed)) << step;
      }
      if (step % 5 == 2 && step > 2) {
        EXPECT_FALSE(at::equal(rows, at::zeros_like(rows)));
      }
      optimizer.zero_grad();
      layer.backward(step);
      sparsifier.end_backward(step);
      expect_coupled(layer, sparsifier, 8);
      const PackedMask now = sparsifier.neurons(w2_of(0));
      for (int64_t j = 0; j < kWidth; ++j) {
        if (now.test(j)) continue;
        EXPECT_FALSE(layer.experts->up_proj.grad()[0][j].ne(0).any().item<bool>());
        EXPECT_FALSE(layer.experts->down_proj.grad()[0].select(1, j).ne(0).any().item<bool>());
      }
      optimizer.step();
      sparsifier.end_step(step);
      expect_coupled(layer, sparsifier, 8);
      const PackedMask end = sparsifier.neurons(w2_of(0));
      const auto& state = static_cast<torch::optim::AdamWParamState&>(
          *optimizer.state().at(layer.experts->up_proj.unsafeGetTensorImpl()));
      for (int64_t j = 0; j < kWidth; ++j) {
        if (end.test(j)) continue;
        EXPECT_FALSE(state.exp_avg()[0][j].ne(0).any().item<bool>());
        EXPECT_FALSE(state.exp_avg_sq()[0][kWidth + j].ne(0).any().item<bool>());
      }
    }
    EXPECT_GT(sparsifier.totals().num_updates, 30);
  }
}

TEST(SparseNeuron, Skipped) {
  at::set_num_threads(1);
  for (const bool has_link_rows : {true, false}) {
    const Layer layer(true);
    auto* const gate = dynamic_cast<Layer::Thirds*>(layer.layer->gates()[0].get());
    ASSERT_NE(gate, nullptr);
    gate->used = 2;  // expert 2 has no rows
    SparsifierConfig config = coupled();
    config.min_rows = has_link_rows ? 1 : 0;
    Sparsifier sparsifier(layer.units(), config);
    const at::Tensor up = layer.experts->up_proj[2].clone(),
                     down = layer.experts->down_proj[2].clone();
    sparsifier.begin_step(1);
    layer.experts->zero_grad();
    layer.backward(1);
    const UpdateReport report = sparsifier.end_backward(1);
    sparsifier.end_step(1);
    for (const UnitUpdate& unit : report.units) {
      EXPECT_EQ(unit.skipped, unit.key.expert < 2 ? SkipReason::kNotSkipped
                              : has_link_rows     ? SkipReason::kFewRows
                                                  : SkipReason::kNoGradient);
      EXPECT_EQ(unit.num_grown > 0, unit.key.expert < 2);
    }
    EXPECT_TRUE(same_bits(layer.experts->up_proj[2], up));
    EXPECT_TRUE(same_bits(layer.experts->down_proj[2], down));
    EXPECT_EQ(sparsifier.stats(w2_of(2)).num_skipped, 1);
    expect_coupled(layer, sparsifier, 8);
  }
}

TEST(SparseNeuron, Diverged) {
  const Layer layer(true);
  Sparsifier sparsifier(layer.units(), coupled());
  const std::vector<Places> before = {listed(sparsifier.neurons(w2_of(0)))};
  sparsifier.begin_step(1);
  layer.experts->zero_grad();
  layer.backward(1);
  layer.experts->down_proj.mutable_grad()[1].fill_(std::nan(""));
  std::string text;
  try {
    sparsifier.end_backward(1);
  } catch (const Diverged& error) {
    text = error.what();
  }
  EXPECT_NE(text.find("scores of hidden units of layer0.expert1.w2=8 are NaN"), std::string::npos)
      << text;
  EXPECT_EQ(listed(sparsifier.neurons(w2_of(0))), before[0]);
  expect_coupled(layer, sparsifier, 8);  // candidates are gone
}

TEST(SparseNeuron, Compact) {
  at::set_num_threads(1);
  for (const bool gated : {true, false}) {
    const Layer layer(gated);
    Sparsifier sparsifier(layer.units(), coupled());
    torch::optim::SGD optimizer(layer.experts->parameters(), torch::optim::SGDOptions(0.1));
    sparsifier.attach(optimizer);
    for (int64_t step = 0; step < 9; ++step) train_step(layer, sparsifier, optimizer, step);
    std::vector<PackedMask> active;
    for (int64_t e = 0; e < kExperts; ++e) active.push_back(sparsifier.neurons(w2_of(e)));
    const CompactExperts compact = compact_experts(
        layer.experts->up_proj.detach(), layer.experts->down_proj.detach(), gated, active, 1);
    const auto small =
        std::make_shared<GroupedMLP>(GroupedMLPOptions(kDModel, 8)
                                         .d_out(kDOut)
                                         .gated(gated)
                                         .activation(layer.experts->options().activation()),
                                     ExpertPlacement::contiguous(kExperts, 1), 0);
    small->to(at::kDouble);
    {
      const at::NoGradGuard no_grad;
      small->up_proj.copy_(compact.up_proj);
      small->down_proj.copy_(compact.down_proj);
    }
    MoELayer other({std::make_shared<Layer::Thirds>()}, small,
                   ExpertPlacement::contiguous(kExperts, 1), ParallelGroups());
    const at::Tensor tokens = normal({17, kDModel}, 40);
    EXPECT_TRUE(close_to(other.forward(MoEInput(tokens)).output(), layer.forward(0), 1e-12));
  }
}

TEST(SparseNeuron, Resume) {
  at::set_num_threads(1);
  for (const bool is_compressed : {false, true}) {
    for (const int64_t stop : {17, 18, 19, 20}) {  // updates at 4, 9, ..., 19; windows of 3
      SparsifierConfig config = coupled();
      config.grad_accum = 3;
      config.schedule.every = 5;
      config.schedule.begin = 4;
      const auto make = [&](const Layer& layer) -> std::unique_ptr<torch::optim::Optimizer> {
        const torch::optim::AdamWOptions options(0.01);
        if (is_compressed)
          return std::make_unique<SparseAdamW>(layer.experts->parameters(), options);
        return std::make_unique<torch::optim::AdamW>(layer.experts->parameters(), options);
      };
      const Layer layer(true), other(true);
      Sparsifier sparsifier(layer.units(), config), resumed(other.units(), config);
      const auto optimizer = make(layer), other_optimizer = make(other);
      sparsifier.attach(*optimizer);
      resumed.attach(*other_optimizer);
      for (int64_t step = 0; step < 13; ++step) {
        train_step(other, resumed, *other_optimizer, step + 1);
      }
      resumed.begin_step(18);  // candidates stand in the weights
      for (int64_t step = 0; step < 40; ++step) {
        if (step == stop) {
          other.experts->up_proj.detach().copy_(layer.experts->up_proj.detach());
          other.experts->down_proj.detach().copy_(layer.experts->down_proj.detach());
          resumed.load(sparsifier.state_dict());
          std::stringstream saved;
          torch::save(*optimizer, saved);
          torch::load(*other_optimizer, saved);
        }
        train_step(layer, sparsifier, *optimizer, step);
        if (step >= stop) train_step(other, resumed, *other_optimizer, step);
      }
      EXPECT_TRUE(same_bits(layer.experts->up_proj, other.experts->up_proj)) << stop;
      EXPECT_TRUE(same_bits(layer.experts->down_proj, other.experts->down_proj)) << stop;
      for (const SparseUnit& unit : sparsifier.units()) {
        EXPECT_EQ(sparsifier.mask(unit.key), resumed.mask(unit.key));
        EXPECT_EQ(sparsifier.stats(unit.key).ever_active, resumed.stats(unit.key).ever_active);
      }
    }
  }
}

TEST(SparseNeuron, LoadRefused) {
  const Layer layer(true);
  Sparsifier sparsifier(layer.units(), coupled());
  const SparsifierState good = sparsifier.state_dict();
  sparsifier.load(good);
  const auto text = [&](const std::function<void(SparsifierState&)>& spoil) {
    SparsifierState bad = good;
    spoil(bad);
    return config_error([&] { sparsifier.load(bad); });
  };
  const auto moved = [](PackedMask& mask, int64_t from, int64_t to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      mask.set(from * mask.cols() + i, false);
      mask.set(to * mask.cols() + i, true);
    }
  };
  const PackedMask& active = sparsifier.neurons(w2_of(0));
  int64_t in = 0, out = 0;
  while (!active.test(in)) ++in;
  while (active.test(out)) ++out;
  EXPECT_EQ(text([&](SparsifierState& s) { moved(s.units[0].mask, in, out, 6); }),
            "[sparsifier] mask of layer0.expert0.w1=given has other hidden units than "
            "layer0.expert0.w2");
  EXPECT_NE(
      text([&](SparsifierState& s) { moved(s.units[0].mask, in, out, 3); }).find("other hidden"),
      std::string::npos);
  EXPECT_NE(
      text([&](SparsifierState& s) { s.units[2].mask.set(in, false); }).find("its budget of 32"),
      std::string::npos);
  EXPECT_EQ(text([&](SparsifierState& s) {
              PackedMask& w2 = s.units[2].mask;
              w2.set(in, false);
              w2.set(out, true);
            }),
            "[sparsifier] mask of layer0.expert0.w2=9 hidden units are not its 8");
  EXPECT_EQ(listed(sparsifier.neurons(w2_of(0))), listed(active));
}

TEST(SparseNeuron, Ranks) {
  at::set_num_threads(1);
  RunOptions options;
  options.has_head = false;
  std::vector<SparsifierConfig> configs = {
      coupled(),
      coupled(GrowCriterion::kRandom),
      coupled(GrowCriterion::kGrad, UpdateOrder::kAfterStep),
      coupled(GrowCriterion::kGrad, UpdateOrder::kInsteadOfStep),
      coupled(),
      coupled()};
  configs[0].grad_accum = 2;
  configs[4].schedule.stagger = true;
  configs[5].schedule.clock = Clock::kTokens;
  configs[5].schedule.begin = 2;
  for (SparsifierConfig& config : configs) config.budget.density = 0.6;  // 21 of 35
  for (size_t c = 0; c < configs.size(); ++c) {
    const Trained one = train(1, 1, configs[c], options);
    EXPECT_EQ(one.totals.nnz, 21 * 16);  // one expert has 5, the others 4
    EXPECT_GT(one.num_grown, 5 * 16) << c;
    for (const auto& [num_ranks, ep_size] : layouts()) {
      SCOPED_TRACE("config " + std::to_string(c) + " P=" + std::to_string(num_ranks) +
                   " ep=" + std::to_string(ep_size));
      const Trained many = train(num_ranks, ep_size, configs[c], options);
      expect_close(many, one, 1e-11);
      EXPECT_EQ(many.totals.nnz, one.totals.nnz);
      EXPECT_EQ(many.totals.num_updates, one.totals.num_updates);
      if (num_ranks != ep_size) continue;
      for (const auto& [key, weight] : one.weights) {
        EXPECT_TRUE(same_bits(weight, many.weights.at(key))) << to_string(key);
      }
    }
  }
}

TEST(SparseNeuron, RanksResume) {
  at::set_num_threads(1);
  SparsifierConfig config = coupled();
  config.grad_accum = 3;
  RunOptions whole, first, second;
  whole.has_head = first.has_head = second.has_head = false;
  const Trained expected = train(1, 1, config, whole);
  first.end_step = second.first_step = 6;  // updates at 1, 4, 7
  const Trained half = train(4, 2, config, first);
  second.from = &half;
  expect_close(train(2, 2, config, second), expected, 1e-11);
}

TEST(SparseNeuron, Turns) {
  const Layer layer(true);
  SparsifierConfig config = coupled();
  config.schedule.every = 9;
  config.schedule.stagger = true;
  const Sparsifier sparsifier(layer.units(), config);
  std::set<int64_t> times;
  for (int64_t step = 1; step < 10; ++step) {
    const StepPlan plan = sparsifier.plan(step);
    std::set<int64_t> experts;
    int64_t count = 0;
    for (size_t u = 0; u < plan.actions.size(); ++u) {
      if (plan.actions[u] != UnitAction::kUpdate) continue;
      experts.insert(sparsifier.units()[u].key.expert);
      times.insert(step);
      ++count;
    }
    EXPECT_EQ(count, 3 * static_cast<int64_t>(experts.size()));
    EXPECT_LE(experts.size(), 1u);
  }
  EXPECT_EQ(times.size(), 3u);
}

TEST(SparseNeuron, Preset) {
  at::set_num_threads(1);
  const auto experts = std::make_shared<GroupedMLP>(GroupedMLPOptions(6, 40).seed(2),
                                                    ExpertPlacement::contiguous(2, 1), 0);
  SparsifierConfig config = presets::neuron(0.5, 100, 5);
  config.min_rows = 0;
  Sparsifier sparsifier(experts->sparse_units(0), config);
  EXPECT_EQ(sparsifier.nnz(), 2 * 20 * 18);
  for (int64_t step = 0; step < 15; ++step) {
    sparsifier.begin_step(step);
    experts->up_proj.mutable_grad() = normal(experts->up_proj.sizes(), 1, at::kFloat);
    experts->down_proj.mutable_grad() =
        normal(experts->down_proj.sizes(), 9 + static_cast<uint64_t>(step), at::kFloat);
    sparsifier.end_backward(step);
    sparsifier.end_step(step);
  }
  EXPECT_EQ(sparsifier.nnz(), 2 * 20 * 18);
  EXPECT_EQ(sparsifier.totals().num_updates, 18);
  EXPECT_GT(sparsifier.totals().churn, 0.04);
  std::ostringstream line;
  line << sparsifier.config();
  EXPECT_NE(line.str().find(" cell=neuron "), std::string::npos);
  EXPECT_NE(line.str().find(" candidates=4"), std::string::npos);
}

TEST(SparseNeuron, Bounds) {
  // Of 20 hidden units in each of 3 experts, 24 in all at density 0.4.
  const Layer layer(true);
  SparsifierConfig config = coupled();
  config.budget.floor = 0.5;
  EXPECT_NE(config_error([&] { Sparsifier(layer.units(), config); }).find("the floors need"),
            std::string::npos);
  config.budget.floor = 0.4;
  config.budget.ceiling = 0.4;
  const Sparsifier sparsifier(layer.units(), config);
  expect_coupled(layer, sparsifier, 8);
  config.budget.floor.reset();
  config.budget.ceiling = 0.35;
  EXPECT_NE(config_error([&] { Sparsifier(layer.units(), config); }).find("the ceilings allow"),
            std::string::npos);
}

TEST(SparseNeuron, Bfloat16) {
  at::set_num_threads(1);
  const auto experts = std::make_shared<GroupedMLP>(GroupedMLPOptions(6, 40).seed(2),
                                                    ExpertPlacement::contiguous(2, 1), 0);
  experts->to(at::kBFloat16);
  SparsifierConfig config = presets::neuron(0.5, 100, 5);
  config.min_rows = 0;
  Sparsifier sparsifier(experts->sparse_units(0), config);
  SparseAdamW optimizer(experts->parameters(), torch::optim::AdamWOptions(0.1).weight_decay(0));
  sparsifier.attach(optimizer);
  int64_t num_grown = 0;
  for (int64_t step = 0; step < 11; ++step) {
    const PackedMask before = sparsifier.neurons(w2_of(1));
    sparsifier.begin_step(step);
    for (at::Tensor* parameter : {&experts->up_proj, &experts->down_proj}) {
      parameter->mutable_grad() =
          normal(parameter->sizes(), 9 + static_cast<uint64_t>(step), at::kBFloat16);
    }
    sparsifier.end_backward(step);
    const Places grown = listed(without(sparsifier.neurons(w2_of(1)), before));
    num_grown += static_cast<int64_t>(grown.size());
    const at::Tensor rows = experts->up_proj[1].detach().clone();
    for (const int64_t j : grown) experts->up_proj.mutable_grad()[1][j].zero_();
    optimizer.step();
    for (const int64_t j : grown) {  // no gradient, no step: the master copy is the new row
      EXPECT_TRUE(rows[j].ne(0).all().item<bool>());
      EXPECT_TRUE(at::equal(experts->up_proj[1][j], rows[j]));
      EXPECT_TRUE(experts->down_proj[1].select(1, j).ne(0).all().item<bool>());
    }
    sparsifier.end_step(step);
  }
  EXPECT_EQ(num_grown, 4);  // of 20: 2, 1 and 1
}

TEST(SparseNeuron, Refused) {
  const Layer layer(true);
  const auto text = [&](const std::function<void(SparsifierConfig&)>& spoil) {
    SparsifierConfig bad = coupled();
    spoil(bad);
    return config_error([&] { Sparsifier(layer.units(), bad); });
  };
  EXPECT_EQ(text([](SparsifierConfig& c) { c.neurons.candidates = 0; }),
            "[sparsifier] candidates=0 is below 1");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.drop = DropCriterion::kSetSigned; }),
            "[sparsifier] drop=other than magnitude is not a score of hidden units");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.grow = GrowCriterion::kUnfired; }),
            "[sparsifier] grow=other than grad and random is not a score of hidden units");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.exclude_just_dropped = false; }),
            "[sparsifier] exclude_just_dropped=false cannot be: who comes was a candidate before");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.state.weight = GrownWeight::kNormal; }),
            "[sparsifier] grown weight=normal would change outputs; hidden units start with column "
            "0");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.state.second_moment = GrownSecondMoment::kGradient; }),
            "[sparsifier] second_moment=gradient is not known for new rows; choose zero, mean or "
            "age");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.structure.atom_rows = 2; }),
            "[sparse_structure] atom=2x1 is not 1x1; hidden units are whole rows and columns "
            "already");
  EXPECT_EQ(text([](SparsifierConfig& c) {
              c.neurons.links = {{{4}, {5}}};
            }),
            "[sparse_neurons] links=layer 5, expert 0, weight is no unit of the Sparsifier");
  EXPECT_EQ(text([](SparsifierConfig& c) {
              c.neurons.links = {{{0, 0, Matrix::kW1}, w2_of(0)}};
            }),
            "[sparse_neurons] links=layer0.expert0.w2 has its columns in two of them");
  EXPECT_EQ(text([](SparsifierConfig& c) {
              c.neurons.links = {{w2_of(0), w2_of(1)}};
            }),
            "[sparse_neurons] rows of layer0.expert0.w2=4 differ from the 20 columns of "
            "layer0.expert1.w2; hidden unit j is row j of one and column j of the other");
  EXPECT_EQ(text([](SparsifierConfig& c) {
              c.structure = {};
              c.neurons.links = {{w2_of(0), w2_of(1)}};
            }),
            "[sparsifier] links=given belong to coupled neurons or ablation; set one of these, or "
            "none");
  EXPECT_EQ(
      config_error([&] { Sparsifier(layer.experts->sparse_units(0, "w1"), coupled()); }),
      "[sparsifier] units=layer0.expert0.w1 has no hidden units with another; pass w1, w3 and "
      "w2 of an expert, or list links");
  const Sparsifier sparsifier(layer.units(), coupled());
  EXPECT_EQ(config_error([&] {
              sparsifier.neurons({0, 0, Matrix::kW1});
            }),
            "[sparsifier] unit=layer 0, expert 0, w1 has no columns of coupled neurons; name a w2");
}

}  // namespace
}  // namespace perseid::testing
