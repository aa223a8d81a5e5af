#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "moe/sparse_mask.h"
#include "moe/sparse_structure.h"

// Sparse weights without their inactive entries: for inference, and to train where no dense weight
// exists. What is active comes from the mask, never from weights that are not 0.

namespace perseid {

enum class SparseFormat : uint8_t {
  kCsr,       ///< columns of 32 bits
  kShortCsr,  ///< columns of 16 bits; in <= 65536
  /// As many entries in each row that has any, or one less in the last of them, as neuron ablation
  /// leaves it; columns of 16 bits where they reach.
  kCondensed,
  kBlockCsr,  ///< blocks of the layout
  kGroups,    ///< N of M neighbours: places in the group of 2 bits for M <= 4, else of a byte
};

/// A weight [out, in]. Entries are in row order, columns rising.
struct SparseExport {
  SparseFormat format = SparseFormat::kCsr;
  int64_t out = 0;
  int64_t in = 0;
  int64_t block_rows = 1;  ///< kBlockCsr
  int64_t block_cols = 1;
  int64_t group = 0;       ///< kGroups: M
  int64_t group_keep = 0;  ///< kGroups: N
  /// In the weight's type. CSR [nnz]; condensed [rows, fan-in]; blocks [blocks, block_rows,
  /// block_cols], 0 beyond the weight; groups [out, in / M * N]. May be a leaf that is trained.
  at::Tensor values;
  /// int32, or uint16: columns as `values`, of blocks [blocks] block columns. Groups: uint8
  /// [bytes], places of all values, from the low bits of a byte on.
  at::Tensor indices;
  at::Tensor offsets;  ///< CSR, blocks: int32 [rows or block rows + 1]
  at::Tensor rows;     ///< condensed: int32 rows that have entries; undefined if all have
  /// Condensed: so many of these rows are full. The last entry of the others is padding: a column
  /// of theirs once more, value 0, gradient 0.
  int64_t full_rows = 0;

  int64_t bytes() const;  ///< of all four
};

/// @param weight  [out, in] float32, float64, bfloat16 or float16
/// @param mask    of the layout's atoms
/// Throws ConfigError if rows differ otherwise than kCondensed allows, groups differ (kGroups,
/// whose layout is N:M), or `in` is too large for the columns.
SparseExport export_as(const at::Tensor& weight, const AtomLayout& layout, const PackedMask& mask,
                       SparseFormat format);

/// [out, in], inactive entries 0.
at::Tensor dense_weight(const SparseExport& weight);

/// y = x W^T on the host, differentiable in x and in weight.values; sums are float32, of float64
/// float64. Not differentiable twice.
/// @param x  [N, in] in the values' type
/// @return [N, out]
at::Tensor sparse_matmul(const at::Tensor& x, const SparseExport& weight);

}  // namespace perseid
