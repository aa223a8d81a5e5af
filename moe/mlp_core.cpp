#include "moe/mlp_core.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "gates/device.h"
#include "kernels/error.h"
#include "moe/device_experts.h"
#include "moe/grouped_rows.h"
#include "moe/products.h"
#include "moe/segments.h"
#include "moe/sparse_pre.h"
#include "moe/tensor_types.h"
#include "moe/trace.h"

namespace perseid {

namespace {

void require_on_cpu(MlpKind kind, const at::Tensor& rows) {
  require(kind.sparsity.kind == ActivationSparsityKind::kNone || !gates::is_on_device(rows),
          "grouped_mlp", "activation_sparsity", name_of(kind.sparsity.kind),
          "is for the CPU only, but rows are on " + to_text(rows.device()) + "; choose none");
}

}  // namespace

MlpOutput mlp_forward(const at::Tensor& rows, const at::Tensor& weights,
                      const MlpParameters& parameters, MlpKind kind, const LocalPlan& plan) {
  const Trace trace("perseid::experts");
  require_on_cpu(kind, rows);
  if (gates::is_on_device(rows)) return device_mlp_forward(rows, weights, parameters, kind, plan);
  const at::Tensor &up = parameters.up, &down = parameters.down;
  const kernels::DType dtype = dtype_of(rows, "grouped_mlp");
  const int64_t d_ff = down.size(2);
  const at::Tensor row_of = plan.row_of_sorted();
  const bool weight_inside = weights.size(1) == 1;
  const at::Tensor sorted = weight_inside ? to_sorted(weights, plan) : at::Tensor();
  const at::Tensor pre = at::empty({plan.num_assignments, up.size(1)}, rows.options());
  const at::Tensor out = at::empty({plan.num_assignments, down.size(1)}, rows.options());

  const auto run = [&](const Segment& segment, Scratch& scratch) {
    const int64_t n = segment.num_rows(), e = segment.expert;
    const SegmentRows x(rows, row_of, segment, scratch, 0);
    const at::Tensor pre_rows = pre.narrow(0, segment.begin, n);
    multiply(pre_rows, x, up.select(0, e).t(), expert_part(parameters.up_bias, e), scratch);
    const SparsePre used(pre_rows, d_ff, kind.sparsity);
    const at::Tensor scale = weight_inside ? sorted.narrow(0, segment.begin, n) : at::Tensor();
    at::Tensor act = scratch.rows(1, n, d_ff, rows.options());
    kernels::activation_forward({n, d_ff, kind.activation, kind.gated}, dtype, data_of(used.rows()),
                                data_of(scale), mutable_data_of(act));
    const at::Tensor y = out.narrow(0, segment.begin, n);
    multiply(y, SegmentRows(act), down.select(0, e).t(),
             weight_inside ? at::Tensor() : expert_part(parameters.down_bias, e), scratch);
    if (weight_inside && parameters.down_bias.defined()) {
      y.addmm_(scale.to(y.scalar_type()), parameters.down_bias.narrow(0, e, 1));
    }
  };
  for_each_segment(make_segments(plan), run);
  return {RowSums(plan, dtype).reduced(out, weight_inside ? at::Tensor() : weights), pre};
}

namespace {

/// The gradients of stacked parameters while they are formed.
struct StackedGradients {
  StackedGradients(const MlpParameters& parameters, const MlpWanted& wanted,
                   const std::vector<Segment>& segments)
      : up(wanted_gradient(wanted.up, parameters.up, segments)),
        up_bias(wanted_gradient(wanted.up_bias, parameters.up_bias, segments)),
        down(wanted_gradient(wanted.down, parameters.down, segments)),
        down_bias(wanted_gradient(wanted.down_bias, parameters.down_bias, segments)) {}
  StackedGradient up, up_bias, down, down_bias;
};

/// Gradient of down_bias and the part of it in grad_scale, undefined if not wanted. The bias is
/// scaled by the weights as all of an expert's output is.
void down_bias_backward(const SegmentRows& grad_y, const at::Tensor& scale, const at::Tensor& bias,
                        const Segment& segment, const StackedGradient& grad_bias,
                        const at::Tensor& grad_scale) {
  if (grad_scale.defined()) grad_scale.add_(at::mv(grad_y.gathered(), bias).unsqueeze(1));
  if (grad_bias.wanted()) {
    const at::Tensor weights = scale.select(1, 0).to(grad_y.source().scalar_type());
    grad_bias.part(segment).copy_(at::mv(grad_y.gathered().t(), weights));
  }
}

}  // namespace

MlpGradients mlp_backward(const at::Tensor& grad_out, const at::Tensor& rows,
                          const at::Tensor& weights, const MlpParameters& parameters,
                          const at::Tensor& pre, MlpKind kind, const LocalPlan& plan,
                          const MlpWanted& wanted) {
  const Trace trace("perseid::experts_backward");
  if (gates::is_on_device(rows)) {
    return device_mlp_backward(grad_out, rows, weights, parameters, pre, kind, plan, wanted);
  }
  const at::Tensor &up = parameters.up, &down = parameters.down, &down_bias = parameters.down_bias;
  const kernels::DType dtype = dtype_of(rows, "grouped_mlp");
  const int64_t d_ff = down.size(2), d_out = down.size(1);
  const bool weight_inside = weights.size(1) == 1;
  const at::Tensor row_of = plan.row_of_sorted();
  const at::Tensor sorted = weight_inside ? to_sorted(weights, plan) : at::Tensor();
  const RowSums sums(plan, dtype);
  const at::Tensor grad_y = weight_inside ? at::Tensor() : sums.expanded(grad_out, weights, d_out);
  at::Tensor grad_sorted = weight_inside && wanted.weights ? at::empty_like(sorted) : at::Tensor();
  at::Tensor y_all = !weight_inside && wanted.weights
                         ? at::empty({plan.num_assignments, d_out}, rows.options())
                         : at::Tensor();
  at::Tensor grad_x =
      wanted.rows ? at::empty({plan.num_assignments, rows.size(1)}, rows.options()) : at::Tensor();

  const std::vector<Segment> segments = make_segments(plan);
  StackedGradients stacked(parameters, wanted, segments);

  const auto run = [&](const Segment& segment, Scratch& scratch) {
    const int64_t n = segment.num_rows(), e = segment.expert;
    const at::Tensor pre_rows = pre.narrow(0, segment.begin, n);
    const SegmentRows g = weight_inside ? SegmentRows(grad_out, row_of, segment, scratch, 0)
                                        : SegmentRows(grad_y.narrow(0, segment.begin, n));
    const at::Tensor scale = weight_inside ? sorted.narrow(0, segment.begin, n) : at::Tensor();
    at::Tensor grad_act = scratch.rows(1, n, d_ff, rows.options());
    multiply(grad_act, g, down.select(0, e), {}, scratch);
    at::Tensor grad_pre = scratch.rows(2, n, up.size(1), rows.options());
    at::Tensor grad_scale =
        grad_sorted.defined() ? grad_sorted.narrow(0, segment.begin, n) : at::Tensor();
    const SparsePre used(pre_rows, d_ff, kind.sparsity);
    kernels::activation_backward({n, d_ff, kind.activation, kind.gated}, dtype,
                                 data_of(used.rows()), data_of(scale), data_of(grad_act),
                                 mutable_data_of(grad_pre), mutable_data_of(grad_act),
                                 mutable_data_of(grad_scale));
    used.backward(grad_pre);
    const at::Tensor& act = grad_act;  // now weights * act(pre)
    if (stacked.down.wanted()) {
      multiply_transposed(stacked.down.part(segment), g, SegmentRows(act), scratch);
    }
    if (weight_inside && down_bias.defined()) {
      down_bias_backward(g, scale, down_bias.select(0, e), segment, stacked.down_bias, grad_scale);
    } else if (stacked.down_bias.wanted()) {
      stacked.down_bias.part(segment).copy_(g.gathered().sum(0));
    }
    if (y_all.defined()) {
      multiply(y_all.narrow(0, segment.begin, n), SegmentRows(act), down.select(0, e).t(),
               expert_part(down_bias, e), scratch);
    }
    if (stacked.up.wanted()) {
      multiply_transposed(stacked.up.part(segment), SegmentRows(grad_pre),
                          SegmentRows(rows, row_of, segment, scratch, 3), scratch);
    }
    if (stacked.up_bias.wanted()) stacked.up_bias.part(segment).copy_(grad_pre.sum(0));
    if (wanted.rows) {
      multiply(grad_x.narrow(0, segment.begin, n), SegmentRows(grad_pre), up.select(0, e), {},
               scratch);
    }
  };
  for_each_segment(segments, run);

  at::Tensor grad_weights;
  if (grad_sorted.defined()) grad_weights = from_sorted(grad_sorted, plan);
  if (y_all.defined()) grad_weights = sums.weight_gradient(grad_out, y_all, weights);
  return {wanted.rows ? sums.reduced(grad_x) : at::Tensor(),
          grad_weights,
          stacked.up.finish(),
          stacked.up_bias.finish(),
          stacked.down.finish(),
          stacked.down_bias.finish()};
}

at::Tensor mlp_active_hidden(const at::Tensor& rows, const MlpParameters& parameters, MlpKind kind,
                             const LocalPlan& plan) {
  require(!gates::is_on_device(rows), "active_hidden", "rows", to_text(rows.device()),
          "is not on the CPU; copy rows and experts there");
  const at::Tensor &up = parameters.up, &down = parameters.down;
  const kernels::DType dtype = dtype_of(rows, "grouped_mlp");
  const int64_t d_ff = down.size(2);
  const at::Tensor row_of = plan.row_of_sorted();
  const std::vector<Segment> segments = make_segments(plan);
  const at::Tensor of_place = at::empty({plan.num_assignments}, at::kLong);
  for_each_segment(segments, [&](const Segment& segment, Scratch& scratch) {
    const int64_t n = segment.num_rows(), e = segment.expert;
    const at::Tensor pre = scratch.rows(1, n, up.size(1), rows.options());
    multiply(pre, SegmentRows(rows, row_of, segment, scratch, 0), up.select(0, e).t(),
             expert_part(parameters.up_bias, e), scratch);
    const SparsePre used(pre, d_ff, kind.sparsity);
    const at::Tensor act = scratch.rows(2, n, d_ff, rows.options());
    kernels::activation_forward({n, d_ff, kind.activation, kind.gated}, dtype, data_of(used.rows()),
                                nullptr, mutable_data_of(act));
    of_place.narrow(0, segment.begin, n).copy_(act.ne(0).sum(1));
  });
  at::Tensor active = at::zeros({up.size(0)}, at::kLong);
  for (const Segment& segment : segments) {
    active[segment.expert] += of_place.narrow(0, segment.begin, segment.num_rows()).sum();
  }
  return active;
}

}  // namespace perseid
