#include "moe/device_experts.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/repeat_interleave.h>

#include <optional>

#include "gates/device.h"
#include "kernels/activation.h"
#include "kernels/permute.h"
#include "kernels/plan.h"
#include "moe/grouped_gemm.h"
#include "moe/grouped_rows.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

using at::Tensor;

/// [R, width] rows by sorted place.
Tensor gathered(const Tensor& rows, const LocalPlan& plan) {
  const Tensor row_of = plan.row_of_sorted();
  Tensor out = at::empty({plan.num_assignments, rows.size(1)}, rows.options());
  kernels::permute(data_of(rows), int32_data(row_of), mutable_data_of(out), plan.num_assignments,
                   rows.size(1) * rows.element_size(), gates::stream_of(rows, "experts"));
  return out;
}

/// [R, width] the row of each sorted place's expert.
Tensor by_place(const Tensor& by_expert, const LocalPlan& plan) {
  const Tensor counts = plan.device_offsets.slice(0, 1).sub(plan.device_offsets.slice(0, 0, -1));
  const std::optional<int64_t> num_places = plan.num_assignments;  // known: no wait for the sum
  return by_expert.index_select(0, at::repeat_interleave(counts, num_places));
}

/// [L, width] sums over the rows of each expert, in their order.
Tensor sum_by_expert(const Tensor& sorted, const LocalPlan& plan) {
  const int64_t num_experts = plan.num_local_experts(), width = sorted.size(1);
  Tensor out = at::empty({num_experts, width}, sorted.options());
  kernels::sum_by_expert(data_of(sorted), sorted.size(0), width,
                         plan.device_offsets.const_data_ptr<int64_t>(), num_experts,
                         mutable_data_of(out), dtype_of(sorted, "experts"),
                         gates::stream_of(sorted, "experts"));
  return out;
}

/// weights * act(pre) for all rows; weights may be undefined.
Tensor activated(const Tensor& pre, const Tensor& weights, int64_t d_ff, MlpKind kind) {
  Tensor act = at::empty({pre.size(0), d_ff}, pre.options());
  kernels::activation_forward({pre.size(0), d_ff, kind.activation, kind.gated},
                              dtype_of(pre, "experts"), data_of(pre), data_of(weights),
                              mutable_data_of(act), gates::stream_of(pre, "experts"));
  return act;
}

}  // namespace

MlpOutput device_mlp_forward(const Tensor& rows, const Tensor& weights,
                             const MlpParameters& parameters, MlpKind kind, const LocalPlan& plan) {
  const Tensor &down = parameters.down, &down_bias = parameters.down_bias;
  const bool weight_inside = weights.size(1) == 1;
  const Tensor sorted = weight_inside ? to_sorted(weights, plan) : Tensor();
  const GroupedGemm gemm(plan);
  Tensor pre = gemm.forward(gathered(rows, plan), parameters.up);
  if (parameters.up_bias.defined()) pre.add_(by_place(parameters.up_bias, plan));
  Tensor y = gemm.forward(activated(pre, sorted, down.size(2), kind), down);
  if (down_bias.defined()) {
    const Tensor bias = by_place(down_bias, plan);
    y.add_(weight_inside ? bias.mul(sorted.to(bias.scalar_type())) : bias);
  }
  const RowSums sums(plan, dtype_of(rows, "grouped_mlp"));
  return {sums.reduced(y, weight_inside ? Tensor() : weights), pre};
}

MlpGradients device_mlp_backward(const Tensor& grad_out, const Tensor& rows, const Tensor& weights,
                                 const MlpParameters& parameters, const Tensor& pre, MlpKind kind,
                                 const LocalPlan& plan, const MlpWanted& wanted) {
  const Tensor &up = parameters.up, &down = parameters.down, &down_bias = parameters.down_bias;
  const kernels::DType dtype = dtype_of(rows, "grouped_mlp");
  const int64_t d_ff = down.size(2), d_out = down.size(1);
  const bool weight_inside = weights.size(1) == 1;
  const Tensor sorted = weight_inside ? to_sorted(weights, plan) : Tensor();
  const RowSums sums(plan, dtype);
  const GroupedGemm gemm(plan);

  const Tensor g =
      weight_inside ? gathered(grad_out, plan) : sums.expanded(grad_out, weights, d_out);
  Tensor act = gemm.grad_input(g, down);  // the gradient of the activation, then weights * act(pre)
  Tensor grad_pre = at::empty_like(pre);
  Tensor grad_sorted = weight_inside && wanted.weights ? at::empty_like(sorted) : Tensor();
  kernels::activation_backward({pre.size(0), d_ff, kind.activation, kind.gated}, dtype,
                               data_of(pre), data_of(sorted), data_of(act),
                               mutable_data_of(grad_pre), mutable_data_of(act),
                               mutable_data_of(grad_sorted), gates::stream_of(pre, "experts"));

  MlpGradients gradients;
  if (wanted.down) gradients.down = gemm.grad_weight(g, act);
  if (down_bias.defined()) {
    if (wanted.down_bias) {
      gradients.down_bias =
          sum_by_expert(weight_inside ? g.mul(sorted.to(g.scalar_type())) : g, plan);
    }
    if (grad_sorted.defined()) {
      const Tensor products = at::mul(g, by_place(down_bias, plan));
      grad_sorted.add_(products.sum(1, /*keepdim=*/true, grad_sorted.scalar_type()));
    }
  }
  if (grad_sorted.defined()) gradients.weights = from_sorted(grad_sorted, plan);
  if (!weight_inside && wanted.weights) {
    Tensor y = gemm.forward(act, down);
    if (down_bias.defined()) y.add_(by_place(down_bias, plan));
    gradients.weights = sums.weight_gradient(grad_out, y, weights);
  }
  if (wanted.up) gradients.up = gemm.grad_weight(grad_pre, gathered(rows, plan));
  if (wanted.up_bias) gradients.up_bias = sum_by_expert(grad_pre, plan);
  if (wanted.rows) gradients.rows = sums.reduced(gemm.grad_input(grad_pre, up));
  return gradients;
}

Tensor device_linear_outputs(const Tensor& rows, const Tensor& matrix, const Tensor& bias,
                             const LocalPlan& plan) {
  Tensor out = GroupedGemm(plan).forward(gathered(rows, plan), matrix);
  if (bias.defined()) out.add_(by_place(bias, plan));
  return out;
}

LinearExpertGradients device_linear_backward(const Tensor& grad_y, const Tensor& rows,
                                             const Tensor& matrix, const LocalPlan& plan,
                                             bool wants_rows, bool wants_matrix, bool wants_bias) {
  const GroupedGemm gemm(plan);
  LinearExpertGradients gradients;
  if (wants_matrix) gradients.matrix = gemm.grad_weight(grad_y, gathered(rows, plan));
  if (wants_bias) gradients.bias = sum_by_expert(grad_y, plan);
  if (wants_rows) {
    gradients.rows =
        RowSums(plan, dtype_of(rows, "grouped_linear")).reduced(gemm.grad_input(grad_y, matrix));
  }
  return gradients;
}

}  // namespace perseid
