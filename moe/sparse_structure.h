#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/random.h"
#include "kernels/select_atoms.h"
#include "moe/sparse_mask.h"

namespace perseid {

/// What holds a fixed number of active atoms.
enum class Cell : uint8_t {
  kUnit,   ///< the whole weight
  kRow,    ///< one row of atoms: constant fan-in; of blocks: block-ELL
  kGroup,  ///< `group` neighbours along `in`, of which `group_keep` are active: N:M
  /// Hidden units of an expert or between two weights: the rows and columns of each are switched
  /// together, in all weights that it touches (moe/sparse_neurons.h). Masks are of positions.
  kNeuron,
};

/// The pattern of a sparse weight [out, in]. An atom is switched as a whole.
struct Structure {
  Cell cell = Cell::kUnit;
  int64_t atom_rows = 1;
  int64_t atom_cols = 1;
  int64_t group = 0;       ///< M of N:M
  int64_t group_keep = 0;  ///< N of N:M
  /// Atoms may reach beyond out and in; else they must divide them.
  bool pad = false;

  static Structure unstructured() { return {}; }
  static Structure constant_fan_in() { return {Cell::kRow}; }
  static Structure n_of_m(int64_t n, int64_t m) { return {Cell::kGroup, 1, 1, m, n}; }
  static Structure blocks(int64_t rows, int64_t cols) { return {Cell::kUnit, rows, cols}; }
  static Structure block_ell(int64_t rows, int64_t cols) { return {Cell::kRow, rows, cols}; }
  static Structure coupled_neurons() { return {Cell::kNeuron}; }
};

/// A Structure on a weight [out, in]. Atoms are numbered row by row, so a cell is a range of them.
struct AtomLayout {
  int64_t out = 0;
  int64_t in = 0;
  int64_t atom_rows = 1;  ///< positions of an atom
  int64_t atom_cols = 1;
  int64_t rows = 0;  ///< atoms of a column and of a row: masks are [rows, cols]
  int64_t cols = 0;
  kernels::AtomCells cells;
  int64_t group_keep = 0;  ///< N:M only: atoms of each cell

  int64_t num_atoms() const { return rows * cols; }
  int64_t atom_size() const { return atom_rows * atom_cols; }
  /// Positions, with those of padded atoms.
  int64_t size() const { return num_atoms() * atom_size(); }
  /// Budgets are multiples of it: the cells stay equal.
  int64_t granule() const { return atom_size() * cells.num_cells; }
  /// Positions of the smallest sensible budget: one atom for each row of atoms, N:M all of it.
  int64_t smallest_budget() const;
  bool is_elementwise() const { return atom_size() == 1; }
};

/// Throws ConfigError where the pattern does not divide the weight and padding is not asked for.
/// @param name  of the weight, for errors
AtomLayout make_layout(const Structure& structure, int64_t out, int64_t in,
                       const std::string& name);

/// A mask with nnz / granule atoms in each cell, each such mask as likely as any other.
/// @param nnz  a multiple of layout.granule()
PackedMask random_mask(const AtomLayout& layout, int64_t nnz, kernels::RandomKey key);

/// Root mean square of the positions of each atom, padding left out: the order of the Frobenius
/// norm, fair to atoms at a ragged edge. Of atoms of one position the absolute value.
/// @param values  [out, in] float32, float64, bfloat16 or float16
/// @return [rows, cols] float32, contiguous, on the host
at::Tensor atom_scores(const AtomLayout& layout, const at::Tensor& values);

/// Which positions of the weight the active atoms cover: [out, in] bool, on the host.
at::Tensor position_mask(const AtomLayout& layout, const PackedMask& mask);
/// The same as bits.
PackedMask position_bits(const AtomLayout& layout, const PackedMask& mask);

/// Values of inactive positions become 0. Host memory takes the bits, other memory the flags.
/// @param positions  [out, in] active ones
/// @param inactive   [out, in] bool, the others, where the values are; undefined on the host
/// @param values     [out, in]
void zero_inactive(const PackedMask& positions, const at::Tensor& inactive,
                   const at::Tensor& values);

/// Values of these positions become 0.
/// @param positions  [out, in]
/// @param values     [out, in]
void zero_at(const PackedMask& positions, const at::Tensor& values);

/// Active positions, padding left out.
int64_t count_positions(const AtomLayout& layout, const PackedMask& mask);

}  // namespace perseid
