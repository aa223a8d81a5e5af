#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Products of rows with expert weights of which only some blocks exist, grouped over experts: the
// rows of expert e are row_offsets[e] .. row_offsets[e + 1] - 1. For the host: on kCuda all throw
// ConfigError. Same bits for any thread count.

namespace perseid::kernels {

/// The active blocks of E weights [out, in], expert by expert, block row by block row. The last
/// blocks of a row or column of blocks may reach beyond the weight: what lies there is not read.
struct BlockWeights {
  int64_t num_experts = 1;
  int64_t out = 0;
  int64_t in = 0;
  int64_t block_rows = 64;
  int64_t block_cols = 64;
  /// [num_experts * ceil(out / block_rows) + 1] blocks before each block row, and all
  const int32_t* block_offsets = nullptr;
  /// [num_blocks] block column of each, rising within a block row; not checked
  const int32_t* block_columns = nullptr;
  /// [num_blocks, block_rows, block_cols]; not read by block_outer_product
  const void* values = nullptr;
};

/// y[r, :] = W_e x[r, :] for the rows r of expert e.
/// @param x            [R, in] float32 or float64
/// @param row_offsets  [num_experts + 1] from 0 to R
/// @param y            [R, out] written whole, must not overlap
/// 2 * block_rows * block_cols FLOPs for each row and block of its expert.
void block_product(const BlockWeights& weights, const void* x, const int64_t* row_offsets,
                   DType dtype, void* y, Stream stream = {});
void block_product_reference(const BlockWeights& weights, const void* x, const int64_t* row_offsets,
                             DType dtype, void* y);

/// grad_x[r, :] = W_e^T delta[r, :]: the gradient of x.
/// @param delta   [R, out]
/// @param grad_x  [R, in] written whole, must not overlap
void block_transposed_product(const BlockWeights& weights, const void* delta,
                              const int64_t* row_offsets, DType dtype, void* grad_x,
                              Stream stream = {});
void block_transposed_product_reference(const BlockWeights& weights, const void* delta,
                                        const int64_t* row_offsets, DType dtype, void* grad_x);

/// grad_values of a block = sum over the rows r of its expert of delta[r, i] x[r, j]: the gradient
/// of the values. 0 beyond the weight and for experts without rows.
/// @param grad_values  [num_blocks, block_rows, block_cols] written whole, must not overlap
void block_outer_product(const BlockWeights& weights, const void* delta, const void* x,
                         const int64_t* row_offsets, DType dtype, void* grad_values,
                         Stream stream = {});
void block_outer_product_reference(const BlockWeights& weights, const void* delta, const void* x,
                                   const int64_t* row_offsets, DType dtype, void* grad_values);

}  // namespace perseid::kernels
