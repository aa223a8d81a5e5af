#include "gates/comet_core.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gates/comet_logits.h"
#include "gates/kernel_types.h"
#include "gates/linear_router.h"
#include "gates/ragged_table.h"
#include "gates/router_call.h"
#include "gates/smooth_step_gate.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

kernels::CometInput kernel_input(const Tensor& splits, const Tensor& leaves,
                                 const Tensor& expert_map, const Tensor& valid) {
  kernels::CometInput input;
  input.split_logits = splits.const_data_ptr();
  input.leaf_logits = leaves.const_data_ptr();
  input.expert_map = static_cast<const int32_t*>(data_or_null(expert_map));
  input.valid = static_cast<const uint8_t*>(data_or_null(valid));  // a bool is one byte, 0 or 1
  return input;
}

// Inputs: features, four parameters, valid, options, counts. Outputs: weights, entropy_sum,
// token_offsets, expert_idx.
struct CometCore : torch::autograd::Function<CometCore> {
  static variable_list forward(AutogradContext* ctx, const Tensor& features,
                               const Tensor& split_weight, const Tensor& split_bias,
                               const Tensor& leaf_weight, const Tensor& leaf_bias,
                               const Tensor& valid_in, const CometCoreOptions& options,
                               SmoothStepCounts* counts) {
    const bool is_static = split_weight.numel() == 0;
    const at::ScalarType type = router_compute_type(split_bias);
    const Tensor valid = valid_in.numel() > 0 ? valid_in : Tensor();
    const CometLogits logits =
        is_static ? CometLogits{split_bias.to(type).unsqueeze(0), leaf_bias.to(type).unsqueeze(0)}
                  : comet_logits(features, {split_weight, split_bias, leaf_weight, leaf_bias},
                                 valid, options);
    const Tensor &splits = logits.splits, &leaves = logits.leaves;
    const kernels::CometShape shape{splits.size(0), options.num_experts, options.num_trees};
    const kernels::Stream stream = stream_of(splits, kCometGate);

    const Tensor weights = at::empty({shape.num_tokens, shape.num_experts}, splits.options());
    const Tensor entropy_sum = at::empty({}, splits.options().dtype(at::kDouble));
    kernels::CometOutput output;
    output.weights = weights.mutable_data_ptr();
    output.entropy_sum = entropy_sum.mutable_data_ptr<double>();
    const SmoothStepCounters counters(splits);
    output.removed_weight = counters.removed_weight();
    output.reached_nodes = counters.num_nodes();
    output.saturated_nodes = counters.saturated_nodes();
    output.non_finite_tokens = counters.non_finite_tokens();
    kernels::comet(shape, options.kernel, kernel_type(type),
                   kernel_input(splits, leaves, options.expert_map, is_static ? Tensor() : valid),
                   output, stream);

    Tensor table = weights;
    if (is_static) {
      // One evaluation stands for all valid tokens.
      entropy_sum.mul_(options.num_valid);
      table = weights.expand({options.num_tokens, options.num_experts});
      if (valid.defined()) table = table.masked_fill(valid.logical_not().unsqueeze(1), 0);
    }
    const RaggedTable rows = ragged_of(table, /*with_positions=*/false);
    *counts = counters.read(is_static ? options.num_valid : 1);

    ctx->save_for_backward({features, split_weight, leaf_weight, valid_in, splits, leaves, weights,
                            rows.token_offsets, rows.expert_idx, options.expert_map});
    ctx->mark_non_differentiable({rows.token_offsets, rows.expert_idx});
    ctx->set_materialize_grads(false);
    ctx->saved_data["gamma"] = options.kernel.gamma;
    ctx->saved_data["min_weight"] = options.kernel.min_weight;
    ctx->saved_data["hard_eval"] = options.kernel.hard_eval;
    ctx->saved_data["descent"] = static_cast<int64_t>(options.descent);
    ctx->saved_data["num_trees"] = options.num_trees;
    ctx->saved_data["num_valid"] = options.num_valid;
    ctx->saved_data["parameter_type"] = static_cast<int64_t>(split_bias.scalar_type());
    return {rows.weights, entropy_sum, rows.token_offsets, rows.expert_idx};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require(!c10::GradMode::is_enabled(), kCometGate, "create_graph", true,
            "is not supported: the gate has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &features = saved[0], &split_weight = saved[1], &leaf_weight = saved[2];
    const Tensor &splits = saved[4], &leaves = saved[5], &weights = saved[6];
    const Tensor valid = saved[3].numel() > 0 ? saved[3] : Tensor();
    const bool is_static = split_weight.numel() == 0;
    const at::ScalarType type = splits.scalar_type();
    const auto parameter_type =
        static_cast<at::ScalarType>(ctx->saved_data["parameter_type"].toInt());
    const auto descent = static_cast<Descent>(ctx->saved_data["descent"].toInt());
    const kernels::CometShape shape{splits.size(0), weights.size(1),
                                    ctx->saved_data["num_trees"].toInt()};
    kernels::CometOptions options;
    options.gamma = ctx->saved_data["gamma"].toDouble();
    options.min_weight = ctx->saved_data["min_weight"].toDouble();
    options.hard_eval = ctx->saved_data["hard_eval"].toBool();

    Tensor grad_weights;
    if (gradients[0].defined()) {
      grad_weights = dense_of(saved[7], saved[8], gradients[0].to(type), shape.num_experts);
      if (is_static) grad_weights = sum_of_rows(grad_weights).unsqueeze(0);
    }
    Tensor grad_entropy_sum = dense_gradient(gradients[1], at::kDouble);
    if (is_static && grad_entropy_sum.defined()) {
      grad_entropy_sum = grad_entropy_sum.mul(ctx->saved_data["num_valid"].toInt());
    }
    const Tensor grad_splits = at::empty_like(splits), grad_leaves = at::empty_like(leaves);
    kernels::comet_backward(shape, options, kernel_type(type),
                            kernel_input(splits, leaves, saved[9], is_static ? Tensor() : valid),
                            {weights.const_data_ptr(), data_or_null(grad_weights),
                             static_cast<const double*>(data_or_null(grad_entropy_sum))},
                            grad_splits.mutable_data_ptr(), grad_leaves.mutable_data_ptr(),
                            stream_of(splits, kCometGate));

    // Gradients in the order of the inputs of forward, in their types.
    variable_list results(8);
    if (is_static) {
      results[2] = grad_splits.squeeze(0).to(parameter_type);
      results[4] = grad_leaves.squeeze(0).to(parameter_type);
      return results;
    }
    if (ctx->needs_input_grad(0)) {
      results[0] = grad_of_features(grad_splits, split_weight.to(type), descent)
                       .add_(grad_of_features(grad_leaves, leaf_weight.to(type), descent));
    }
    results[1] = grad_of_weight(grad_splits, features, descent).to(parameter_type);
    results[2] = sum_of_rows(grad_splits).to(parameter_type);
    results[3] = grad_of_weight(grad_leaves, features, descent).to(parameter_type);
    results[4] = sum_of_rows(grad_leaves).to(parameter_type);
    return results;
  }
};

}  // namespace

SmoothStepResult comet_core(const Tensor& features, const CometParameters& parameters,
                            const Tensor& valid, const CometCoreOptions& options,
                            SmoothStepCounts& counts) {
  const variable_list outputs =
      CometCore::apply(or_empty(features), or_empty(parameters.split_weight), parameters.split_bias,
                       or_empty(parameters.leaf_weight), parameters.leaf_bias,
                       or_empty(valid).contiguous(), options, &counts);
  return {outputs[2], outputs[3], outputs[0], outputs[1]};
}

}  // namespace perseid::gates
