#include "gates/linear_router.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gates/block_product.h"
#include "gates/kernel_types.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Tensors of one call in the compute type.
struct Operands {
  Tensor features, weight, logits;
};

Operands form_logits(const Tensor& features, const Tensor& weight, const Tensor& bias) {
  const at::ScalarType type = router_compute_type(weight);
  Operands operands{features.to(type).contiguous(), weight.to(type), {}};
  operands.logits = multiply_in_blocks(operands.features, operands.weight.t(), 0);
  if (bias.defined()) operands.logits.add_(bias.to(type));
  return operands;
}

// An autograd function takes no undefined tensor: what is absent travels as an empty one.
Tensor or_empty(const Tensor& tensor) {
  return tensor.defined() ? tensor : at::empty({0}, at::kFloat);
}
Tensor or_undefined(const Tensor& tensor) { return tensor.numel() > 0 ? tensor : Tensor(); }

kernels::RouterInput kernel_input(const Tensor& logits, const Tensor& valid) {
  kernels::RouterInput input;
  input.logits = logits.const_data_ptr();
  input.valid = static_cast<const uint8_t*>(data_or_null(valid));  // a bool is one byte, 0 or 1
  return input;
}

// Inputs: features, weight, bias, valid, options. Outputs: weights, expert_idx, tokens_per_expert,
// non_finite_tokens, then score_sum and lse_square_sum as far as they are asked for.
struct LinearRouter : torch::autograd::Function<LinearRouter> {
  static variable_list forward(AutogradContext* ctx, const Tensor& features, const Tensor& weight,
                               const Tensor& bias_in, const Tensor& valid_in,
                               const LinearRouterOptions& options) {
    const Tensor bias = or_undefined(bias_in), valid = or_undefined(valid_in);
    const kernels::Stream stream = stream_of(features, "top_k_gate");
    const Operands operands = form_logits(features, weight, bias);
    const kernels::RouterShape shape{features.size(0), weight.size(0), options.top_k};
    const at::TensorOptions real = operands.logits.options();
    const int64_t num_slots = shape.num_tokens * shape.top_k;
    variable_list outputs = {at::empty({num_slots}, real),
                             at::empty({num_slots}, real.dtype(at::kInt)),
                             at::empty({shape.num_experts}, real.dtype(at::kLong)),
                             at::empty({}, real.dtype(at::kLong))};
    kernels::RouterOutput output;
    output.weights = outputs[0].mutable_data_ptr();
    output.expert_idx = outputs[1].mutable_data_ptr<int32_t>();
    output.tokens_per_expert = outputs[2].mutable_data_ptr<int64_t>();
    output.non_finite_tokens = outputs[3].mutable_data_ptr<int64_t>();
    if (options.score_sum) {
      outputs.push_back(at::empty({shape.num_experts}, real));
      output.score_sum = outputs.back().mutable_data_ptr();
    }
    if (options.lse_square_sum) {
      outputs.push_back(at::empty({}, real));
      output.lse_square_sum = outputs.back().mutable_data_ptr();
    }
    kernels::route(shape, options.scores, kernel_type(operands.logits.scalar_type()),
                   kernel_input(operands.logits, valid), output, stream);

    ctx->save_for_backward({features, weight, bias_in, valid_in, outputs[1]});
    ctx->mark_non_differentiable({outputs[1], outputs[2], outputs[3]});
    ctx->set_materialize_grads(false);
    ctx->saved_data["score_function"] = static_cast<int64_t>(options.scores.score_function);
    ctx->saved_data["normalize"] = options.scores.normalize;
    ctx->saved_data["route_scale"] = options.scores.route_scale;
    ctx->saved_data["score_sum"] = options.score_sum;
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require(!c10::GradMode::is_enabled(), "top_k_gate", "create_graph", true,
            "is not supported: the router has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor bias = or_undefined(saved[2]), valid = or_undefined(saved[3]);
    const Tensor& expert_idx = saved[4];
    const Operands operands = form_logits(saved[0], saved[1], bias);
    const at::ScalarType type = operands.logits.scalar_type();
    const int64_t num_tokens = operands.logits.size(0);
    const int64_t num_experts = operands.logits.size(1);
    const int64_t top_k = num_tokens == 0 ? 1 : expert_idx.size(0) / num_tokens;
    const bool has_score_sum = ctx->saved_data["score_sum"].toBool();
    const size_t lse_slot = has_score_sum ? 5 : 4;

    const Tensor grad_weights = dense_gradient(gradients[0], type);
    const Tensor grad_score_sum = has_score_sum ? dense_gradient(gradients[4], type) : Tensor();
    const Tensor grad_lse_square_sum =
        lse_slot < gradients.size() ? dense_gradient(gradients[lse_slot], type) : Tensor();
    kernels::RouterGradInput grad;
    grad.expert_idx = expert_idx.const_data_ptr<int32_t>();
    grad.grad_weights = data_or_null(grad_weights);
    grad.grad_score_sum = data_or_null(grad_score_sum);
    grad.grad_lse_square_sum = data_or_null(grad_lse_square_sum);
    kernels::RouterOptions scores;
    scores.score_function =
        static_cast<kernels::ScoreFunction>(ctx->saved_data["score_function"].toInt());
    scores.normalize = ctx->saved_data["normalize"].toBool();
    scores.route_scale = ctx->saved_data["route_scale"].toDouble();
    const Tensor grad_logits = at::empty({num_tokens, num_experts}, operands.logits.options());
    kernels::route_backward({num_tokens, num_experts, top_k}, scores, kernel_type(type),
                            kernel_input(operands.logits, valid), grad,
                            grad_logits.mutable_data_ptr(), stream_of(grad_logits, "top_k_gate"));

    // Gradients in the order of the inputs of forward, in their types.
    variable_list results(5);
    if (ctx->needs_input_grad(0)) {
      results[0] = multiply_in_blocks(grad_logits, operands.weight, 0).to(saved[0].scalar_type());
    }
    if (ctx->needs_input_grad(1)) {
      // Tokens that are not valid may hold anything, and 0 * NaN is not 0.
      const Tensor features =
          valid.defined() ? operands.features.masked_fill(valid.logical_not().unsqueeze(1), 0)
                          : operands.features;
      results[1] = multiply_in_blocks(grad_logits.t(), features, 1).to(saved[1].scalar_type());
    }
    if (bias.defined() && ctx->needs_input_grad(2)) {
      const Tensor ones = at::ones({1, num_tokens}, grad_logits.options());
      results[2] = multiply_in_blocks(ones, grad_logits, 1).reshape({-1}).to(bias.scalar_type());
    }
    return results;
  }
};

}  // namespace

at::ScalarType router_compute_type(const Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

LinearRouterOutput linear_router(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                 const Tensor& valid, const LinearRouterOptions& options) {
  const variable_list outputs =
      LinearRouter::apply(features, weight, or_empty(bias), or_empty(valid).contiguous(), options);
  LinearRouterOutput output;
  output.weights = outputs[0];
  output.expert_idx = outputs[1];
  output.tokens_per_expert = outputs[2];
  output.non_finite_tokens = outputs[3].item<int64_t>();
  if (options.score_sum) output.score_sum = outputs[4];
  if (options.lse_square_sum) output.lse_square_sum = outputs[options.score_sum ? 5 : 4];
  return output;
}

}  // namespace perseid::gates
