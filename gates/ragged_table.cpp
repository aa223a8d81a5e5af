#include "gates/ragged_table.h"

#include <ATen/ops/empty.h>

#include "gates/kernel_types.h"
#include "kernels/ragged.h"

namespace perseid::gates {

using at::Tensor;

RaggedTable ragged_of(const Tensor& table_in, bool with_positions) {
  const Tensor table = table_in.contiguous();
  const kernels::RaggedShape shape{table.size(0), table.size(1)};
  const kernels::DType dtype = kernel_type(table.scalar_type());
  const kernels::Stream stream = stream_of(table, "routing");
  const at::TensorOptions ints = table.options().dtype(at::kInt).requires_grad(false);
  RaggedTable rows;
  rows.token_offsets = at::empty({shape.num_tokens + 1}, ints);
  auto* const offsets = rows.token_offsets.mutable_data_ptr<int32_t>();
  const int64_t A = kernels::ragged_offsets(shape, dtype, table.const_data_ptr(), offsets, stream);
  rows.expert_idx = at::empty({A}, ints);
  rows.weights = at::empty({A}, ints.dtype(table.scalar_type()));
  kernels::RaggedOutput output;
  output.expert_idx = rows.expert_idx.mutable_data_ptr<int32_t>();
  output.values = rows.weights.mutable_data_ptr();
  if (with_positions) {
    rows.positions = at::empty({A}, ints.dtype(at::kLong));
    output.positions = rows.positions.mutable_data_ptr<int64_t>();
  }
  kernels::ragged_rows(shape, dtype, table.const_data_ptr(), offsets, output, stream);
  return rows;
}

Tensor dense_of(const Tensor& token_offsets, const Tensor& expert_idx, const Tensor& values,
                int64_t num_experts) {
  const int64_t T = token_offsets.size(0) - 1;
  const Tensor table = at::empty({T, num_experts}, values.options().requires_grad(false));
  kernels::ragged_to_dense(
      {T, num_experts}, kernel_type(values.scalar_type()), token_offsets.const_data_ptr<int32_t>(),
      expert_idx.const_data_ptr<int32_t>(), values.contiguous().const_data_ptr(),
      table.mutable_data_ptr(), stream_of(table, "routing"));
  return table;
}

}  // namespace perseid::gates
