#pragma once
#include <cstdint>

#include "kernels/dtype.h"

// Small bfloat16 products for grouped experts on CPUs with AVX512-BF16: no set-up for each new
// shape, and rows may be gathered on the way in, so that permuted tokens are never copied. For one
// thread; callers deal products to threads.

namespace perseid::kernels {

/// Can gemm_bf16 run here? It needs AVX512-BF16. False where the CPU has AMX as well, whose tiles
/// LibTorch's own products use.
bool has_gemm_bf16();

/// A matrix in memory, rows of `stride` elements; `row_of` picks row row_of[i] as row i, null: row
/// i. With `transposed` the operand is the transpose of what lies in memory.
struct GemmOperand {
  const BFloat16* data = nullptr;
  int64_t stride = 0;
  bool transposed = false;
  const int32_t* row_of = nullptr;
};

/// Elements of the workspace of a product, in BFloat16.
int64_t gemm_bf16_workspace(int64_t m, int64_t n, int64_t k, bool a_transposed);

/// c[M, N] = a[M, K] b[K, N], summed in float32 in the order of k, rounded once to nearest even.
/// Subnormal inputs and results count as 0, as the instruction has it. Bits of a row of c depend on
/// that row of a and on b alone, not on M. 2*M*N*K FLOPs; b, and a if it is transposed, are packed
/// into `workspace` first.
/// @param c          [M, N] rows of c_stride elements; must not overlap the operands
/// @param workspace  gemm_bf16_workspace elements, 64-byte aligned
void gemm_bf16(int64_t m, int64_t n, int64_t k, const GemmOperand& a, const GemmOperand& b,
               BFloat16* c, int64_t c_stride, BFloat16* workspace);
/// Sums in double, on any CPU. Needs no workspace.
void gemm_bf16_reference(int64_t m, int64_t n, int64_t k, const GemmOperand& a,
                         const GemmOperand& b, BFloat16* c, int64_t c_stride);

}  // namespace perseid::kernels
