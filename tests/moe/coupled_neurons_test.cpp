// Hidden units of an expert, switched as a whole.
//   Scores         of units by hand; of candidates: norm of autograd's gradient of their column
//   GrowingIsFree  the output is bit-equal before and after growth, and the gradient of a grown
//                  unit's column is not 0; the units of largest score are taken
//   Dropping       the smallest scores; counts equal in the three parts; everything else untouched
//   NotDone        no place, no gradient, NaN: nothing changes
//   Compact        smaller experts with the same output, counts rounded up
//   Training       a layer trains with a SparseAdamW: counts stay, inactive units are exactly 0,
//                  states have active entries only
//   SameForRanks   units depend on global expert ids, not on slots
#include "moe/coupled_neurons.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "moe/sparse_structure.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"

namespace perseid {
namespace {

using testing::config_error;
using testing::normal;

constexpr int64_t kWidth = 12, kModel = 5, kRows = 9;

ExpertWeights make_expert(bool gated) {
  ExpertWeights expert;
  expert.w1 = normal({kWidth, kModel}, 1);
  if (gated) expert.w3 = normal({kWidth, kModel}, 2);
  expert.w2 = normal({kModel, kWidth}, 3);
  return expert;
}
void keep_only(const ExpertWeights& expert, const PackedMask& active) {
  for (int64_t j = 0; j < active.cols(); ++j) {
    if (active.test(j)) continue;
    expert.w1[j].zero_();
    if (expert.w3.defined()) expert.w3[j].zero_();
    expert.w2.select(1, j).zero_();
  }
}
at::Tensor output(const ExpertWeights& expert, const at::Tensor& x) {
  at::Tensor hidden = at::silu(x.mm(expert.w1.t()));
  if (expert.w3.defined()) hidden = hidden * x.mm(expert.w3.t());
  return hidden.mm(expert.w2.t());
}
ExpertWeights copy_of(const ExpertWeights& expert) {
  return {expert.w1.clone(), expert.w3.defined() ? expert.w3.clone() : at::Tensor(),
          expert.w2.clone()};
}
bool same(const ExpertWeights& a, const ExpertWeights& b) {
  return at::equal(a.w1, b.w1) && (!a.w3.defined() || at::equal(a.w3, b.w3)) &&
         at::equal(a.w2, b.w2);
}
PackedMask first_units(int64_t count) {
  PackedMask mask(1, kWidth);
  for (int64_t j = 0; j < count; ++j) mask.set((j * 5 + 2) % kWidth, true);
  return mask;
}

TEST(CoupledNeurons, Scores) {
  ExpertWeights expert;
  expert.w1 = at::tensor({3.0, 0.0, 0.0, 0.0}).view({2, 2});
  expert.w3 = at::tensor({0.0, 4.0, 1.0, 0.0}).view({2, 2});
  expert.w2 = at::tensor({12.0, 0.0}).view({1, 2});
  EXPECT_TRUE(at::equal(neuron_scores(expert), at::tensor({13.0F, 1.0F})));

  for (const bool gated : {true, false}) {
    const ExpertWeights like = make_expert(gated);
    const NeuronCandidates candidates = draw_neurons(7, like, kernels::random_key(4));
    EXPECT_EQ(candidates.w3.defined(), gated);
    EXPECT_LE(candidates.w1.abs().max().item<double>(), 1 / std::sqrt(5.0));
    const at::Tensor x = normal({kRows, kModel}, 5), delta = normal({kRows, kModel}, 6);
    ExpertWeights fresh;
    fresh.w1 = candidates.w1;
    fresh.w3 = candidates.w3;
    fresh.w2 = at::zeros({kModel, 7}, at::kDouble).requires_grad_(true);
    output(fresh, x).backward(delta);
    const at::Tensor expected = fresh.w2.grad().square().sum(0).sqrt();
    const at::Tensor scores = candidate_scores(candidates, kernels::Activation::kSilu, x, delta);
    EXPECT_TRUE(at::allclose(scores.to(at::kDouble), expected, 1e-6, 0));
  }
}

TEST(CoupledNeurons, GrowingIsFree) {
  for (const bool gated : {true, false}) {
    const PackedMask active = first_units(6);
    ExpertWeights expert = make_expert(gated);
    keep_only(expert, active);
    const at::Tensor x = normal({kRows, kModel}, 5), delta = normal({kRows, kModel}, 6);
    NeuronRule rule;
    rule.fraction = 0.5;
    const kernels::RandomKey key = kernels::random_key(8);
    const NeuronUpdate update = update_neurons(expert, active, rule, x, delta, key);
    ASSERT_EQ(update.grown.size(), 3u);
    ASSERT_EQ(update.dropped.size(), 3u);
    EXPECT_EQ(update.active.count(), 6);
    // The best three of twelve candidates.
    const NeuronCandidates candidates = draw_neurons(12, expert, key);
    const at::Tensor scores = candidate_scores(candidates, rule.activation, x, delta);
    const at::Tensor best = std::get<0>(std::get<1>(scores.topk(3)).sort());
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t j = update.grown[static_cast<size_t>(i)], from = best[i].item<int64_t>();
      EXPECT_FALSE(active.test(j));
      EXPECT_TRUE(update.active.test(j));
      EXPECT_TRUE(at::equal(expert.w1[j], candidates.w1[from]));
      if (gated) {
        EXPECT_TRUE(at::equal(expert.w3[j], candidates.w3[from]));
      }
      EXPECT_EQ(expert.w2.select(1, j).abs().sum().item<double>(), 0);
    }
    // Without the grown units: the same bits. With them: a gradient.
    ExpertWeights without_grown = copy_of(expert);
    for (const int64_t j : update.grown) {
      without_grown.w1[j].zero_();
      if (gated) without_grown.w3[j].zero_();
    }
    EXPECT_TRUE(at::equal(output(expert, x), output(without_grown, x)));
    expert.w2.requires_grad_(true);
    output(expert, x).backward(delta);
    for (const int64_t j : update.grown) {
      EXPECT_GT(expert.w2.grad().select(1, j).abs().min().item<double>(), 0);
    }
  }
}

TEST(CoupledNeurons, Dropping) {
  const PackedMask active = first_units(7);
  const ExpertWeights expert = make_expert(true);
  keep_only(expert, active);
  const ExpertWeights before = copy_of(expert);
  const at::Tensor scores = neuron_scores(expert);
  NeuronRule rule;
  rule.fraction = 0.45;  // floor(3.15)
  const NeuronUpdate update = update_neurons(expert, active, rule, normal({kRows, kModel}, 5),
                                             normal({kRows, kModel}, 6), kernels::random_key(8));
  ASSERT_EQ(update.dropped.size(), 3u);
  for (int64_t j = 0; j < kWidth; ++j) {
    const bool is_dropped =
        std::find(update.dropped.begin(), update.dropped.end(), j) != update.dropped.end();
    const bool is_grown =
        std::find(update.grown.begin(), update.grown.end(), j) != update.grown.end();
    EXPECT_EQ(update.active.test(j), (active.test(j) && !is_dropped) || is_grown);
    EXPECT_FALSE(is_dropped && is_grown);
    if (is_dropped) {
      EXPECT_TRUE(active.test(j));
      for (int64_t kept = 0; kept < kWidth; ++kept) {
        if (update.active.test(kept) && active.test(kept)) {
          EXPECT_LE(scores[j].item<float>(), scores[kept].item<float>());
        }
      }
    }
    if (active.test(j) && !is_dropped) {
      EXPECT_TRUE(at::equal(expert.w1[j], before.w1[j]) && at::equal(expert.w3[j], before.w3[j]) &&
                  at::equal(expert.w2.select(1, j), before.w2.select(1, j)));
    }
    if (!update.active.test(j)) {
      EXPECT_EQ(
          (expert.w1[j].abs().sum() + expert.w3[j].abs().sum() + expert.w2.select(1, j).abs().sum())
              .item<double>(),
          0);
    }
  }
}

TEST(CoupledNeurons, NotDone) {
  const at::Tensor x = normal({kRows, kModel}, 5), delta = normal({kRows, kModel}, 6);
  const auto unchanged = [&](const PackedMask& active, const at::Tensor& rows,
                             const at::Tensor& deltas, NeuronUpdate& update) {
    const ExpertWeights expert = make_expert(true);
    keep_only(expert, active);
    const ExpertWeights before = copy_of(expert);
    update = update_neurons(expert, active, {}, rows, deltas, kernels::random_key(8));
    return same(expert, before) && update.active == active && update.grown.empty() &&
           update.dropped.empty();
  };
  NeuronUpdate update;
  EXPECT_TRUE(unchanged(PackedMask::full(1, kWidth), x, delta, update));  // no place
  EXPECT_TRUE(unchanged(first_units(3), x, delta, update));               // floor(0.9) units
  EXPECT_FALSE(update.has_no_gradient);
  EXPECT_TRUE(unchanged(first_units(6), x, at::zeros_like(delta), update));
  EXPECT_TRUE(update.has_no_gradient);
  EXPECT_TRUE(unchanged(first_units(6), x.narrow(0, 0, 0), delta.narrow(0, 0, 0), update));
  EXPECT_TRUE(update.has_no_gradient);
  EXPECT_TRUE(unchanged(first_units(6), x, delta * NAN, update));
  EXPECT_GT(update.num_non_finite, 0);
}

TEST(CoupledNeurons, Compact) {
  for (const bool gated : {true, false}) {
    const at::Tensor up = normal({3, (gated ? 2 : 1) * kWidth, kModel}, 1);
    const at::Tensor down = normal({3, kModel, kWidth}, 2);
    const std::vector<PackedMask> masks = {first_units(5), first_units(2), PackedMask(1, kWidth)};
    for (int64_t slot = 0; slot < 3; ++slot) {
      keep_only(expert_weights(up, down, gated, slot), masks[static_cast<size_t>(slot)]);
    }
    const at::Tensor x = normal({kRows, kModel}, 5);
    for (const int64_t multiple : {1, 4, 16}) {
      const CompactExperts compact = compact_experts(up, down, gated, masks, multiple);
      const int64_t width = multiple == 1 ? 5 : multiple == 4 ? 8 : kWidth;  // 16 exceeds F
      EXPECT_EQ(compact.down_proj.size(2), width);
      EXPECT_EQ(compact.up_proj.size(1), (gated ? 2 : 1) * width);
      for (int64_t slot = 0; slot < 3; ++slot) {
        const ExpertWeights small = expert_weights(compact.up_proj, compact.down_proj, gated, slot);
        const ExpertWeights large = expert_weights(up, down, gated, slot);
        EXPECT_TRUE(at::allclose(output(small, x), output(large, x), 1e-12, 1e-14));
        EXPECT_EQ(compact.units[slot].ge(0).sum().item<int64_t>(),
                  masks[static_cast<size_t>(slot)].count());
      }
    }
  }
}

at::Tensor is_active(const PackedMask& positions) {
  return position_mask(
      make_layout(Structure::unstructured(), positions.rows(), positions.cols(), "mask"),
      positions);
}

TEST(CoupledNeurons, Training) {
  const at::Tensor up = normal({2, 2 * kWidth, kModel}, 1).requires_grad_(true);
  const at::Tensor down = normal({2, kModel, kWidth}, 2).requires_grad_(true);
  CoupledNeuronsOptions options;
  options.num_active = 6;
  options.expert_ids = {4, 7};
  CoupledNeurons neurons(up, down, options);
  SparseAdamW optimizer({up, down}, torch::optim::AdamWOptions(0.01).weight_decay(0.1));
  neurons.attach(optimizer);
  int64_t num_grown = 0;
  for (int64_t step = 0; step < 40; ++step) {
    optimizer.zero_grad();
    std::vector<at::Tensor> rows, outputs;
    for (int64_t slot = 0; slot < 2; ++slot) {
      rows.push_back(normal({kRows, kModel}, 100 + static_cast<uint64_t>(2 * step + slot)));
      ExpertWeights expert;
      expert.w1 = up[slot].narrow(0, 0, kWidth);
      expert.w3 = up[slot].narrow(0, kWidth, kWidth);
      expert.w2 = down[slot];
      outputs.push_back(output(expert, rows.back()));
      outputs.back().retain_grad();
    }
    (outputs[0].sin() + (outputs[1] - 1).square()).sum().backward();
    neurons.mask_gradients();
    for (int64_t slot = 0; slot < 2; ++slot) {
      const at::Tensor gone = is_active(neurons.up_positions(slot)).logical_not();
      ASSERT_EQ(up.grad()[slot].masked_select(gone).abs().sum().item<double>(), 0);
    }
    optimizer.step();
    if (step % 5 == 4) {
      for (int64_t slot = 0; slot < 2; ++slot) {
        const auto s = static_cast<size_t>(slot);
        num_grown += static_cast<int64_t>(
            neurons.update(slot, step, rows[s], outputs[s].grad()).grown.size());
      }
    }
    for (int64_t slot = 0; slot < 2; ++slot) {
      ASSERT_EQ(neurons.active(slot).count(), 6);
      EXPECT_EQ(neurons.up_positions(slot).count(), 6 * 2 * kModel);
      EXPECT_EQ(neurons.down_positions(slot).count(), 6 * kModel);
      for (const auto& [parameter, positions] :
           {std::pair{up, neurons.up_positions(slot)}, {down, neurons.down_positions(slot)}}) {
        const at::Tensor gone = is_active(positions).logical_not();
        ASSERT_EQ(parameter.detach()[slot].masked_select(gone).abs().sum().item<double>(), 0);
        const ActiveStates& states = optimizer.active_states(parameter, slot);
        ASSERT_EQ(states.positions, positions);
        ASSERT_EQ(states.second_moment.numel(), positions.count());
      }
    }
  }
  EXPECT_EQ(num_grown, 8 * 2 * 1);  // floor(0.3 * 6) of each expert every five steps
  const at::Tensor x = normal({kRows, kModel}, 7);
  const CompactExperts compact = neurons.compact(2);
  for (int64_t slot = 0; slot < 2; ++slot) {
    EXPECT_TRUE(
        at::allclose(output(expert_weights(compact.up_proj, compact.down_proj, true, slot), x),
                     output(expert_weights(up, down, true, slot), x), 1e-12, 1e-14));
  }
}

TEST(CoupledNeurons, SameForRanks) {
  const at::Tensor up = normal({2, 2 * kWidth, kModel}, 1), down = normal({2, kModel, kWidth}, 2);
  const at::Tensor x = normal({kRows, kModel}, 5), delta = normal({kRows, kModel}, 6);
  CoupledNeuronsOptions options;
  options.num_active = 6;
  options.expert_ids = {4, 7};
  CoupledNeurons both(up.clone(), down.clone(), options);
  options.expert_ids = {7};
  const at::Tensor one_up = up.narrow(0, 1, 1).clone(), one_down = down.narrow(0, 1, 1).clone();
  CoupledNeurons one(one_up, one_down, options);
  EXPECT_FALSE(both.active(0) == both.active(1));
  EXPECT_TRUE(both.active(1) == one.active(0));
  const NeuronUpdate first = both.update(1, 9, x, delta), second = one.update(0, 9, x, delta);
  EXPECT_TRUE(first.active == second.active);
  EXPECT_EQ(first.grown, second.grown);
  EXPECT_EQ(config_error([&] { both.active(2); }),
            "[coupled_neurons] slot=2 is outside the 2 experts");
  options.num_active = kWidth + 1;
  EXPECT_EQ(config_error([&] { CoupledNeurons(one_up, one_down, options); }),
            "[coupled_neurons] num_active=13 is outside [1, F=12]");
  EXPECT_THROW(one.update(0, 10, x, delta * NAN), Diverged);
}

}  // namespace
}  // namespace perseid
