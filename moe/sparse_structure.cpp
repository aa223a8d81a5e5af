#include "moe/sparse_structure.h"

#include <ATen/ops/abs.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/minimum.h>

#include <algorithm>

#include "kernels/error.h"
#include "kernels/mask_values.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

constexpr const char* kSparseStructure = "sparse_structure";

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string of(const char* argument, const std::string& name) {
  return std::string(argument) + " of " + name;
}

void require_divides(int64_t size, int64_t atom, const char* argument, const std::string& name,
                     bool pad) {
  if (pad) return;
  require(size % atom == 0, kSparseStructure, of(argument, name).c_str(), size,
          "is not a multiple of the atom's " + to_text(atom) + "; choose another atom, or set pad");
}

/// [rows, cols, atom_rows, atom_cols] of a weight [out, in], zeros at the padding.
at::Tensor by_atom(const AtomLayout& layout, const at::Tensor& values) {
  const at::Tensor padded =
      at::constant_pad_nd(values, {0, layout.cols * layout.atom_cols - layout.in, 0,
                                   layout.rows * layout.atom_rows - layout.out});
  return padded.view({layout.rows, layout.atom_rows, layout.cols, layout.atom_cols})
      .permute({0, 2, 1, 3});
}

at::Tensor expanded(const PackedMask& positions) {
  at::Tensor result = at::empty({positions.rows(), positions.cols()}, at::kBool);
  kernels::expand_mask(positions.data(), positions.num_places(),
                       static_cast<uint8_t*>(result.mutable_data_ptr()));
  return result;
}

/// Whether kernels change these values in place.
bool has_mask_kernel(const at::Tensor& values) {
  return values.is_cpu() && values.is_contiguous() && has_dtype(values);
}

}  // namespace

int64_t AtomLayout::smallest_budget() const {
  if (group_keep > 0) return granule() * group_keep;
  return divided_up(rows * atom_size(), granule()) * granule();
}

AtomLayout make_layout(const Structure& structure, int64_t out, int64_t in,
                       const std::string& name) {
  require(out >= 1, kSparseStructure, of("out", name).c_str(), out, "is below 1");
  require(in >= 1, kSparseStructure, of("in", name).c_str(), in, "is below 1");
  require(structure.atom_rows >= 1, kSparseStructure, "atom_rows", structure.atom_rows,
          "is below 1");
  require(structure.atom_cols >= 1, kSparseStructure, "atom_cols", structure.atom_cols,
          "is below 1");
  require_divides(out, structure.atom_rows, "out", name, structure.pad);
  require_divides(in, structure.atom_cols, "in", name, structure.pad);
  AtomLayout layout;
  layout.out = out;
  layout.in = in;
  layout.atom_rows = structure.atom_rows;
  layout.atom_cols = structure.atom_cols;
  layout.rows = divided_up(out, structure.atom_rows);
  layout.cols = divided_up(in, structure.atom_cols);
  switch (structure.cell) {
    case Cell::kNeuron:
      require(structure.atom_rows == 1 && structure.atom_cols == 1, kSparseStructure, "atom",
              to_text(structure.atom_rows) + "x" + to_text(structure.atom_cols),
              "is not 1x1; hidden units are whole rows and columns already");
      [[fallthrough]];
    case Cell::kUnit:
      layout.cells = {1, layout.num_atoms()};
      break;
    case Cell::kRow:
      layout.cells = {layout.rows, layout.cols};
      break;
    case Cell::kGroup:
      require(structure.group >= 1, kSparseStructure, "group", structure.group, "is below 1");
      require(structure.group_keep >= 1 && structure.group_keep <= structure.group,
              kSparseStructure, "group_keep", structure.group_keep,
              "is outside [1, group=" + to_text(structure.group) + "]");
      require(layout.cols % structure.group == 0, kSparseStructure, of("in", name).c_str(), in,
              "is not a multiple of group=" + to_text(structure.group) +
                  ", the M of N:M; choose another M");
      layout.cells = {layout.num_atoms() / structure.group, structure.group};
      layout.group_keep = structure.group_keep;
      break;
  }
  return layout;
}

PackedMask random_mask(const AtomLayout& layout, int64_t nnz, kernels::RandomKey key) {
  require(nnz >= 0 && nnz <= layout.size(), kSparseStructure, "nnz", nnz,
          "is outside [0, size=" + to_text(layout.size()) + "]");
  require(nnz % layout.granule() == 0, kSparseStructure, "nnz", nnz,
          "is not a multiple of " + to_text(layout.granule()) +
              ", one atom for each of the equal cells");
  const std::vector<int64_t> k(static_cast<size_t>(layout.cells.num_cells), nnz / layout.granule());
  PackedMask mask(layout.rows, layout.cols);
  kernels::select_atoms(layout.cells, kernels::AtomOrder::kLargest, nullptr,
                        PackedMask::full(layout.rows, layout.cols).data(), k.data(), key,
                        mask.data());
  return mask;
}

at::Tensor atom_scores(const AtomLayout& layout, const at::Tensor& values) {
  require(values.dim() == 2 && values.size(0) == layout.out && values.size(1) == layout.in,
          kSparseStructure, "values", to_text(values.sizes()),
          "is not [out=" + to_text(layout.out) + ", in=" + to_text(layout.in) + "]");
  const at::Tensor source = values.detach().to(at::kCPU);
  if (layout.is_elementwise()) return source.abs().to(at::kFloat).contiguous();
  const at::Tensor squares = by_atom(layout, source.to(at::kDouble).square()).sum({2, 3});
  const auto extents = [](int64_t size, int64_t atom, int64_t count) {
    at::Tensor sizes = at::full({count}, atom, at::kDouble);
    if (size % atom != 0) sizes[count - 1] = size % atom;
    return sizes;
  };
  const at::Tensor heights = extents(layout.out, layout.atom_rows, layout.rows);
  const at::Tensor widths = extents(layout.in, layout.atom_cols, layout.cols);
  return (squares / (heights.unsqueeze(1) * widths.unsqueeze(0))).sqrt().to(at::kFloat);
}

PackedMask position_bits(const AtomLayout& layout, const PackedMask& mask) {
  if (layout.is_elementwise()) return mask;
  PackedMask result(layout.out, layout.in);
  for (int64_t row = 0; row < layout.out; ++row) {
    for (int64_t col = 0; col < layout.in; ++col) {
      const bool is_active = mask.test(row / layout.atom_rows, col / layout.atom_cols);
      if (is_active) result.set(row * layout.in + col, true);
    }
  }
  return result;
}

at::Tensor position_mask(const AtomLayout& layout, const PackedMask& mask) {
  return expanded(position_bits(layout, mask));
}

void zero_inactive(const PackedMask& positions, const at::Tensor& inactive,
                   const at::Tensor& values) {
  if (!has_mask_kernel(values)) {
    values.masked_fill_(inactive.defined() ? inactive : expanded(positions).logical_not_(), 0);
    return;
  }
  kernels::zero_inactive(positions.data(), positions.num_places(),
                         dtype_of(values, kSparseStructure), mutable_data_of(values));
}

void zero_at(const PackedMask& positions, const at::Tensor& values) {
  if (!has_mask_kernel(values)) {
    values.masked_fill_(expanded(positions).to(values.device()), 0);
    return;
  }
  const PackedMask others =
      without(PackedMask::full(positions.rows(), positions.cols()), positions);
  kernels::zero_inactive(others.data(), others.num_places(), dtype_of(values, kSparseStructure),
                         mutable_data_of(values));
}

int64_t count_positions(const AtomLayout& layout, const PackedMask& mask) {
  if (layout.size() == layout.out * layout.in) return mask.count() * layout.atom_size();
  int64_t count = 0;
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t height = std::min(layout.atom_rows, layout.out - row * layout.atom_rows);
    for (int64_t col = 0; col < layout.cols; ++col) {
      if (!mask.test(row, col)) continue;
      count += height * std::min(layout.atom_cols, layout.in - col * layout.atom_cols);
    }
  }
  return count;
}

}  // namespace perseid
