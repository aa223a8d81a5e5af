// Masks, atoms and cells.
//   Mask               bits, count, set operations, fingerprints of near masks
//   CellsKeepTheirNumber  first masks of every structure: each cell holds nnz / granule
//   AtomScores         |w| of single positions; of blocks the root mean square, ragged ones too
//   PositionMask       an atom covers its block; padding is not counted
//   Refused            sizes that the pattern does not divide
#include "moe/sparse_structure.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/config_error.h"

namespace perseid {
namespace {

using testing::config_error;

TEST(SparseMask, Mask) {
  PackedMask mask(3, 23);
  for (const int64_t place : {0, 1, 63, 64, 68}) mask.set(place, true);
  EXPECT_EQ(mask.count(), 5);
  EXPECT_TRUE(mask.test(2, 22));
  EXPECT_FALSE(mask.test(2, 21));
  EXPECT_EQ(PackedMask::full(3, 23).count(), 69);
  EXPECT_EQ(PackedMask::full(8, 8).count(), 64);
  EXPECT_EQ(PackedMask(0, 5).count(), 0);
  const PackedMask rest = without(PackedMask::full(3, 23), mask);
  EXPECT_EQ(rest.count(), 64);
  EXPECT_EQ((rest & mask).count(), 0);
  EXPECT_EQ(rest | mask, PackedMask::full(3, 23));

  std::set<uint64_t> fingerprints = {PackedMask(23, 3).fingerprint(),
                                     PackedMask(3, 23).fingerprint()};
  for (int64_t place = 0; place < 69; ++place) {
    PackedMask one(3, 23);
    one.set(place, true);
    fingerprints.insert(one.fingerprint());
  }
  EXPECT_EQ(fingerprints.size(), 71u);
  EXPECT_EQ(config_error([&] { mask& PackedMask(3, 22); }),
            "[packed_mask] cols=22 differs from cols=23 of the first mask");
}

/// Rows at any place of a word, of masks that are longer and shorter than one.
TEST(SparseMask, SetRows) {
  for (const int64_t cols : {1, 7, 64, 100}) {
    for (const int64_t first : {0, 1, 5}) {
      for (const bool is_full : {false, true}) {
        PackedMask whole = is_full ? PackedMask::full(9, cols) : PackedMask(9, cols);
        PackedMask part(3, cols);
        for (int64_t place = 0; place < part.num_places(); ++place) {
          part.set(place, place % 3 == 0 || place % 5 == 1);
        }
        whole.set_rows(first, part);
        for (int64_t row = 0; row < 9; ++row) {
          for (int64_t col = 0; col < cols; ++col) {
            const bool is_inside = row >= first && row < first + 3;
            EXPECT_EQ(whole.test(row, col), is_inside ? part.test(row - first, col) : is_full)
                << cols << " " << first << " " << row << " " << col;
          }
        }
        EXPECT_EQ(whole.count(), part.count() + (is_full ? 6 * cols : 0));
      }
    }
  }
  PackedMask whole(4, 6);
  EXPECT_EQ(config_error([&] { whole.set_rows(2, PackedMask(3, 6)); }),
            "[packed_mask] first=2 with rows=3 is outside rows=4");
  EXPECT_EQ(config_error([&] { whole.set_rows(0, PackedMask(3, 5)); }),
            "[packed_mask] cols=5 of the rows differs from cols=6");
}

TEST(SparseStructure, CellsKeepTheirNumber) {
  struct Case {
    Structure structure;
    int64_t out, in;
  };
  for (const Case& c : std::vector<Case>{{Structure::unstructured(), 31, 17},
                                         {Structure::constant_fan_in(), 31, 100},
                                         {Structure::n_of_m(2, 4), 12, 20},
                                         {Structure::n_of_m(1, 16), 3, 64},
                                         {Structure::blocks(4, 8), 12, 40},
                                         {Structure::block_ell(4, 2), 12, 40}}) {
    const AtomLayout layout = make_layout(c.structure, c.out, c.in, "w");
    EXPECT_EQ(layout.size(), c.out * c.in);
    for (int64_t per_cell = 0; per_cell <= layout.cells.atoms_per_cell; ++per_cell) {
      const PackedMask mask = random_mask(layout, per_cell * layout.granule(),
                                          kernels::random_key(static_cast<uint64_t>(per_cell)));
      std::vector<int64_t> counts(static_cast<size_t>(layout.cells.num_cells));
      kernels::count_atoms(layout.cells, mask.data(), counts.data());
      for (const int64_t count : counts) EXPECT_EQ(count, per_cell);
      EXPECT_EQ(count_positions(layout, mask), per_cell * layout.granule());
      EXPECT_EQ(position_mask(layout, mask).sum().item<int64_t>(), per_cell * layout.granule());
    }
  }
  EXPECT_EQ(make_layout(Structure::unstructured(), 31, 17, "w").smallest_budget(), 31);
  EXPECT_EQ(make_layout(Structure::constant_fan_in(), 31, 17, "w").smallest_budget(), 31);
  EXPECT_EQ(make_layout(Structure::n_of_m(2, 4), 12, 20, "w").smallest_budget(), 120);
  EXPECT_EQ(make_layout(Structure::blocks(4, 8), 12, 40, "w").smallest_budget(), 96);
  // The groups of N:M are neighbours along `in`.
  const AtomLayout layout = make_layout(Structure::n_of_m(2, 4), 12, 20, "w");
  const at::Tensor mask = position_mask(layout, random_mask(layout, 120, kernels::random_key(1)));
  EXPECT_TRUE((mask.view({12, 5, 4}).sum(2) == 2).all().item<bool>());
}

TEST(SparseStructure, AtomScores) {
  const at::Tensor w = at::randn({6, 10}, at::kDouble);
  const AtomLayout single = make_layout(Structure::unstructured(), 6, 10, "w");
  EXPECT_TRUE(at::equal(atom_scores(single, w), w.abs().to(at::kFloat)));
  Structure structure = Structure::blocks(4, 4);
  structure.pad = true;
  const AtomLayout layout = make_layout(structure, 6, 10, "w");
  const at::Tensor scores = atom_scores(layout, w);
  ASSERT_EQ(scores.sizes(), (std::vector<int64_t>{2, 3}));
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t col = 0; col < 3; ++col) {
      const at::Tensor block = w.slice(0, 4 * row, std::min<int64_t>(4 * row + 4, 6))
                                   .slice(1, 4 * col, std::min<int64_t>(4 * col + 4, 10));
      const double expected = block.square().mean().sqrt().item<double>();
      EXPECT_NEAR(scores[row][col].item<double>(), expected, 1e-6 * expected);
    }
  }
  EXPECT_NE(config_error([&] { atom_scores(layout, w.t()); }).find("values=[10, 6]"),
            std::string::npos);
}

TEST(SparseStructure, PositionMask) {
  Structure structure = Structure::blocks(4, 4);
  structure.pad = true;
  const AtomLayout layout = make_layout(structure, 6, 10, "w");
  PackedMask mask(2, 3);
  mask.set(2, true);
  mask.set(3, true);
  at::Tensor expected = at::zeros({6, 10}, at::kBool);
  expected.slice(0, 0, 4).slice(1, 8, 10).fill_(true);
  expected.slice(0, 4, 6).slice(1, 0, 4).fill_(true);
  EXPECT_TRUE(at::equal(position_mask(layout, mask), expected));
  EXPECT_EQ(count_positions(layout, mask), 16);
}

TEST(SparseStructure, Refused) {
  EXPECT_EQ(config_error([] { make_layout(Structure::n_of_m(2, 4), 8, 10, "w1"); }),
            "[sparse_structure] in of w1=10 is not a multiple of group=4, the M of N:M; choose "
            "another M");
  EXPECT_EQ(config_error([] { make_layout(Structure::n_of_m(5, 4), 8, 12, "w1"); }),
            "[sparse_structure] group_keep=5 is outside [1, group=4]");
  EXPECT_EQ(
      config_error([] { make_layout(Structure::blocks(4, 8), 10, 16, "w1"); }),
      "[sparse_structure] out of w1=10 is not a multiple of the atom's 4; choose another atom, "
      "or set pad");
  EXPECT_EQ(config_error([] {
              random_mask(make_layout(Structure::constant_fan_in(), 10, 16, "w1"), 33, {});
            }),
            "[sparse_structure] nnz=33 is not a multiple of 10, one atom for each of the equal "
            "cells");
}

}  // namespace
}  // namespace perseid
