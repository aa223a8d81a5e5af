// Weights without their inactive entries.
//   EqualsDense     every format that fits: the dense weight bit for bit, products forward and
//                   backward to 1e-12 (float64), 1e-6 (float32), 2^-7 (bfloat16) of masked dense
//   Gradcheck       finite differences for x and values, float64
//   GrownZeros      active weights of value 0, and -0, are in every export, and get gradients
//   EmptyRows       rows without entries, no entries at all, no rows of x
//   Bytes           of the index of each format; trained without a dense weight: 18 d and 20 d
//   bytes
//                   a position within 2 %
//   Refused         fan-in that differs, layouts that are not N:M, too many columns; M that does
//   not
//                   divide
#include "moe/sparse_export.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "moe/sparse_optimizer.h"
#include "tests/config_error.h"
#include "tests/gradcheck.h"
#include "tests/moe/sparse_fixture.h"

namespace perseid {
namespace {

using testing::config_error;
using testing::normal;

struct Case {
  const char* name;
  SparseFormat format;
  Structure structure;
};
Structure padded(Structure structure) {
  structure.pad = true;
  return structure;
}
std::vector<Case> cases() {
  return {{"csr", SparseFormat::kCsr, Structure::unstructured()},
          {"short csr", SparseFormat::kShortCsr, Structure::unstructured()},
          {"csr of blocks", SparseFormat::kCsr, padded(Structure::blocks(5, 7))},
          {"condensed", SparseFormat::kCondensed, Structure::constant_fan_in()},
          {"blocks", SparseFormat::kBlockCsr, Structure::blocks(4, 8)},
          {"ragged blocks", SparseFormat::kBlockCsr, padded(Structure::blocks(5, 7))},
          {"block-ell", SparseFormat::kBlockCsr, padded(Structure::block_ell(3, 16))},
          {"entries as blocks", SparseFormat::kBlockCsr, Structure::unstructured()},
          {"2:4", SparseFormat::kGroups, Structure::n_of_m(2, 4)},
          {"1:2", SparseFormat::kGroups, Structure::n_of_m(1, 2)},
          {"3:16", SparseFormat::kGroups, Structure::n_of_m(3, 16)}};
}

constexpr int64_t kOut = 24, kIn = 48;

/// A layout with a mask of about a quarter of its atoms.
struct Masked {
  AtomLayout layout;
  PackedMask mask;
  at::Tensor is_active;  ///< [out, in]
};
Masked masked(const Structure& structure) {
  Masked result;
  result.layout = make_layout(structure, kOut, kIn, "weight");
  const int64_t granule = result.layout.granule();
  const int64_t nnz = result.layout.group_keep > 0
                          ? result.layout.smallest_budget()
                          : (result.layout.size() / 4 + granule - 1) / granule * granule;
  result.mask = random_mask(result.layout, nnz, kernels::random_key(3));
  result.is_active = position_mask(result.layout, result.mask);
  return result;
}

double error(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor e = expected.detach().to(at::kDouble);
  if (e.numel() == 0) return 0;
  return ((actual.detach().to(at::kDouble) - e).abs().max() / (e.abs().max() + 1e-30))
      .item<double>();
}

/// The gradient of values as a dense tensor: the export of a dense gradient has it at the same
/// places.
at::Tensor values_of(const at::Tensor& dense, const Masked& m, SparseFormat format) {
  return export_as(dense, m.layout, m.mask, format).values;
}

TEST(SparseExport, EqualsDense) {
  for (const Case& c : cases()) {
    const Masked m = masked(c.structure);
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const double limit = type == at::kDouble ? 1e-12 : type == at::kFloat ? 1e-6 : 0x1p-7;
      // Inactive entries of the source do not matter.
      const at::Tensor weight = normal({kOut, kIn}, 1, type);
      SparseExport sparse = export_as(weight, m.layout, m.mask, c.format);
      EXPECT_TRUE(at::equal(dense_weight(sparse), weight * m.is_active)) << c.name;
      EXPECT_EQ(sparse.values.scalar_type(), type);
      for (const int64_t rows : {13, 1, 0}) {
        sparse.values = sparse.values.detach().clone().requires_grad_(true);
        const at::Tensor x = normal({rows, kIn}, 2, type).requires_grad_(true);
        const at::Tensor y = sparse_matmul(x, sparse);
        const at::Tensor delta = normal({rows, kOut}, 4, type);
        y.backward(delta);
        at::Tensor other_x = x.detach().to(at::kDouble).requires_grad_(true);
        at::Tensor dense = (weight.to(at::kDouble) * m.is_active).requires_grad_(true);
        const at::Tensor expected = other_x.mm(dense.t());
        expected.backward(delta.to(at::kDouble));
        EXPECT_EQ(y.scalar_type(), type);
        EXPECT_LE(error(y, expected), limit) << c.name;
        EXPECT_LE(error(x.grad(), other_x.grad()), limit) << c.name;
        EXPECT_LE(error(sparse.values.grad(), values_of(dense.grad(), m, c.format)), limit)
            << c.name;
      }
    }
  }
}

TEST(SparseExport, Gradcheck) {
  for (const Case& c : cases()) {
    const Masked m = masked(c.structure);
    SparseExport sparse = export_as(normal({kOut, kIn}, 1), m.layout, m.mask, c.format);
    const at::Tensor x = normal({3, kIn}, 2);
    const auto result = testing::gradcheck(
        [&] { return std::vector<at::Tensor>{sparse_matmul(x, sparse)}; }, {x, sparse.values});
    EXPECT_LE(result.max_error, 1e-8) << c.name << result.worst;
  }
}

TEST(SparseExport, GrownZeros) {
  for (const Case& c : cases()) {
    const Masked m = masked(c.structure);
    const at::Tensor zeros = at::zeros({kOut, kIn}, at::kDouble);
    zeros.select(0, 2).fill_(-0.0);
    SparseExport sparse = export_as(zeros, m.layout, m.mask, c.format);
    const at::Tensor ones =
        export_as(at::ones({kOut, kIn}, at::kDouble), m.layout, m.mask, c.format).values;
    EXPECT_EQ(sparse.values.numel(), ones.numel());
    EXPECT_EQ(ones.sum().item<int64_t>(), m.is_active.sum().item<int64_t>()) << c.name;
    sparse.values.requires_grad_(true);
    const at::Tensor x = normal({5, kIn}, 2), delta = normal({5, kOut}, 4);
    sparse_matmul(x, sparse).backward(delta);
    EXPECT_LE(error(sparse.values.grad(), values_of(delta.t().mm(x), m, c.format)), 1e-12);
    EXPECT_EQ(sparse.values.grad().ne(0).sum().item<int64_t>(), m.is_active.sum().item<int64_t>())
        << c.name;
  }
}

TEST(SparseExport, EmptyRows) {
  for (const Case& c : cases()) {
    if (c.format == SparseFormat::kGroups) continue;  // its rows cannot be empty
    Masked m = masked(c.structure);
    const at::Tensor weight = normal({kOut, kIn}, 1), x = normal({6, kIn}, 2);
    const at::Tensor delta = normal({6, kOut}, 4);
    for (const bool is_all : {false, true}) {
      // The first row of atoms, one in the middle and the last one, or all of them.
      for (const int64_t row : {int64_t{0}, m.layout.rows / 2, m.layout.rows - 1}) {
        for (int64_t col = 0; col < m.layout.cols; ++col) {
          m.mask.set(row * m.layout.cols + col, false);
        }
      }
      if (is_all) m.mask = PackedMask(m.layout.rows, m.layout.cols);
      const at::Tensor dense = weight * position_mask(m.layout, m.mask);
      SparseExport sparse = export_as(weight, m.layout, m.mask, c.format);
      EXPECT_TRUE(at::equal(dense_weight(sparse), dense)) << c.name;
      sparse.values.requires_grad_(true);
      const at::Tensor leaf = x.clone().requires_grad_(true);
      const at::Tensor y = sparse_matmul(leaf, sparse);
      y.backward(delta);
      EXPECT_LE(error(y, x.mm(dense.t())), 1e-12) << c.name;
      EXPECT_LE(error(leaf.grad(), delta.mm(dense)), 1e-12) << c.name;
      EXPECT_LE(error(sparse.values.grad(), values_of(delta.t().mm(x), m, c.format)), 1e-12);
      if (is_all) {
        EXPECT_EQ(y.abs().sum().item<double>(), 0);
      }
    }
  }
}

TEST(SparseExport, Bytes) {
  const int64_t out = 512, in = 1024, size = out * in;
  const at::Tensor weight = normal({out, in}, 1, at::kBFloat16);
  const auto bytes = [&](const Structure& structure, int64_t nnz, SparseFormat format) {
    const AtomLayout layout = make_layout(structure, out, in, "weight");
    return export_as(weight, layout, random_mask(layout, nnz, kernels::random_key(1)), format)
        .bytes();
  };
  EXPECT_EQ(bytes(Structure::constant_fan_in(), size / 8, SparseFormat::kCondensed), size / 8 * 4);
  EXPECT_EQ(bytes(Structure::unstructured(), size / 8, SparseFormat::kCsr), size / 8 * 6 + 513 * 4);
  EXPECT_EQ(bytes(Structure::blocks(64, 64), size / 8, SparseFormat::kBlockCsr),
            size / 8 * 2 + size / 8 / 4096 * 4 + 9 * 4);
  // 2:4 is 0.5625 of dense bfloat16.
  EXPECT_EQ(bytes(Structure::n_of_m(2, 4), size / 2, SparseFormat::kGroups), size * 2 * 9 / 16);
  EXPECT_EQ(bytes(Structure::n_of_m(2, 16), size / 8, SparseFormat::kGroups), size / 8 * 3);

  struct Row {
    SparseFormat format;
    Structure structure;
    double bytes;  ///< at density 1
  };
  for (const Row& row :
       std::vector<Row>{{SparseFormat::kShortCsr, Structure::unstructured(), 18},
                        {SparseFormat::kCsr, Structure::unstructured(), 20},
                        {SparseFormat::kCondensed, Structure::constant_fan_in(), 18},
                        {SparseFormat::kBlockCsr, Structure::blocks(64, 64), 16}}) {
    for (const double density : {0.5, 0.25, 0.1}) {
      const AtomLayout layout = make_layout(row.structure, out, in, "weight");
      const auto nnz = static_cast<int64_t>(density * static_cast<double>(size)) /
                       layout.granule() * layout.granule();
      SparseExport sparse =
          export_as(weight, layout, random_mask(layout, nnz, kernels::random_key(1)), row.format);
      sparse.values.requires_grad_(true);
      SparseAdamW optimizer({sparse.values}, torch::optim::AdamWOptions(1e-3));
      optimizer.compress(sparse.values, -1, PackedMask::full(1, sparse.values.numel()));
      const at::Tensor x = normal({4, in}, 2, at::kBFloat16);
      for (int64_t step = 0; step < 2; ++step) {
        optimizer.zero_grad();
        sparse_matmul(x, sparse).square().sum().backward();
        optimizer.step();
      }
      const double total = static_cast<double>(sparse.bytes() + optimizer.state_bytes()) +
                           static_cast<double>(sparse.values.grad().storage().nbytes());
      const double expected = row.bytes * static_cast<double>(nnz);
      EXPECT_NEAR(total, expected, 0.02 * expected);
      if (density == 0.1 && row.bytes == 18) {
        EXPECT_LE(total / static_cast<double>(size), 2);
      }
      RecordProperty(
          "bytes_" + std::to_string(static_cast<int>(row.format)) + "_" + std::to_string(density),
          std::to_string(total / static_cast<double>(size)));
    }
  }
}

TEST(SparseExport, Refused) {
  const at::Tensor weight = normal({3, 8}, 1);
  const AtomLayout layout = make_layout(Structure::unstructured(), 3, 8, "weight");
  PackedMask mask(3, 8);
  for (const int64_t place : {9, 10, 11, 17}) mask.set(place, true);
  EXPECT_EQ(config_error([&] { export_as(weight, layout, mask, SparseFormat::kCondensed); }),
            "[sparse_export] fan-in=1 of row 2 differs from 3 of row 1; condensed weights need "
            "constant fan-in, choose kCsr");
  EXPECT_EQ(config_error([&] { export_as(weight, layout, mask, SparseFormat::kGroups); }),
            "[sparse_export] layout=given is not N:M; choose another format");
  EXPECT_NE(config_error([&] {
              make_layout(Structure::n_of_m(1, 5), 3, 8, "w1");
            }).find("is not a multiple of group=5, the M of N:M"),
            std::string::npos);
  EXPECT_EQ(config_error([&] {
              export_as(normal({3, 9}, 1), layout, mask, SparseFormat::kCsr);
            }),
            "[sparse_export] weight=[3, 9] is not [out=3, in=8]");
  const int64_t wide = 65'537;
  const AtomLayout wide_layout = make_layout(Structure::unstructured(), 1, wide, "weight");
  const PackedMask last = random_mask(wide_layout, 5, kernels::random_key(1));
  EXPECT_NE(config_error([&] {
              export_as(normal({1, wide}, 1), wide_layout, last, SparseFormat::kShortCsr);
            }).find("exceeds 65536"),
            std::string::npos);
  EXPECT_EQ(export_as(normal({1, wide}, 1), wide_layout, last, SparseFormat::kCondensed)
                .indices.scalar_type(),
            at::kInt);
  const SparseExport sparse = export_as(weight, layout, mask, SparseFormat::kCsr);
  EXPECT_EQ(config_error([&] {
              sparse_matmul(normal({2, 9}, 1), sparse);
            }),
            "[sparse_export] x=[2, 9] is not [N, in=8]");
}

}  // namespace
}  // namespace perseid
