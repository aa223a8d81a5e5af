#include "gates/dselect_k_core.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gates/kernel_types.h"
#include "gates/ragged_table.h"
#include "gates/router_call.h"
#include "gates/smooth_step_gate.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

kernels::DSelectKInput kernel_input(const Tensor& logits, const Tensor& expert_map,
                                    const Tensor& valid) {
  kernels::DSelectKInput input;
  input.logits = logits.const_data_ptr();
  input.expert_map = static_cast<const int32_t*>(data_or_null(expert_map));
  input.valid = static_cast<const uint8_t*>(data_or_null(valid));  // a bool is one byte, 0 or 1
  return input;
}

void save_options(AutogradContext& ctx, const DSelectKCoreOptions& options) {
  ctx.saved_data["gamma"] = options.kernel.gamma;
  ctx.saved_data["min_weight"] = options.kernel.min_weight;
  ctx.saved_data["hard_eval"] = options.kernel.hard_eval;
  ctx.saved_data["renormalize"] = options.kernel.renormalize;
  ctx.saved_data["num_selectors"] = options.num_selectors;
  ctx.saved_data["num_valid"] = options.num_valid;
  ctx.saved_data["per_token"] = options.per_token;
}

kernels::DSelectKOptions saved_options(AutogradContext& ctx) {
  kernels::DSelectKOptions options;
  options.gamma = ctx.saved_data["gamma"].toDouble();
  options.min_weight = ctx.saved_data["min_weight"].toDouble();
  options.hard_eval = ctx.saved_data["hard_eval"].toBool();
  options.renormalize = ctx.saved_data["renormalize"].toBool();
  return options;
}

// Inputs: logits, valid, options, counts. Outputs: weights, entropy_sum, penalty_sum,
// token_offsets, expert_idx.
struct DSelectKCore : torch::autograd::Function<DSelectKCore> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& valid_in,
                               const DSelectKCoreOptions& options, SmoothStepCounts* counts) {
    const Tensor valid = or_undefined(valid_in);
    const kernels::DSelectKShape shape{logits.size(0), options.num_experts, options.num_selectors};
    const Tensor weights = at::empty({shape.num_tokens, shape.num_experts}, logits.options());
    const at::TensorOptions doubles = logits.options().dtype(at::kDouble);
    const Tensor entropy_sum = at::empty({}, doubles), penalty_sum = at::empty({}, doubles);
    kernels::DSelectKOutput output;
    output.weights = weights.mutable_data_ptr();
    output.entropy_sum = entropy_sum.mutable_data_ptr<double>();
    output.penalty_sum = penalty_sum.mutable_data_ptr<double>();
    const SmoothStepCounters counters(logits);
    output.removed_weight = counters.removed_weight();
    output.num_switches = counters.num_nodes();
    output.saturated_switches = counters.saturated_nodes();
    output.non_finite_tokens = counters.non_finite_tokens();
    kernels::dselect_k(
        shape, options.kernel, kernel_type(logits.scalar_type()),
        kernel_input(logits, options.expert_map, options.per_token ? valid : Tensor()), output,
        stream_of(logits, kDSelectKGate));

    Tensor table = weights;
    if (!options.per_token) {
      // One evaluation stands for all valid tokens.
      entropy_sum.mul_(options.num_valid);
      penalty_sum.mul_(options.num_valid);
      table = weights.expand({options.num_tokens, options.num_experts});
      if (valid.defined()) table = table.masked_fill(valid.logical_not().unsqueeze(1), 0);
    }
    const RaggedTable rows = ragged_of(table, /*with_positions=*/false);
    *counts = counters.read(options.per_token ? 1 : options.num_valid);

    ctx->save_for_backward(
        {logits, valid_in, weights, rows.token_offsets, rows.expert_idx, options.expert_map});
    ctx->mark_non_differentiable({rows.token_offsets, rows.expert_idx});
    ctx->set_materialize_grads(false);
    save_options(*ctx, options);
    return {rows.weights, entropy_sum, penalty_sum, rows.token_offsets, rows.expert_idx};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require(!c10::GradMode::is_enabled(), kDSelectKGate, "create_graph", true,
            "is not supported: the gate has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &weights = saved[2];
    const bool per_token = ctx->saved_data["per_token"].toBool();
    const at::ScalarType type = logits.scalar_type();
    const kernels::DSelectKShape shape{logits.size(0), weights.size(1),
                                       ctx->saved_data["num_selectors"].toInt()};
    Tensor grad_weights;
    if (gradients[0].defined()) {
      grad_weights = dense_of(saved[3], saved[4], gradients[0].to(type), shape.num_experts);
      if (!per_token) grad_weights = sum_of_rows(grad_weights).unsqueeze(0);
    }
    const auto grad_of_sum = [&](const Tensor& gradient) {
      const Tensor grad = dense_gradient(gradient, at::kDouble);
      return per_token || !grad.defined() ? grad : grad.mul(ctx->saved_data["num_valid"].toInt());
    };
    const Tensor grad_entropy_sum = grad_of_sum(gradients[1]);
    const Tensor grad_penalty_sum = grad_of_sum(gradients[2]);
    const auto data = [](const Tensor& sum) {
      return static_cast<const double*>(data_or_null(sum));
    };
    Tensor grad_logits = at::empty_like(logits);
    kernels::dselect_k_backward(
        shape, saved_options(*ctx), kernel_type(type),
        kernel_input(logits, saved[5], per_token ? or_undefined(saved[1]) : Tensor()),
        {weights.const_data_ptr(), data_or_null(grad_weights), data(grad_entropy_sum),
         data(grad_penalty_sum)},
        grad_logits.mutable_data_ptr(), stream_of(logits, kDSelectKGate));
    return {grad_logits, Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

DSelectKResult dselect_k_core(const Tensor& logits, const Tensor& valid,
                              const DSelectKCoreOptions& options, SmoothStepCounts& counts) {
  const variable_list outputs =
      DSelectKCore::apply(logits.contiguous(), or_empty(valid).contiguous(), options, &counts);
  return {{outputs[3], outputs[4], outputs[0], outputs[1]}, outputs[2]};
}

}  // namespace perseid::gates
