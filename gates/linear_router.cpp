#include "gates/linear_router.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gates/router_call.h"
#include "kernels/error.h"
#include "kernels/router_linear.h"

namespace perseid::gates {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Tensors of one call: features as kernels read them, the rest in the compute type.
struct Operands {
  Tensor features, weight, logits;
  kernels::RouterLinearShape shape;
  kernels::DType dtype, features_dtype;
};

Operands read_operands(const Tensor& features, const Tensor& weight) {
  const at::ScalarType type = router_compute_type(weight);
  const bool as_they_are = features.scalar_type() == at::kBFloat16 && type == at::kFloat;
  Operands operands;
  operands.features = (as_they_are ? features : features.to(type)).contiguous();
  operands.weight = weight.to(type).contiguous();
  operands.shape = {features.size(0), weight.size(0), features.size(1)};
  operands.dtype = kernel_type(type);
  operands.features_dtype = as_they_are ? kernels::DType::kBFloat16 : operands.dtype;
  return operands;
}

Operands form_logits(const Tensor& features, const Tensor& weight, const Tensor& bias) {
  const kernels::Stream stream = stream_of(features, "top_k_gate");
  Operands operands = read_operands(features, weight);
  operands.logits = at::empty({features.size(0), weight.size(0)}, operands.weight.options());
  const Tensor offset =
      bias.defined() ? bias.to(operands.weight.scalar_type()).contiguous() : Tensor();
  kernels::router_linear(operands.shape, operands.dtype, operands.features_dtype,
                         operands.features.const_data_ptr(), operands.weight.const_data_ptr(),
                         data_or_null(offset), operands.logits.mutable_data_ptr(), stream);
  return operands;
}

void require_first_derivative() {
  require(!c10::GradMode::is_enabled(), "top_k_gate", "create_graph", true,
          "is not supported: the router has no second derivative");
}

void save_options(AutogradContext& ctx, const LinearRouterOptions& options) {
  ctx.saved_data["score_function"] = static_cast<int64_t>(options.scores.score_function);
  ctx.saved_data["normalize"] = options.scores.normalize;
  ctx.saved_data["route_scale"] = options.scores.route_scale;
  ctx.saved_data["top_k"] = options.top_k;
  ctx.saved_data["score_sum"] = options.score_sum;
  ctx.saved_data["lse_square_sum"] = options.lse_square_sum;
  ctx.saved_data["score_shares"] = options.score_shares;
}

LinearRouterOptions saved_options(AutogradContext& ctx) {
  LinearRouterOptions options;
  options.scores.score_function =
      static_cast<kernels::ScoreFunction>(ctx.saved_data["score_function"].toInt());
  options.scores.normalize = ctx.saved_data["normalize"].toBool();
  options.scores.route_scale = ctx.saved_data["route_scale"].toDouble();
  options.top_k = ctx.saved_data["top_k"].toInt();
  options.score_sum = ctx.saved_data["score_sum"].toBool();
  options.lse_square_sum = ctx.saved_data["lse_square_sum"].toBool();
  options.score_shares = ctx.saved_data["score_shares"].toBool();
  return options;
}

void mark_integers(AutogradContext& ctx, const variable_list& outputs) {
  ctx.mark_non_differentiable(
      {outputs[kExpertIdx], outputs[kTokensPerExpert], outputs[kNonFinite], outputs[kEntropySum]});
  ctx.set_materialize_grads(false);
}

/// Gradients of features, weight and bias, in their types.
variable_list linear_backward(AutogradContext& ctx, const variable_list& saved,
                              const Operands& operands, const Tensor& valid,
                              const Tensor& grad_logits) {
  variable_list results(3);
  const Tensor bias = or_undefined(saved[2]);
  if (ctx.needs_input_grad(0)) results[0] = at::empty_like(operands.features);
  if (ctx.needs_input_grad(1)) results[1] = at::empty_like(operands.weight);
  if (bias.defined() && ctx.needs_input_grad(2)) {
    results[2] = at::empty({grad_logits.size(1)}, grad_logits.options());
  }
  const auto target = [&](size_t i) {
    return results[i].defined() ? results[i].mutable_data_ptr() : nullptr;
  };
  kernels::router_linear_backward(
      operands.shape, operands.dtype, operands.features_dtype, operands.features.const_data_ptr(),
      operands.weight.const_data_ptr(), static_cast<const uint8_t*>(data_or_null(valid)),
      grad_logits.contiguous().const_data_ptr(), target(0), target(1), target(2),
      stream_of(grad_logits, "top_k_gate"));
  for (size_t i = 0; i < 3; ++i) {
    if (results[i].defined()) results[i] = results[i].to(saved[i].scalar_type());
  }
  return results;
}

struct LinearRouter : torch::autograd::Function<LinearRouter> {
  static variable_list forward(AutogradContext* ctx, const Tensor& features, const Tensor& weight,
                               const Tensor& bias, const Tensor& valid, const Tensor& expert_bias,
                               const LinearRouterOptions& options) {
    const Operands operands = form_logits(features, weight, or_undefined(bias));
    variable_list outputs =
        route_logits(operands.logits, or_undefined(valid), or_undefined(expert_bias), options);
    ctx->save_for_backward({features, weight, bias, valid, outputs[kExpertIdx]});
    mark_integers(*ctx, outputs);
    save_options(*ctx, options);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require_first_derivative();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor valid = or_undefined(saved[3]);
    const Operands operands = form_logits(saved[0], saved[1], or_undefined(saved[2]));
    const Tensor grad_logits =
        route_logits_backward(operands.logits, valid, saved[4], saved_options(*ctx), gradients);
    variable_list results = linear_backward(*ctx, saved, operands, valid, grad_logits);
    results.resize(6);  // nothing for valid, expert_bias and options
    return results;
  }
};

/// Rows of tokens that are not valid may hold anything, and 0 * NaN is not 0.
Tensor clean_rows(const Tensor& rows, const Tensor& valid) {
  return valid.defined() ? rows.masked_fill(valid.logical_not().unsqueeze(1), 0) : rows;
}

struct LinearLogits : torch::autograd::Function<LinearLogits> {
  static Tensor forward(AutogradContext* ctx, const Tensor& features, const Tensor& weight,
                        const Tensor& bias, const Tensor& valid) {
    ctx->save_for_backward({features, weight, bias, valid});
    return clean_rows(form_logits(features, weight, or_undefined(bias)).logits,
                      or_undefined(valid));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require_first_derivative();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor valid = or_undefined(saved[3]);
    const at::ScalarType type = router_compute_type(saved[1]);
    const Operands operands = read_operands(saved[0], saved[1]);
    const Tensor grad_logits = clean_rows(gradients[0].to(type).contiguous(), valid);
    variable_list results = linear_backward(*ctx, saved, operands, valid, grad_logits);
    results.resize(4);
    return results;
  }
};

struct LogitRouter : torch::autograd::Function<LogitRouter> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& valid,
                               const LinearRouterOptions& options) {
    const Tensor rows = logits.contiguous();
    variable_list outputs = route_logits(rows, or_undefined(valid), {}, options);
    ctx->save_for_backward({rows, valid, outputs[kExpertIdx]});
    mark_integers(*ctx, outputs);
    save_options(*ctx, options);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require_first_derivative();
    const variable_list saved = ctx->get_saved_variables();
    return {route_logits_backward(saved[0], or_undefined(saved[1]), saved[2], saved_options(*ctx),
                                  gradients),
            Tensor(), Tensor()};
  }
};

}  // namespace

at::ScalarType router_compute_type(const Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

LinearRouterOutput linear_router(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                 const Tensor& valid, const LinearRouterOptions& options,
                                 const Tensor& expert_bias) {
  return router_output(
      LinearRouter::apply(features, weight, or_empty(bias), or_empty(valid).contiguous(),
                          or_empty(expert_bias).contiguous(), options),
      options);
}

Tensor linear_logits(const Tensor& features, const Tensor& weight, const Tensor& bias,
                     const Tensor& valid) {
  return LinearLogits::apply(features, weight, or_empty(bias), or_empty(valid).contiguous());
}

LinearRouterOutput logit_router(const Tensor& logits, const Tensor& valid,
                                const LinearRouterOptions& options) {
  return router_output(LogitRouter::apply(logits, or_empty(valid).contiguous(), options), options);
}

}  // namespace perseid::gates
