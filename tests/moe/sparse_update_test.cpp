// update_mask.
//   KeepsItsBudget   1000 random updates of every structure, all criteria: each cell's count is the
//                    first one; the sets fit together; N:M and the others change their mask
//   LargeUnit        the same on 2^24 + 7 atoms, 3 updates
//   BruteForce       dropped are the smallest, grown the largest eligible, scores with duplicates
//   Nothing          density 1, fraction 0; and more to drop than can grow
//   Reselected       without exclusion a dropped atom that comes back counts as untouched
//   SetSigned        floor(fraction * count) of each sign; all of one sign, all zero
//   ZeroGradient     no update; few non-zero scores: only these grow, and the best dropped stay
//   Mixed, Unfired   shares by chance; never active ones first
//   Target           a ramp reaches its number in each cell
//   NonFinite        NaN and infinity are counted and change nothing
//   EqualScores      exactly as many, spread over the unit, another key gives another set
#include "moe/sparse_update.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/config_error.h"

namespace perseid {
namespace {

using kernels::random_key;
using kernels::RandomKey;
using testing::config_error;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> normals(int64_t count, uint64_t seed) {
  std::vector<float> values(static_cast<size_t>(count));
  kernels::fill_normal(values.data(), count, kernels::DType::kFloat32, random_key(seed));
  return values;
}
std::vector<float> magnitudes(std::vector<float> values) {
  for (float& value : values) value = std::abs(value);
  return values;
}
/// Few different values.
std::vector<float> coarse(std::vector<float> values) {
  for (float& value : values) value = std::round(value * 2);
  return values;
}

UpdateInput input_of(const PackedMask& active, const std::vector<float>& drop,
                     const std::vector<float>& grow, double fraction, uint64_t seed = 1) {
  UpdateInput input;
  input.active = &active;
  input.drop_scores = drop.data();
  input.grow_scores = grow.data();
  input.fraction = fraction;
  input.drop_key = random_key(seed).with(1);
  input.grow_key = random_key(seed).with(2);
  input.random_key = random_key(seed).with(3);
  return input;
}

std::vector<int64_t> counts_of(const AtomLayout& layout, const PackedMask& mask) {
  std::vector<int64_t> counts(static_cast<size_t>(layout.cells.num_cells));
  kernels::count_atoms(layout.cells, mask.data(), counts.data());
  return counts;
}

void expect_consistent(const AtomLayout& layout, const PackedMask& before,
                       const MaskUpdate& update) {
  ASSERT_EQ((update.dropped | before), before);
  ASSERT_EQ((update.grown & before).count(), 0);
  ASSERT_EQ(without(before, update.dropped) | update.grown, update.mask);
  ASSERT_EQ(update.dropped.count(), update.num_dropped);
  ASSERT_EQ(update.grown.count(), update.num_grown);
  ASSERT_EQ(counts_of(layout, update.mask), counts_of(layout, before));
}

TEST(SparseUpdate, KeepsItsBudget) {
  struct Case {
    Structure structure;
    int64_t out, in, per_cell;
  };
  for (const Case& c : std::vector<Case>{{Structure::unstructured(), 31, 17, 53},
                                         {Structure::unstructured(), 101, 67, 6000},
                                         {Structure::constant_fan_in(), 31, 100, 10},
                                         {Structure::n_of_m(2, 4), 12, 20, 2},
                                         {Structure::n_of_m(1, 16), 3, 64, 1},
                                         {Structure::blocks(4, 8), 12, 40, 4},
                                         {Structure::block_ell(4, 2), 12, 40, 7}}) {
    const AtomLayout layout = make_layout(c.structure, c.out, c.in, "w");
    PackedMask mask = random_mask(layout, c.per_cell * layout.granule(), random_key(7));
    const PackedMask first = mask;
    PackedMask ever = mask;
    int64_t num_changes = 0;
    for (uint64_t step = 0; step < 1000; ++step) {
      UpdateRule rule;
      rule.drop = layout.is_elementwise() && step % 2 == 1 ? DropCriterion::kSetSigned
                                                           : DropCriterion::kMagnitude;
      rule.grow = static_cast<GrowCriterion>(step % 3);
      rule.random_share = step % 5 == 0 ? 0.3 : 0;
      rule.exclude_just_dropped = step % 7 != 0;
      auto drop = normals(layout.num_atoms(), 2 * step);
      if (rule.drop == DropCriterion::kMagnitude) drop = magnitudes(drop);
      const auto grow = coarse(magnitudes(normals(layout.num_atoms(), 2 * step + 1)));
      UpdateInput input = input_of(mask, drop, grow, static_cast<double>(step % 11) / 10, step);
      input.ever_active = &ever;
      const MaskUpdate update = update_mask(layout, rule, input);
      expect_consistent(layout, mask, update);
      num_changes += update.mask == mask ? 0 : 1;
      mask = update.mask;
      ever = ever | mask;
    }
    EXPECT_EQ(counts_of(layout, mask), counts_of(layout, first));
    EXPECT_GT(num_changes, 600);
  }
}

TEST(SparseUpdate, LargeUnit) {
  const int64_t count = (int64_t{1} << 24) + 7;
  const AtomLayout layout = make_layout(Structure::unstructured(), 1, count, "w");
  PackedMask mask = random_mask(layout, 1'677'723, random_key(1));
  ASSERT_EQ(mask.count(), 1'677'723);
  const auto drop = magnitudes(normals(count, 1));
  for (uint64_t step = 0; step < 3; ++step) {
    UpdateRule rule;
    rule.grow = step == 1 ? GrowCriterion::kGrad : GrowCriterion::kRandom;
    const MaskUpdate update = update_mask(layout, rule, input_of(mask, drop, drop, 0.3, step));
    expect_consistent(layout, mask, update);
    ASSERT_EQ(update.num_dropped, 503'316);  // floor(0.3 * 1677723)
    mask = update.mask;
  }
  EXPECT_EQ(mask.count(), 1'677'723);
}

TEST(SparseUpdate, BruteForce) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const AtomLayout layout = make_layout(Structure::unstructured(), 9, 11, "w");
    const PackedMask mask = random_mask(layout, 40, random_key(seed));
    const auto drop = coarse(magnitudes(normals(99, 2 * seed)));
    auto grow = coarse(magnitudes(normals(99, 2 * seed + 1)));
    for (float& score : grow) score += 1;  // none is 0
    UpdateRule rule;
    rule.grow = GrowCriterion::kGrad;
    const MaskUpdate update = update_mask(layout, rule, input_of(mask, drop, grow, 0.3, seed));
    expect_consistent(layout, mask, update);
    EXPECT_EQ(update.num_dropped, 12);
    EXPECT_EQ(update.num_grown, 12);
    float highest_dropped = 0, lowest_kept = 1e9f, lowest_grown = 1e9f, highest_left = 0;
    for (int64_t a = 0; a < 99; ++a) {
      const float d = drop[static_cast<size_t>(a)], g = grow[static_cast<size_t>(a)];
      if (update.dropped.test(a)) highest_dropped = std::max(highest_dropped, d);
      if (mask.test(a) && update.mask.test(a)) lowest_kept = std::min(lowest_kept, d);
      if (update.grown.test(a)) lowest_grown = std::min(lowest_grown, g);
      if (!mask.test(a) && !update.mask.test(a)) highest_left = std::max(highest_left, g);
    }
    EXPECT_LE(highest_dropped, lowest_kept);
    EXPECT_GE(lowest_grown, highest_left);
  }
}

TEST(SparseUpdate, RowsGrowWhatTheyLost) {
  // Drops are chosen in the unit, growth in the row: all drops fall in row 0 here.
  const AtomLayout layout = make_layout(Structure::constant_fan_in(), 4, 20, "w");
  const PackedMask mask = random_mask(layout, 24, random_key(3));
  std::vector<float> drop(80, 5), grow(80, 1);
  std::fill_n(drop.begin(), 20, 1.0f);
  UpdateRule rule;
  rule.grow = GrowCriterion::kGrad;
  const MaskUpdate update = update_mask(layout, rule, input_of(mask, drop, grow, 0.25));
  expect_consistent(layout, mask, update);
  EXPECT_EQ(counts_of(layout, update.dropped), (std::vector<int64_t>{6, 0, 0, 0}));
  EXPECT_EQ(counts_of(layout, update.grown), (std::vector<int64_t>{6, 0, 0, 0}));
}

TEST(SparseUpdate, Nothing) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 10, 10, "w");
  const auto scores = magnitudes(normals(100, 1));
  for (const GrowCriterion grow : {GrowCriterion::kRandom, GrowCriterion::kGrad}) {
    UpdateRule rule;
    rule.grow = grow;
    const PackedMask all = PackedMask::full(10, 10);
    EXPECT_EQ(update_mask(layout, rule, input_of(all, scores, scores, 0.9)).mask, all);
    const PackedMask some = random_mask(layout, 30, random_key(2));
    EXPECT_EQ(update_mask(layout, rule, input_of(some, scores, scores, 0)).mask, some);
    // 81 are to go, 10 can come: the best 71 of them stay.
    const PackedMask most = random_mask(layout, 90, random_key(2));
    const MaskUpdate update = update_mask(layout, rule, input_of(most, scores, scores, 0.9));
    expect_consistent(layout, most, update);
    EXPECT_EQ(update.num_grown, 10);
    float highest_dropped = 0, lowest_kept = 1e9f;
    for (int64_t a = 0; a < 100; ++a) {
      const float score = scores[static_cast<size_t>(a)];
      if (update.dropped.test(a)) highest_dropped = std::max(highest_dropped, score);
      if (most.test(a) && update.mask.test(a)) lowest_kept = std::min(lowest_kept, score);
    }
    EXPECT_LE(highest_dropped, lowest_kept);
  }
  const PackedMask none(10, 10);
  EXPECT_EQ(update_mask(layout, {}, input_of(none, scores, scores, 0.5)).mask, none);
}

TEST(SparseUpdate, Reselected) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 1, 6, "w");
  PackedMask mask(1, 6);
  for (const int64_t a : {0, 1, 2, 3}) mask.set(a, true);
  const std::vector<float> drop = {1, 2, 3, 4, 0, 0}, grow = {9, 1, 1, 1, 5, 3};
  UpdateRule rule;
  rule.grow = GrowCriterion::kGrad;
  rule.exclude_just_dropped = false;
  const MaskUpdate again = update_mask(layout, rule, input_of(mask, drop, grow, 0.5));
  EXPECT_EQ(again.dropped.words()[0], uint64_t{0b000010});  // 0 was dropped, too, and came back
  EXPECT_EQ(again.grown.words()[0], uint64_t{0b010000});
  rule.exclude_just_dropped = true;
  const MaskUpdate never = update_mask(layout, rule, input_of(mask, drop, grow, 0.5));
  EXPECT_EQ(never.dropped.words()[0], uint64_t{0b000011});
  EXPECT_EQ(never.grown.words()[0], uint64_t{0b110000});
}

TEST(SparseUpdate, SetSigned) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 10, 20, "w");
  const PackedMask mask = random_mask(layout, 101, random_key(5));
  const auto weights = normals(200, 6);
  UpdateRule rule;
  rule.drop = DropCriterion::kSetSigned;
  const auto dropped_of = [&](const std::vector<float>& w) {
    const MaskUpdate update = update_mask(layout, rule, input_of(mask, w, w, 0.3));
    expect_consistent(layout, mask, update);
    return update.dropped;
  };
  int64_t positives = 0, negatives = 0, dropped_positives = 0, dropped_negatives = 0;
  float highest[2] = {0, 0}, lowest[2] = {1e9f, 1e9f};
  const PackedMask dropped = dropped_of(weights);
  for (int64_t a = 0; a < 200; ++a) {
    if (!mask.test(a)) continue;
    const float w = weights[static_cast<size_t>(a)];
    (w < 0 ? negatives : positives) += 1;
    float& bound = dropped.test(a) ? highest[w < 0] : lowest[w < 0];
    bound = dropped.test(a) ? std::max(bound, std::abs(w)) : std::min(bound, std::abs(w));
    if (dropped.test(a)) (w < 0 ? dropped_negatives : dropped_positives) += 1;
  }
  EXPECT_EQ(dropped_positives, positives * 3 / 10);
  EXPECT_EQ(dropped_negatives, negatives * 3 / 10);
  EXPECT_LT(highest[0], lowest[0]);
  EXPECT_LT(highest[1], lowest[1]);

  auto all_positive = magnitudes(weights), all_negative = all_positive;
  for (float& w : all_negative) w = -w;
  EXPECT_EQ(dropped_of(all_positive).count(), 30);
  EXPECT_EQ(dropped_of(all_negative), dropped_of(all_positive));
  std::vector<float> zeros(200, 0.0f);
  EXPECT_EQ(dropped_of(zeros).count(), 30);
  for (size_t a = 0; a < zeros.size(); a += 2) zeros[a] = -0.0f;
  EXPECT_EQ(dropped_of(zeros).count(), 30);

  // 7 below 0, 7 above and 10 zeros, which count as positive: 2 and 5 go.
  const AtomLayout row = make_layout(Structure::unstructured(), 1, 40, "w");
  PackedMask first(1, 40);
  std::vector<float> few(40, 0.0f);
  for (int64_t a = 0; a < 24; ++a) {
    first.set(a, true);
    if (a < 14) few[static_cast<size_t>(a)] = a < 7 ? -1.0f : 1.0f;
  }
  const MaskUpdate zeros_first = update_mask(row, rule, input_of(first, few, few, 0.3));
  const uint64_t gone = zeros_first.dropped.words()[0];
  EXPECT_EQ(std::popcount(gone & 0x7Fu), 2);
  EXPECT_EQ(std::popcount(gone & 0x3F80u), 0);
  EXPECT_EQ(std::popcount(gone >> 14), 5);

  const AtomLayout blocks = make_layout(Structure::blocks(2, 2), 10, 20, "w");
  const PackedMask of_blocks = random_mask(blocks, 80, random_key(5));
  EXPECT_EQ(
      config_error([&] { update_mask(blocks, rule, input_of(of_blocks, weights, weights, 0.3)); }),
      "[update_mask] drop=set_signed needs atoms of one position, which have a sign; choose "
      "magnitude");
}

TEST(SparseUpdate, ZeroGradient) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 10, 10, "w");
  const PackedMask mask = random_mask(layout, 40, random_key(5));
  const auto drop = magnitudes(normals(100, 6));
  std::vector<float> grow(100, 0.0f);
  UpdateRule rule;
  rule.grow = GrowCriterion::kGrad;
  rule.random_share = 0.5;
  const MaskUpdate none = update_mask(layout, rule, input_of(mask, drop, grow, 0.5));
  EXPECT_TRUE(none.has_no_gradient);
  EXPECT_EQ(none.mask, mask);
  EXPECT_EQ(none.num_dropped, 0);

  rule.random_share = 0;
  int64_t num_left = 3;
  for (int64_t a = 0; a < 100; ++a) {
    if (mask.test(a)) {
      grow[static_cast<size_t>(a)] = 7;  // not eligible
    } else if (num_left > 0) {
      grow[static_cast<size_t>(a)] = static_cast<float>(num_left--);
    }
  }
  const MaskUpdate few = update_mask(layout, rule, input_of(mask, drop, grow, 0.5));
  expect_consistent(layout, mask, few);
  EXPECT_FALSE(few.has_no_gradient);
  EXPECT_EQ(few.num_grown, 3);
  for (int64_t a = 0; a < 100; ++a) {
    if (few.grown.test(a)) {
      EXPECT_GT(grow[static_cast<size_t>(a)], 0);
    }
  }
  // The 3 that made room are the smallest of all.
  std::vector<float> smallest;
  for (int64_t a = 0; a < 100; ++a) {
    if (mask.test(a)) smallest.push_back(drop[static_cast<size_t>(a)]);
  }
  std::sort(smallest.begin(), smallest.end());
  for (int64_t a = 0; a < 100; ++a) {
    if (few.dropped.test(a)) {
      EXPECT_LE(drop[static_cast<size_t>(a)], smallest[2]);
    }
  }
}

TEST(SparseUpdate, Mixed) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 100, 100, "w");
  const PackedMask mask = random_mask(layout, 1000, random_key(5));
  const auto drop = magnitudes(normals(10000, 6)), grow = magnitudes(normals(10000, 7));
  UpdateRule rule;
  rule.grow = GrowCriterion::kGrad;
  rule.random_share = 0.25;
  const MaskUpdate mixed = update_mask(layout, rule, input_of(mask, drop, grow, 0.4));
  rule.random_share = 0;
  const MaskUpdate greedy = update_mask(layout, rule, input_of(mask, drop, grow, 0.4));
  EXPECT_EQ(mixed.num_grown, 400);
  EXPECT_EQ(mixed.dropped, greedy.dropped);
  // 300 by score, and of 100 by chance about 100 * 100 / 8700 fall on the other greedy ones.
  const int64_t both = (mixed.grown & greedy.grown).count();
  EXPECT_GE(both, 300);
  EXPECT_LE(both, 310);
}

TEST(SparseUpdate, Unfired) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 10, 10, "w");
  const PackedMask mask = random_mask(layout, 40, random_key(5));
  const auto drop = magnitudes(normals(100, 6));
  PackedMask ever = PackedMask::full(10, 10);
  int64_t num_new = 0;
  for (int64_t a = 0; a < 100 && num_new < 15; ++a) {
    if (mask.test(a)) continue;
    ever.set(a, false);
    ++num_new;
  }
  UpdateRule rule;
  rule.grow = GrowCriterion::kUnfired;
  for (const double fraction : {0.25, 0.5}) {
    UpdateInput input = input_of(mask, drop, {}, fraction);
    input.ever_active = &ever;
    const MaskUpdate update = update_mask(layout, rule, input);
    expect_consistent(layout, mask, update);
    EXPECT_EQ(without(update.grown, ever).count(), std::min<int64_t>(15, update.num_grown));
  }
}

TEST(SparseUpdate, Target) {
  for (const Structure& structure : {Structure::unstructured(), Structure::constant_fan_in()}) {
    const AtomLayout layout = make_layout(structure, 10, 20, "w");
    const auto drop = magnitudes(normals(200, 6)), grow = magnitudes(normals(200, 7));
    const PackedMask mask = random_mask(layout, 80, random_key(5));
    for (const int64_t target : {0, 10, 60, 80, 100, 200}) {
      for (const GrowCriterion criterion : {GrowCriterion::kRandom, GrowCriterion::kGrad}) {
        UpdateRule rule;
        rule.grow = criterion;
        UpdateInput input = input_of(mask, drop, grow, 0.2);
        input.target = target;
        const MaskUpdate update = update_mask(layout, rule, input);
        EXPECT_EQ(counts_of(layout, update.mask),
                  std::vector<int64_t>(static_cast<size_t>(layout.cells.num_cells),
                                       target / layout.cells.num_cells));
        EXPECT_EQ(without(mask, update.dropped) | update.grown, update.mask);
      }
    }
  }
  const AtomLayout layout = make_layout(Structure::constant_fan_in(), 10, 20, "w");
  const PackedMask mask = random_mask(layout, 80, random_key(5));
  const auto scores = magnitudes(normals(200, 6));
  UpdateInput input = input_of(mask, scores, scores, 0.2);
  input.target = 81;
  EXPECT_EQ(config_error([&] { update_mask(layout, {}, input); }),
            "[update_mask] target=81 is not a multiple of num_cells=10");
  EXPECT_EQ(config_error([&] { update_mask(layout, {}, input_of(mask, scores, scores, 1.5)); }),
            "[update_mask] fraction=1.5 is outside [0, 1]");
}

TEST(SparseUpdate, NonFinite) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 10, 10, "w");
  const PackedMask mask = random_mask(layout, 40, random_key(5));
  const auto drop = magnitudes(normals(100, 6)), grow = magnitudes(normals(100, 7));
  UpdateRule rule;
  rule.grow = GrowCriterion::kGrad;
  int64_t active = 0, inactive = 0;
  while (!mask.test(active)) ++active;
  while (mask.test(inactive)) ++inactive;
  for (const float bad : {kNan, -kNan, std::numeric_limits<float>::infinity()}) {
    auto bad_drop = drop, bad_grow = grow;
    bad_drop[static_cast<size_t>(active)] = bad;
    const MaskUpdate of_drop = update_mask(layout, rule, input_of(mask, bad_drop, grow, 0.3));
    EXPECT_EQ(of_drop.num_non_finite, 1);
    EXPECT_EQ(of_drop.mask, mask);
    bad_grow[static_cast<size_t>(inactive)] = bad;
    const MaskUpdate of_grow = update_mask(layout, rule, input_of(mask, drop, bad_grow, 0.3));
    EXPECT_EQ(of_grow.num_non_finite, 1);
    EXPECT_EQ(of_grow.mask, mask);
    EXPECT_EQ(of_grow.num_grown, 0);
    // What is not looked at does not count.
    auto elsewhere = drop;
    elsewhere[static_cast<size_t>(inactive)] = bad;
    EXPECT_EQ(update_mask(layout, rule, input_of(mask, elsewhere, grow, 0.3)).num_non_finite, 0);
  }
}

TEST(SparseUpdate, EqualScores) {
  const AtomLayout layout = make_layout(Structure::unstructured(), 64, 64, "w");
  const PackedMask mask = random_mask(layout, 2048, random_key(5));
  const std::vector<float> equal(4096, 0.5f);
  UpdateRule rule;
  rule.grow = GrowCriterion::kGrad;
  const MaskUpdate first = update_mask(layout, rule, input_of(mask, equal, equal, 0.5, 1));
  const MaskUpdate same = update_mask(layout, rule, input_of(mask, equal, equal, 0.5, 1));
  const MaskUpdate other = update_mask(layout, rule, input_of(mask, equal, equal, 0.5, 2));
  EXPECT_EQ(first.num_grown, 1024);
  EXPECT_EQ(first.mask, same.mask);
  EXPECT_NE(first.mask, other.mask);
  // Hypergeometric: about 512 +- 11 in each half.
  std::vector<int64_t> halves(2);
  for (const PackedMask& set : {first.grown, first.dropped}) {
    kernels::count_atoms({2, 2048}, set.data(), halves.data());
    EXPECT_NEAR(static_cast<double>(halves[0]), 512, 80);
  }
}

}  // namespace
}  // namespace perseid
