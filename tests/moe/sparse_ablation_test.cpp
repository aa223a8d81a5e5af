// Neuron ablation of weights with constant fan-in (SRigL), float64.
//   ByHand        a 5x6 weight: salient ones, threshold, rows left, the new mask; then a row comes
//                 back
//   BruteForce    the rule written down once more, on small random weights
//   LowThreshold  fewer rows than can hold all weights: the threshold falls; at 0 all rows stay
//   FanIn         exact for six densities; 1000x1000 at 90 % has 100 in each row, at 80 % 200
//   Training      updates keep the number of weights exactly, ablated rows are 0 and kept rows
//                 stay; with loses_rest the number falls by less than one a row
//   LosesRest     what is lost does not change how many weights the next updates move
//   FreesColumns  w2 drops what reads ablated units at the end, or at once, and grows as much
//                 elsewhere; not where hidden units have a bias
//   Resume        save, load, go on: the uninterrupted run; masks of other rows are refused
//   Exports       rows that are ablated or one short: condensed and CSR equal the dense weight,
//                 also their gradients
//   Ranks         masks and weights of P = 2 and 4 are those of one process
//   Preset        three updates of two experts keep the budget
//   Refused       texts
#include "moe/sparse_ablation.h"

#include <ATen/Parallel.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <numeric>

#include "moe/sparse_export.h"
#include "moe/sparse_presets.h"
#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"
#include "tests/moe/sparse_ranks_fixture.h"

namespace perseid::testing {
namespace {

using Counts = std::vector<int64_t>;

Counts rows_of(const PackedMask& mask) {
  Counts counts(static_cast<size_t>(mask.rows()), 0);
  for (int64_t place = 0; place < mask.num_places(); ++place) {
    counts[static_cast<size_t>(place / mask.cols())] += mask.test(place) ? 1 : 0;
  }
  return counts;
}
PackedMask mask_with(int64_t out, int64_t in, const std::vector<Counts>& columns) {
  PackedMask mask(out, in);
  for (size_t row = 0; row < columns.size(); ++row) {
    for (const int64_t col : columns[row]) mask.set(static_cast<int64_t>(row) * in + col, true);
  }
  return mask;
}

/// An update of one weight, with what ablation decided.
struct Update {
  RowsLeft rows;
  MaskUpdate change;
};
Update updated(const Ablation& ablation, const PackedMask& active,
               const std::vector<float>& weights, const std::vector<float>& gradients,
               double fraction) {
  const AtomLayout layout =
      make_layout(Structure::constant_fan_in(), active.rows(), active.cols(), "weight");
  Update result;
  UpdateInput input;
  input.active = &active;
  input.drop_scores = weights.data();
  input.grow_scores = gradients.data();
  input.fraction = fraction;
  input.drop_key = kernels::random_key(1);
  input.grow_key = kernels::random_key(2);
  input.random_key = kernels::random_key(3);
  result.rows = ablate_rows(ablation, {&active, weights.data(), gradients.data(), fraction,
                                       input.drop_key, input.grow_key});
  input.cell_targets = &result.rows.counts;
  UpdateRule rule;
  rule.grow = GrowCriterion::kGrad;
  result.change = update_mask(layout, rule, input);
  return result;
}

TEST(SparseAblation, ByHand) {
  const PackedMask active = mask_with(5, 6, {{0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}});
  std::vector<float> weights(30, 0), gradients(30);
  const std::vector<std::pair<int, float>> values = {
      {0, 10}, {1, 9}, {7, 8}, {8, 7}, {14, 6}, {15, 5}, {21, 4}, {22, .3f}, {28, .2f}, {29, .1f}};
  for (const auto& [place, value] : values) weights[static_cast<size_t>(place)] = value;
  for (size_t place = 0; place < 30; ++place) {
    gradients[place] = .01f * static_cast<float>(place + 1);
  }
  gradients[5] = 5;   // row 0
  gradients[6] = 4;   // row 1
  gradients[18] = 3;  // row 3
  // 10 weights, 3 of which go: 22, 28, 29. Salient: the other 7, and the three large gradients.
  Ablation ablation;
  ablation.gamma = 0.5;  // of 2: 1
  Update update = updated(ablation, active, weights, gradients, 0.3);
  EXPECT_EQ(update.rows.salient, (Counts{3, 3, 2, 2, 0}));
  EXPECT_EQ(update.rows.threshold, 1);
  EXPECT_EQ(update.rows.counts, (Counts{3, 3, 2, 2, 0}));  // 10 among 4 rows
  const PackedMask after = mask_with(5, 6, {{0, 1, 5}, {0, 1, 2}, {2, 3}, {0, 3}});
  EXPECT_EQ(update.change.mask, after);
  EXPECT_EQ(update.change.num_dropped, 3);

  ablation.loses_rest = true;
  update = updated(ablation, active, weights, gradients, 0.3);
  EXPECT_EQ(update.rows.counts, (Counts{2, 2, 2, 2, 0}));
  EXPECT_EQ(update.change.mask, mask_with(5, 6, {{0, 1}, {1, 2}, {2, 3}, {0, 3}}));
  ablation.loses_rest = false;

  for (const double gamma : {3.0, 4.0}) {  // 4: one row has as many, 10 weights need 2
    ablation.gamma = gamma;
    update = updated(ablation, active, weights, gradients, 0.3);
    EXPECT_EQ(update.rows.threshold, 3);
    EXPECT_EQ(update.rows.counts, (Counts{5, 5, 0, 0, 0}));
    EXPECT_EQ(update.change.mask, mask_with(5, 6, {{0, 1, 3, 4, 5}, {0, 1, 2, 4, 5}}));
  }

  // The last row comes back with its gradients: 2 for each of 5 rows.
  ablation.gamma = 0.5;
  weights[5] = 3;
  weights[6] = 2.5;
  weights[18] = 2;  // these three go
  gradients[24] = 9;
  gradients[25] = 8;
  gradients[26] = 7;
  update = updated(ablation, after, weights, gradients, 0.3);
  EXPECT_EQ(update.rows.salient, (Counts{2, 2, 2, 1, 3}));
  EXPECT_EQ(update.rows.counts, Counts(5, 2));
  EXPECT_EQ(update.change.mask, mask_with(5, 6, {{0, 1}, {1, 2}, {2, 3}, {3, 5}, {0, 1}}));
}

/// Different numbers above 0 in random order.
std::vector<float> shuffled(int64_t count, kernels::RandomKey key) {
  std::vector<float> values(static_cast<size_t>(count));
  std::iota(values.begin(), values.end(), 1.0f);
  for (size_t i = values.size(); i > 1; --i) {
    std::swap(values[i - 1], values[kernels::random_below(key, i, i)]);
  }
  return values;
}
std::vector<int64_t> sorted_places(const std::vector<float>& scores) {
  std::vector<int64_t> places(scores.size());
  std::iota(places.begin(), places.end(), int64_t{0});
  std::sort(places.begin(), places.end(), [&](int64_t a, int64_t b) {
    return scores[static_cast<size_t>(a)] < scores[static_cast<size_t>(b)];
  });
  return places;
}

TEST(SparseAblation, BruteForce) {
  int64_t num_ablated = 0, num_too_full = 0, num_back = 0, num_lowered = 0;
  for (uint64_t c = 0; c < 400; ++c) {
    const kernels::RandomKey key = kernels::random_key(c);
    const auto draw = [&](uint64_t number, uint64_t below) {
      return static_cast<int64_t>(kernels::random_below(key, number, below));
    };
    const int64_t out = 2 + draw(1, 6), in = 2 + draw(2, 7), fan_in = 1 + draw(3, 5) % in;
    const double fraction = 0.1 * static_cast<double>(draw(4, 7));
    Ablation ablation;
    const std::vector<double> gammas = {0.3, 0.5, 0.95, 1, 2, 3, 9};
    ablation.gamma = gammas[static_cast<size_t>(draw(5, gammas.size()))];
    ablation.loses_rest = draw(6, 3) == 0;
    PackedMask active = random_mask(make_layout(Structure::constant_fan_in(), out, in, "w"),
                                    out * fan_in, key.with(1));
    for (uint64_t round = 0; round < 4; ++round) {
      const std::vector<float> weights = shuffled(out * in, key.with(10 + round));
      const std::vector<float> gradients = shuffled(out * in, key.with(20 + round));
      const Update update = updated(ablation, active, weights, gradients, fraction);

      const Counts before = rows_of(active);
      const int64_t n = std::accumulate(before.begin(), before.end(), int64_t{0});
      const auto d = static_cast<int64_t>(fraction * static_cast<double>(n));
      std::vector<bool> is_dropped(weights.size(), false), is_salient(weights.size(), false);
      int64_t seen = 0;
      for (const int64_t place : sorted_places(weights)) {
        if (!active.test(place)) continue;
        (seen < d ? is_dropped : is_salient)[static_cast<size_t>(place)] = true;
        ++seen;
      }
      const std::vector<int64_t> by_gradient = sorted_places(gradients);
      for (int64_t i = 0; i < d; ++i)
        is_salient[static_cast<size_t>(*(by_gradient.rbegin() + i))] = true;
      Counts salient(static_cast<size_t>(out), 0);
      for (size_t place = 0; place < weights.size(); ++place) {
        salient[place / static_cast<size_t>(in)] += is_salient[place] ? 1 : 0;
      }
      const auto rows_before = static_cast<int64_t>(
          std::count_if(before.begin(), before.end(), [](int64_t k) { return k > 0; }));
      int64_t threshold = static_cast<int64_t>(ablation.gamma);
      if (ablation.gamma < 1) {
        threshold = std::max<int64_t>(
            1, static_cast<int64_t>(ablation.gamma * static_cast<double>(n / rows_before) + 1e-9));
      }
      Counts ranked = salient;
      std::sort(ranked.rbegin(), ranked.rend());
      const auto least = static_cast<size_t>((n + in - 1) / in);
      num_lowered += ranked[least - 1] < threshold ? 1 : 0;
      threshold = std::min(threshold, ranked[least - 1]);
      int64_t rows_left = 0;
      for (const int64_t s : salient) rows_left += s >= threshold ? 1 : 0;
      if (rows_left > n) break;  // LowThreshold
      ASSERT_EQ(update.rows.salient, salient) << c;
      ASSERT_EQ(update.rows.threshold, threshold) << c;
      int64_t rest = ablation.loses_rest ? 0 : n % rows_left;
      PackedMask expected(out, in);
      for (int64_t row = 0; row < out; ++row) {
        const bool is_left = salient[static_cast<size_t>(row)] >= threshold;
        const int64_t target = is_left ? n / rows_left + (rest-- > 0 ? 1 : 0) : 0;
        ASSERT_EQ(update.rows.counts[static_cast<size_t>(row)], target) << c;
        num_ablated += !is_left && before[static_cast<size_t>(row)] > 0 ? 1 : 0;
        num_back += is_left && before[static_cast<size_t>(row)] == 0 ? 1 : 0;
        // What is not dropped, largest first; then gradients; then what was dropped, largest first.
        int64_t count = 0;
        const auto take = [&](const std::vector<int64_t>& order, auto&& fits) {
          for (auto place = order.rbegin(); place != order.rend(); ++place) {
            if (*place / in != row || expected.test(*place) || !fits(*place)) continue;
            if (count == target) {
              num_too_full += order == by_gradient ? 0 : 1;
              return;
            }
            expected.set(*place, true);
            ++count;
          }
        };
        const std::vector<int64_t> by_weight = sorted_places(weights);
        take(by_weight,
             [&](int64_t p) { return active.test(p) && !is_dropped[static_cast<size_t>(p)]; });
        take(by_gradient, [&](int64_t p) { return !active.test(p); });
        take(by_weight, [&](int64_t p) { return is_dropped[static_cast<size_t>(p)]; });
        ASSERT_EQ(count, target) << c;
      }
      ASSERT_EQ(update.change.mask, expected) << c << " round " << round;
      EXPECT_TRUE(are_shared(rows_of(expected), ablation.loses_rest));
      active = expected;
    }
  }
  EXPECT_GT(num_ablated, 100);
  EXPECT_GT(num_too_full, 50);
  EXPECT_GT(num_back, 20);
  EXPECT_GT(num_lowered, 20);
}

TEST(SparseAblation, LowThreshold) {
  // 8 weights of 4 columns need 2 rows, but all that is salient lies in the first.
  PackedMask active = mask_with(4, 4, {{0, 1}, {0, 1}, {0, 1}, {0, 1}});
  std::vector<float> weights(16, 0), gradients(16, 0);
  for (const size_t place : {0u, 1u, 4u, 5u, 8u, 9u, 12u, 13u}) weights[place] = place < 2 ? 2 : 1;
  gradients[2] = 2;
  gradients[3] = 1;
  Ablation ablation;
  ablation.gamma = 2;
  Update update = updated(ablation, active, weights, gradients, 0.75);
  EXPECT_EQ(update.rows.salient, (Counts{4, 0, 0, 0}));
  EXPECT_EQ(update.rows.threshold, 0);
  EXPECT_EQ(update.rows.counts, Counts(4, 2));
  // Three weights cannot be in four rows: the first ones stay.
  active = mask_with(4, 2, {{0}, {0}, {1}});
  weights.assign(8, 0);
  gradients.assign(8, 0);
  weights[0] = 2;
  weights[2] = 1;
  weights[5] = 1;
  update = updated(ablation, active, weights, gradients, 0.7);
  EXPECT_EQ(update.rows.salient, (Counts{1, 0, 0, 0}));
  EXPECT_EQ(update.rows.counts, (Counts{1, 1, 1, 0}));
  EXPECT_EQ(share_among_rows({true, false, true}, 5, false), (Counts{3, 0, 2}));
  EXPECT_FALSE(are_shared({2, 3}, false));
  EXPECT_FALSE(are_shared({3, 2}, true));
  EXPECT_FALSE(are_shared({0, 0}, false));
}

TEST(SparseAblation, FanIn) {
  for (const int64_t divisor : {2, 4, 5, 10, 20, 100}) {
    for (const auto& [out, in] : {std::pair<int64_t, int64_t>{1000, 1000}, {37, 300}}) {
      SparsifierConfig config = presets::srigl(Density::ratio(1, divisor), 1000);
      const Sparsifier sparsifier({unit_of(at::ones({out, in}), 0)}, config);
      EXPECT_EQ(rows_of(sparsifier.mask({0})), Counts(static_cast<size_t>(out), in / divisor));
      EXPECT_EQ(sparsifier.stats({0}).active_rows, out);
    }
  }
  for (const auto& [density, fan_in] : {std::pair<double, int64_t>{0.1, 100}, {0.2, 200}}) {
    const Sparsifier sparsifier({unit_of(at::ones({1000, 1000}), 0)},
                                presets::srigl(density, 1000));
    EXPECT_EQ(rows_of(sparsifier.mask({0})), Counts(1000, fan_in));
  }
}

/// tanh(x W0^T) W1^T, updated every 3 steps.
SparsifierConfig ablating(double gamma, UpdateOrder order = UpdateOrder::kAfterStep) {
  SparsifierConfig config = presets::srigl(0.4, 200, gamma, 3);
  config.schedule.begin = 2;
  config.schedule.anneal = Anneal::kConstant;
  config.order = order;
  config.ablation.kept = {"layer1"};
  return config;
}
TEST(SparseAblation, Training) {
  for (const bool loses_rest : {false, true}) {
    for (const UpdateOrder order : {UpdateOrder::kAfterStep, UpdateOrder::kBeforeStep}) {
      TwoWeights model;
      SparsifierConfig config = ablating(3, order);
      config.ablation.loses_rest = loses_rest;
      Sparsifier sparsifier(model.units(), config);
      sparsifier.reset_weights(1);
      torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(0.01));
      sparsifier.attach(optimizer);
      const Counts first = rows_of(sparsifier.mask({0})), last = rows_of(sparsifier.mask({1}));
      int64_t nnz = sparsifier.stats({0}).nnz, least_rows = 11;
      for (int64_t step = 0; step < 100; ++step) {
        train_step(model, sparsifier, optimizer, step);
        const Counts counts = rows_of(sparsifier.mask({0}));
        const int64_t now = sparsifier.stats({0}).nnz;
        ASSERT_TRUE(are_shared(counts, loses_rest));
        if (loses_rest) {
          EXPECT_LE(now, nnz);
          EXPECT_LT(nnz - now, 11);
          nnz = now;
        }
        ASSERT_EQ(now, nnz);
        ASSERT_EQ(rows_of(sparsifier.mask({1})), last);
        for (int64_t row = 0; row < 11; ++row) {
          if (counts[static_cast<size_t>(row)] > 0) continue;
          ASSERT_EQ(model.w0.detach()[row].ne(0).sum().item<int64_t>(), 0);
        }
        least_rows = std::min(least_rows, sparsifier.stats({0}).active_rows);
      }
      EXPECT_LT(least_rows, 8);
      EXPECT_EQ(first, Counts(11, first[0]));
      // Rows without weights stay 0.
      sparsifier.reset_weights(2);
      EXPECT_FALSE(model.w0.isnan().any().item<bool>());
      const Counts counts = rows_of(sparsifier.mask({0}));
      for (int64_t row = 0; row < 11; ++row) {
        EXPECT_EQ(model.w0.detach()[row].ne(0).sum().item<int64_t>(),
                  counts[static_cast<size_t>(row)]);
      }
    }
  }
}

TEST(SparseAblation, LosesRest) {
  at::Tensor weight = normal({11, 7}, 1);
  SparsifierConfig config = ablating(2, UpdateOrder::kBeforeStep);
  config.ablation.loses_rest = true;
  config.ablation.kept.clear();
  Sparsifier sparsifier({unit_of(weight, 0)}, config);
  const int64_t first = sparsifier.nnz();
  for (int64_t step = 0; step < 60; ++step) {
    sparsifier.begin_step(step);
    const PackedMask active = sparsifier.mask({0});
    const at::Tensor slope = normal({11, 7}, 50 + static_cast<uint64_t>(step));
    weight.mutable_grad() = slope.clone();
    weight.copy_(normal({11, 7}, 150 + static_cast<uint64_t>(step)));  // no equal scores
    const auto magnitudes = [](const at::Tensor& values) {
      const at::Tensor sizes = values.abs().to(at::kFloat).contiguous();
      const float* const data = sizes.const_data_ptr<float>();
      return std::vector<float>(data, data + sizes.numel());
    };
    const std::vector<float> sizes = magnitudes(weight), gradients = magnitudes(slope);
    const bool is_due = !sparsifier.end_backward(step).units.empty();
    sparsifier.end_step(step);
    if (!is_due) continue;
    const Update expected =
        updated(config.ablation, active, sizes, gradients, config.schedule.alpha);
    ASSERT_EQ(sparsifier.mask({0}), expected.change.mask) << step;
  }
  EXPECT_LT(sparsifier.nnz(), first);
}

std::shared_ptr<GroupedMLP> two_experts(bool has_bias) {
  auto experts = std::make_shared<GroupedMLP>(GroupedMLPOptions(6, 9).bias(has_bias).seed(2),
                                              ExpertPlacement::contiguous(2, 1), 0);
  experts->to(at::kDouble);
  return experts;
}
void set_gradients(GroupedMLP& experts, int64_t step) {
  experts.up_proj.mutable_grad() =
      normal(experts.up_proj.sizes(), 300 + static_cast<uint64_t>(step));
  experts.down_proj.mutable_grad() =
      normal(experts.down_proj.sizes(), 600 + static_cast<uint64_t>(step));
}
UpdateReport gradient_step(GroupedMLP& experts, Sparsifier& sparsifier, int64_t step) {
  sparsifier.begin_step(step);
  set_gradients(experts, step);
  UpdateReport report = sparsifier.end_backward(step);
  if (const UpdateReport late = sparsifier.end_step(step); !late.units.empty()) report = late;
  return report;
}
/// Active weights of w2 that read a hidden unit whose row of w1 or w3 is empty.
int64_t num_wasted(const Sparsifier& sparsifier, int64_t expert) {
  const PackedMask& w2 = sparsifier.mask({0, expert, Matrix::kW2});
  const Counts w1 = rows_of(sparsifier.mask({0, expert, Matrix::kW1}));
  const Counts w3 = rows_of(sparsifier.mask({0, expert, Matrix::kW3}));
  int64_t count = 0;
  for (int64_t place = 0; place < w2.num_places(); ++place) {
    const auto unit = static_cast<size_t>(place % w2.cols());
    count += w2.test(place) && (w1[unit] == 0 || w3[unit] == 0) ? 1 : 0;
  }
  return count;
}

TEST(SparseAblation, FreesColumns) {
  for (const FreeColumns free_columns : {FreeColumns::kAtEnd, FreeColumns::kNow}) {
    for (const bool has_bias : {false, true}) {
      SparsifierConfig config = ablating(0.95);
      config.budget.distribution = Distribution::kUniform;
      config.ablation.kept = {};
      config.ablation.free_columns = free_columns;
      config.schedule.end = 20;
      config.min_rows = 0;
      config.grad_accum = 2;
      const auto experts = two_experts(has_bias);
      Sparsifier sparsifier(experts->sparse_units(0), config);
      const Counts fan_in = rows_of(sparsifier.mask({0, 1, Matrix::kW2}));
      int64_t num_before = 0;
      for (int64_t step = 0; step < 26; ++step) {
        const PackedMask before = sparsifier.mask({0, 1, Matrix::kW2});
        const UpdateReport report = gradient_step(*experts, sparsifier, step);
        const bool is_end = step == 20 && free_columns == FreeColumns::kAtEnd && !has_bias;
        const bool is_update = step < 20 && step % 3 == 2;
        EXPECT_EQ(report.units.size(), is_update ? 6u : is_end ? 2u : 0u) << step;
        for (const int64_t expert : {0, 1}) {
          const int64_t wasted = num_wasted(sparsifier, expert);
          ASSERT_EQ(rows_of(sparsifier.mask({0, expert, Matrix::kW2})), fan_in);
          if (has_bias || (step < 20 && free_columns == FreeColumns::kAtEnd)) {
            num_before += wasted;
          } else {
            ASSERT_EQ(wasted, 0) << step;
          }
        }
        if (is_end) {  // nothing but what is wasted goes
          const PackedMask& after = sparsifier.mask({0, 1, Matrix::kW2});
          const PackedMask gone = without(before, after);
          EXPECT_GT(gone.count(), 0);
          EXPECT_EQ(gone.count(), without(after, before).count());
          const Counts w1 = rows_of(sparsifier.mask({0, 1, Matrix::kW1}));
          const Counts w3 = rows_of(sparsifier.mask({0, 1, Matrix::kW3}));
          for (int64_t place = 0; place < gone.num_places(); ++place) {
            const auto unit = static_cast<size_t>(place % gone.cols());
            EXPECT_TRUE(!gone.test(place) || w1[unit] == 0 || w3[unit] == 0);
          }
        }
      }
      EXPECT_EQ(num_before > 0, has_bias || free_columns == FreeColumns::kAtEnd);
    }
  }
}

TEST(SparseAblation, NoGradientAtTheEnd) {
  SparsifierConfig config = ablating(0.95);
  config.ablation.kept = {};
  config.schedule.end = 20;
  config.min_rows = 0;
  const auto experts = two_experts(false);
  Sparsifier sparsifier(experts->sparse_units(0), config);
  for (int64_t step = 0; step < 20; ++step) gradient_step(*experts, sparsifier, step);
  const PackedMask before = sparsifier.mask({0, 0, Matrix::kW2});
  sparsifier.begin_step(20);
  experts->zero_grad();
  sparsifier.end_backward(20);
  const UpdateReport report = sparsifier.end_step(20);
  ASSERT_EQ(report.units.size(), 2u);
  EXPECT_EQ(report.units[0].skipped, SkipReason::kNoGradient);
  EXPECT_EQ(sparsifier.mask({0, 0, Matrix::kW2}), before);
}

TEST(SparseAblation, Resume) {
  for (const bool loses_rest : {false, true}) {
    SparsifierConfig config = ablating(3);
    config.grad_accum = 2;
    config.ablation.loses_rest = loses_rest;
    TwoWeights model, other;
    Sparsifier sparsifier(model.units(), config), resumed(other.units(), config);
    torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(0.01));
    torch::optim::SGD other_optimizer(other.parameters(), torch::optim::SGDOptions(0.01));
    sparsifier.attach(optimizer);
    resumed.attach(other_optimizer);
    for (int64_t step = 0; step < 5; ++step) {
      train_step(other, resumed, other_optimizer, step + 1);
    }
    for (int64_t step = 0; step < 60; ++step) {
      if (step == 29) {  // inside a window: updates at 2, 5, ..., 29
        for (size_t u = 0; u < 2; ++u) {
          other.parameters()[u].detach().copy_(model.parameters()[u].detach());
        }
        EXPECT_LT(sparsifier.stats({0}).active_rows, 11);
        resumed.load(sparsifier.state_dict());
      }
      train_step(model, sparsifier, optimizer, step);
      if (step >= 29) train_step(other, resumed, other_optimizer, step);
    }
    for (size_t u = 0; u < 2; ++u) {
      EXPECT_TRUE(at::equal(model.parameters()[u], other.parameters()[u]));
    }
    EXPECT_EQ(sparsifier.mask({0}), resumed.mask({0}));

    const SparsifierState good = sparsifier.state_dict();
    const auto text = [&](int64_t unit, bool is_moved) {
      SparsifierState bad = good;
      PackedMask& mask = bad.units[static_cast<size_t>(unit)].mask;
      int64_t from = mask.num_places() - 1, to = 0;
      while (!mask.test(from)) --from;
      while (mask.test(to)) ++to;
      mask.set(from, false);
      if (is_moved) mask.set(to, true);  // from the last row to the first
      return config_error([&] { sparsifier.load(bad); });
    };
    for (const int64_t unit : {0, 1}) {
      for (const bool is_moved : {false, true}) {
        // Where rests are lost, a row of one weight less is one more that was ablated.
        if (unit == 0 && loses_rest && !is_moved) continue;
        EXPECT_NE(text(unit, is_moved).find("do not keep its budget"), std::string::npos)
            << unit << is_moved;
      }
    }
  }
}

TEST(SparseAblation, Exports) {
  const int64_t out = 9, in = 20;
  const AtomLayout layout = make_layout(Structure::constant_fan_in(), out, in, "weight");
  for (const int64_t count : {21, 24, 7, 13}) {  // of 6 rows: 4 and 3, 4, 2 and 1, 3 and 2
    std::vector<bool> is_left(out, true);
    for (const size_t row : {0u, 4u, 8u}) is_left[row] = false;
    const Counts counts = share_among_rows(is_left, count, false);
    PackedMask mask(out, in);
    for (int64_t row = 0; row < out; ++row) {
      for (int64_t k = 0; k < counts[static_cast<size_t>(row)]; ++k) {
        mask.set(row * in + (row * 7 + k * 3) % in, true);
      }
    }
    ASSERT_EQ(mask.count(), count);
    const at::Tensor is_active = position_mask(layout, mask);
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const double limit = type == at::kDouble ? 1e-12 : type == at::kFloat ? 1e-5 : 0x1p-6;
      const at::Tensor weight = normal({out, in}, 1, type);
      for (const SparseFormat format :
           {SparseFormat::kCsr, SparseFormat::kShortCsr, SparseFormat::kCondensed}) {
        SparseExport sparse = export_as(weight, layout, mask, format);
        EXPECT_TRUE(at::equal(dense_weight(sparse), weight * is_active));
        sparse.values.requires_grad_(true);
        const at::Tensor x = normal({5, in}, 2, type).requires_grad_(true);
        const at::Tensor delta = normal({5, out}, 4, type);
        const at::Tensor y = sparse_matmul(x, sparse);
        y.backward(delta);
        const at::Tensor dense = weight.to(at::kDouble) * is_active;
        const auto expect_near = [&](const at::Tensor& a, const at::Tensor& b) {
          EXPECT_LE((a.to(at::kDouble) - b).abs().max().item<double>(),
                    limit * b.abs().max().item<double>());
        };
        expect_near(y, x.detach().to(at::kDouble).mm(dense.t()));
        expect_near(x.grad(), delta.to(at::kDouble).mm(dense));
        SparseExport gradient = sparse;
        gradient.values = sparse.values.grad();
        const at::Tensor expected =
            delta.to(at::kDouble).t().mm(x.detach().to(at::kDouble)) * is_active;
        expect_near(dense_weight(gradient), expected);
        if (format != SparseFormat::kCondensed) continue;
        EXPECT_EQ(sparse.rows.numel(), 6);
        EXPECT_EQ(sparse.full_rows, count % 6 == 0 ? 6 : count % 6);
        for (int64_t row = sparse.full_rows; row < 6; ++row) {
          EXPECT_EQ(sparse.values[row][-1].item<double>(), 0);
          EXPECT_EQ(sparse.values.grad()[row][-1].item<double>(), 0);
        }
      }
    }
  }
}

TEST(SparseAblation, Ranks) {
  at::set_num_threads(1);
  for (const FreeColumns free_columns : {FreeColumns::kAtEnd, FreeColumns::kNow}) {
    SparsifierConfig config = config_of(GrowCriterion::kGrad);
    config.structure = Structure::constant_fan_in();
    config.ablation.gamma = 0.95;
    config.ablation.free_columns = free_columns;
    config.ablation.kept = {"layer 1*"};
    config.schedule.end = 11;
    config.grad_accum = 2;
    const Trained one = train(1, 1, config);
    int64_t num_empty = 0;
    for (const auto& [key, mask] : one.masks) {
      num_empty += mask.rows() - active_rows(mask).count();
    }
    EXPECT_GT(num_empty, 5);
    for (const auto& [num_ranks, ep_size] : layouts()) {
      SCOPED_TRACE("P=" + std::to_string(num_ranks) + " ep=" + std::to_string(ep_size));
      const Trained many = train(num_ranks, ep_size, config);
      expect_close(many, one, 1e-11);
      EXPECT_EQ(many.totals.nnz, one.totals.nnz);
      EXPECT_EQ(many.totals.num_updates, one.totals.num_updates);
    }
  }
}

TEST(SparseAblation, Preset) {
  SparsifierConfig config = presets::srigl(0.3, 100, 0.3, 5);
  config.min_rows = 0;
  const auto experts = two_experts(false);
  Sparsifier sparsifier(experts->sparse_units(0), config);
  const int64_t nnz = sparsifier.nnz();
  for (int64_t step = 0; step < 15; ++step) gradient_step(*experts, sparsifier, step);
  EXPECT_EQ(sparsifier.nnz(), nnz);
  EXPECT_EQ(sparsifier.totals().num_updates, 18);
  std::ostringstream line;
  line << sparsifier.config();
  EXPECT_NE(line.str().find(" gamma=0.3 free_columns=at_end loses_rest=0"), std::string::npos);
}

TEST(SparseAblation, Refused) {
  TwoWeights model;
  const auto text = [&](const std::function<void(SparsifierConfig&)>& spoil) {
    SparsifierConfig bad = ablating(0.3);
    spoil(bad);
    return config_error([&] { Sparsifier(model.units(), bad); });
  };
  EXPECT_EQ(text([](SparsifierConfig& c) { c.ablation.gamma = -1; }),
            "[ablation] gamma=-1 is not a finite number of 0 or more");
  EXPECT_EQ(
      text([](SparsifierConfig& c) { c.ablation.gamma = 2.5; }),
      "[ablation] gamma=2.5 is 1 or more, a number of weights, but not an integer below 2^31");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.structure = Structure::unstructured(); }),
            "[sparsifier] ablation=on needs Structure::constant_fan_in()");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.grow = GrowCriterion::kRandom; }),
            "[sparsifier] ablation=on needs grow = grad, which looks at gradients");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.rule.drop = DropCriterion::kSetSigned; }),
            "[sparsifier] ablation=on ranks weights by their size; choose drop = magnitude");
  EXPECT_EQ(text([](SparsifierConfig& c) {
              c.ablation.kept = {"layer1", "head*"};
            }),
            "[sparsifier] ablation.kept=head* fits no unit; correct it");
  EXPECT_EQ(text([](SparsifierConfig& c) { c.ablation.gamma = 0; }),
            "[sparsifier] ablation.kept=layer1 keeps rows, but gamma=0 ablates none");
  // Another rule is another configuration.
  const Sparsifier one(model.units(), ablating(0.3)), other(model.units(), ablating(0.95));
  EXPECT_NE(one.state_dict().config_hash, other.state_dict().config_hash);
  SparsifierConfig now = ablating(0.3);
  now.ablation.free_columns = FreeColumns::kNow;
  EXPECT_NE(one.state_dict().config_hash, Sparsifier(model.units(), now).state_dict().config_hash);
}

}  // namespace
}  // namespace perseid::testing
