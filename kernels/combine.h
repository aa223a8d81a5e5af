#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

namespace perseid::kernels {

/// Which rows make up each output: output n is made of entries offsets[n] .. offsets[n+1]-1, or, if
/// `offsets` is null, of exactly `fixed` entries n*fixed .. n*fixed+fixed-1. Entry a is row
/// row_of[a], or row a itself if `row_of` is null.
struct CombineIndex {
  const int32_t* offsets = nullptr;  ///< [num_out + 1]
  int64_t fixed = 0;
  const int32_t* row_of = nullptr;
};

/// out[n, g, :] = sum over the entries a of n, in their order, of weights[a, g] * rows[row(a), :].
/// Sums are formed in float32 (float64 for fp64) and rounded once; an output without entries is 0.
/// @param rows     [R, width] of `dtype`
/// @param weights  [A, num_gates] float32 (float64 for fp64); null: all 1, then num_gates is 1
/// @param out      [num_out, num_gates, width] of `dtype`
/// Reads A*width + A*num_gates, writes num_out*num_gates*width elements. Deterministic. On kCuda,
/// null weights of several gates are refused only without offsets, which the host may not read.
void combine(const void* rows, const CombineIndex& index, const void* weights, int64_t num_gates,
             void* out, int64_t num_out, int64_t width, DType dtype, Stream stream = {});
void combine_reference(const void* rows, const CombineIndex& index, const void* weights,
                       int64_t num_gates, void* out, int64_t num_out, int64_t width, DType dtype);

/// The transposes of combine. Either pointer may be null.
/// grad_rows[row(a), :] = sum over g of weights[a, g] * grad_out[n(a), g, :]  (each row has one
/// entry) grad_weights[a, g] = <grad_out[n(a), g, :], rows[row(a), :]>  (`rows` may be null if not
/// asked)
void combine_backward(const void* grad_out, const void* rows, const CombineIndex& index,
                      const void* weights, int64_t num_gates, void* grad_rows, void* grad_weights,
                      int64_t num_out, int64_t width, DType dtype, Stream stream = {});
void combine_backward_reference(const void* grad_out, const void* rows, const CombineIndex& index,
                                const void* weights, int64_t num_gates, void* grad_rows,
                                void* grad_weights, int64_t num_out, int64_t width, DType dtype);

}  // namespace perseid::kernels
