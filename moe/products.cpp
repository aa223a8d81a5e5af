#include "moe/products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <utility>

#include "kernels/gemm_bf16.h"
#include "kernels/permute.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

bool uses_gemm_bf16(const at::Tensor& out) {
  return out.scalar_type() == at::kBFloat16 && kernels::has_gemm_bf16();
}

const kernels::BFloat16* bf16_data(const at::Tensor& tensor) {
  return static_cast<const kernels::BFloat16*>(data_of(tensor));
}

kernels::GemmOperand operand_of(const SegmentRows& rows) {
  return {bf16_data(rows.source()), rows.source().stride(0), false, rows.row_of()};
}

void gemm(const at::Tensor& out, int64_t k, const kernels::GemmOperand& a,
          const kernels::GemmOperand& b, Scratch& scratch) {
  const int64_t m = out.size(0), n = out.size(1);
  const int64_t num_elements = kernels::gemm_bf16_workspace(m, n, k, a.transposed);
  void* const workspace =
      scratch.workspace(num_elements * static_cast<int64_t>(sizeof(kernels::BFloat16)));
  kernels::gemm_bf16(m, n, k, a, b, static_cast<kernels::BFloat16*>(mutable_data_of(out)),
                     out.stride(0), static_cast<kernels::BFloat16*>(workspace));
}

}  // namespace

SegmentRows::SegmentRows(at::Tensor rows, const at::Tensor& row_of, const Segment& segment,
                         Scratch& scratch, size_t slot)
    : source_(std::move(rows)),
      row_of_(int32_data(row_of) + segment.begin),
      num_rows_(segment.num_rows()),
      scratch_(&scratch),
      slot_(slot) {}

const at::Tensor& SegmentRows::gathered() const {
  if (!gathered_.defined()) {
    gathered_ = scratch_->rows(slot_, num_rows_, width(), source_.options());
    kernels::permute(data_of(source_), row_of_, mutable_data_of(gathered_), num_rows_,
                     width() * source_.element_size());
  }
  return gathered_;
}

void multiply(at::Tensor out, const SegmentRows& rows, const at::Tensor& matrix,
              const at::Tensor& bias, Scratch& scratch) {
  if (bias.defined()) {
    at::addmm_out(out, bias, rows.gathered(), matrix);
  } else if (uses_gemm_bf16(out) && matrix.is_contiguous()) {
    gemm(out, rows.width(), operand_of(rows), {bf16_data(matrix), matrix.stride(0), false, nullptr},
         scratch);
  } else if (uses_gemm_bf16(out) && matrix.t().is_contiguous()) {
    gemm(out, rows.width(), operand_of(rows),
         {bf16_data(matrix.t()), matrix.stride(1), true, nullptr}, scratch);
  } else {
    at::mm_out(out, rows.gathered(), matrix);
  }
}

void multiply_transposed(at::Tensor out, const SegmentRows& a, const SegmentRows& b,
                         Scratch& scratch) {
  if (uses_gemm_bf16(out)) {
    kernels::GemmOperand transposed = operand_of(a);
    transposed.transposed = true;
    gemm(out, a.num_rows(), transposed, operand_of(b), scratch);
  } else {
    at::mm_out(out, a.gathered().t(), b.gathered());
  }
}

}  // namespace perseid
