// Smaller dense experts of coupled neurons, float64. The outputs under a Sparsifier are compared in
// sparse_neuron_test.cpp.
//   Units    rows of W1 and W3 and columns of W2 in order, then 0; numbers of active units that
//            differ, none at all; F' rounded up, never above F
//   Refused  texts
#include "moe/compact_experts.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/config_error.h"
#include "tests/moe/sparse_fixture.h"

namespace perseid::testing {
namespace {

constexpr int64_t kWidth = 12, kModel = 5;

/// Active: `count` units, 2, 7, 0, 5, ...
PackedMask spread_units(int64_t count) {
  PackedMask mask(1, kWidth);
  for (int64_t j = 0; j < count; ++j) mask.set((j * 5 + 2) % kWidth, true);
  return mask;
}

TEST(CompactExperts, Units) {
  const std::vector<std::vector<int64_t>> units = {{0, 2, 5, 7, 10}, {2, 7}, {}};
  const std::vector<PackedMask> masks = {spread_units(5), spread_units(2), spread_units(0)};
  for (const bool gated : {true, false}) {
    const int64_t parts = gated ? 2 : 1;
    const at::Tensor up = normal({3, parts * kWidth, kModel}, 1);
    const at::Tensor down = normal({3, kModel, kWidth}, 2);
    for (const int64_t multiple : {1, 4, 16}) {
      const int64_t width = multiple == 1 ? 5 : multiple == 4 ? 8 : kWidth;  // 16 exceeds F
      const CompactExperts compact = compact_experts(up, down, gated, masks, multiple);
      at::Tensor up_expected = at::zeros({3, parts * width, kModel}, at::kDouble);
      at::Tensor down_expected = at::zeros({3, kModel, width}, at::kDouble);
      at::Tensor units_expected = at::full({3, width}, -1, at::kLong);
      for (int64_t slot = 0; slot < 3; ++slot) {
        for (int64_t i = 0; i < static_cast<int64_t>(units[slot].size()); ++i) {
          const int64_t j = units[slot][i];
          for (int64_t part = 0; part < parts; ++part) {
            up_expected[slot][part * width + i] = up[slot][part * kWidth + j];
          }
          down_expected[slot].select(1, i).copy_(down[slot].select(1, j));
          units_expected[slot][i] = j;
        }
      }
      EXPECT_TRUE(at::equal(compact.up_proj, up_expected)) << gated << ' ' << multiple;
      EXPECT_TRUE(at::equal(compact.down_proj, down_expected)) << gated << ' ' << multiple;
      EXPECT_TRUE(at::equal(compact.units, units_expected)) << gated << ' ' << multiple;
    }
  }
}

TEST(CompactExperts, Refused) {
  const at::Tensor up = normal({2, kWidth, kModel}, 1), down = normal({2, kModel, kWidth}, 2);
  const std::vector<PackedMask> masks = {spread_units(5), spread_units(2)};
  EXPECT_EQ(config_error([&] { compact_experts(up, down, true, masks); }),
            "[compact_experts] up_proj=[2, 12, 5] does not go with down_proj=[2, 5, 12]; they are "
            "[L, 2F, D] and [L, d_out, F]");
  EXPECT_EQ(config_error([&] { compact_experts(up, down, false, {masks[0]}); }),
            "[compact_experts] active=1 masks are not one for each of 2 experts");
  EXPECT_EQ(config_error([&] {
              compact_experts(up, down, false, {masks[0], PackedMask(1, 3)});
            }),
            "[compact_experts] active=1x3 is not one row of F=12");
  EXPECT_EQ(config_error([&] { compact_experts(up, down, false, masks, 0); }),
            "[compact_experts] multiple=0 is below 1");
}

}  // namespace
}  // namespace perseid::testing
