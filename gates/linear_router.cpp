#include "gates/linear_router.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gates/linear_product.h"
#include "gates/router_call.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Tensors of one call: features as products read them, the rest in the compute type.
struct Operands {
  Tensor features, weight;
};

Operands read_operands(const Tensor& features, const Tensor& weight) {
  const at::ScalarType type = router_compute_type(weight);
  const bool as_they_are = features.scalar_type() == at::kBFloat16 && type == at::kFloat;
  return {(as_they_are ? features : features.to(type)).contiguous(), weight.to(type).contiguous()};
}

Tensor form_logits(const Operands& operands, const Tensor& bias) {
  const Tensor offset =
      bias.defined() ? bias.to(operands.weight.scalar_type()).contiguous() : Tensor();
  return linear_product(operands.features, operands.weight, offset);
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

LinearRouterOptions saved_router_options(AutogradContext& ctx) {
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
  LinearWanted wanted;
  wanted.features = ctx.needs_input_grad(0);
  wanted.weight = ctx.needs_input_grad(1);
  wanted.bias = or_undefined(saved[2]).defined() && ctx.needs_input_grad(2);
  const LinearGradients gradients = linear_product_backward(
      operands.features, operands.weight, valid, grad_logits.contiguous(), wanted);
  variable_list results = {gradients.features, gradients.weight, gradients.bias};
  for (size_t i = 0; i < 3; ++i) {
    if (results[i].defined()) results[i] = results[i].to(saved[i].scalar_type());
  }
  return results;
}

struct LinearRouter : torch::autograd::Function<LinearRouter> {
  static variable_list forward(AutogradContext* ctx, const Tensor& features, const Tensor& weight,
                               const Tensor& bias, const Tensor& valid, const Tensor& expert_bias,
                               const LinearRouterOptions& options) {
    const Tensor logits = form_logits(read_operands(features, weight), or_undefined(bias));
    variable_list outputs =
        route_logits(logits, or_undefined(valid), or_undefined(expert_bias), options);
    ctx->save_for_backward({features, weight, bias, valid, outputs[kExpertIdx]});
    mark_integers(*ctx, outputs);
    save_options(*ctx, options);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require_first_derivative();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor valid = or_undefined(saved[3]);
    const Operands operands = read_operands(saved[0], saved[1]);
    const Tensor logits = form_logits(operands, or_undefined(saved[2]));
    const Tensor grad_logits =
        route_logits_backward(logits, valid, saved[4], saved_router_options(*ctx), gradients);
    variable_list results = linear_backward(*ctx, saved, operands, valid, grad_logits);
    results.resize(6);  // nothing for valid, expert_bias and options
    return results;
  }
};

struct LinearLogits : torch::autograd::Function<LinearLogits> {
  static Tensor forward(AutogradContext* ctx, const Tensor& features, const Tensor& weight,
                        const Tensor& bias, const Tensor& valid) {
    ctx->save_for_backward({features, weight, bias, valid});
    return clean_rows(form_logits(read_operands(features, weight), or_undefined(bias)),
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
    return {route_logits_backward(saved[0], or_undefined(saved[1]), saved[2],
                                  saved_router_options(*ctx), gradients),
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
