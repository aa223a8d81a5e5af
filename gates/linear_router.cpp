#include "gates/linear_router.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

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

/// Options as a graph keeps them.
struct KeptOptions : torch::CustomClassHolder {
  explicit KeptOptions(const LinearRouterOptions& options_in) : options(options_in) {}
  LinearRouterOptions options;
};

void save_options(AutogradContext& ctx, const LinearRouterOptions& options) {
  ctx.saved_data["options"] = c10::IValue::make_capsule(c10::make_intrusive<KeptOptions>(options));
}
LinearRouterOptions saved_router_options(AutogradContext& ctx) {
  const auto kept = ctx.saved_data["options"].toCapsule();
  return c10::static_intrusive_pointer_cast<KeptOptions>(kept)->options;
}

/// The outputs of a function of the graph: only what has a gradient passes through it.
variable_list as_outputs(AutogradContext& ctx, LinearRouterOutput& routed) {
  ctx.set_materialize_grads(false);
  variable_list outputs;
  for (const Tensor* tensor : differentiable(routed)) outputs.push_back(*tensor);
  return outputs;
}
/// `routed` with the outputs that have a graph.
LinearRouterOutput with_graph(LinearRouterOutput routed, const variable_list& outputs) {
  auto next = outputs.begin();
  for (Tensor* tensor : differentiable(routed)) *tensor = *next++;
  return routed;
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
                               const LinearRouterOptions& options, LinearRouterOutput* routed) {
    const Tensor logits = form_logits(read_operands(features, weight), or_undefined(bias));
    *routed = route_logits(logits, or_undefined(valid), or_undefined(expert_bias), options);
    ctx->save_for_backward({features, weight, bias, valid, routed->expert_idx});
    save_options(*ctx, options);
    return as_outputs(*ctx, *routed);
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
    results.resize(7);  // nothing for valid, expert_bias, options and routed
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
                               const LinearRouterOptions& options, LinearRouterOutput* routed) {
    const Tensor rows = logits.contiguous();
    *routed = route_logits(rows, or_undefined(valid), {}, options);
    ctx->save_for_backward({rows, valid, routed->expert_idx});
    save_options(*ctx, options);
    return as_outputs(*ctx, *routed);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require_first_derivative();
    const variable_list saved = ctx->get_saved_variables();
    return {route_logits_backward(saved[0], or_undefined(saved[1]), saved[2],
                                  saved_router_options(*ctx), gradients),
            Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

at::ScalarType router_compute_type(const Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

LinearRouterOutput linear_router(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                 const Tensor& valid, const LinearRouterOptions& options,
                                 const Tensor& expert_bias) {
  LinearRouterOutput routed;
  const variable_list outputs =
      LinearRouter::apply(features, weight, or_empty(bias), or_empty(valid).contiguous(),
                          or_empty(expert_bias).contiguous(), options, &routed);
  return with_graph(std::move(routed), outputs);
}

Tensor linear_logits(const Tensor& features, const Tensor& weight, const Tensor& bias,
                     const Tensor& valid) {
  return LinearLogits::apply(features, weight, or_empty(bias), or_empty(valid).contiguous());
}

LinearRouterOutput logit_router(const Tensor& logits, const Tensor& valid,
                                const LinearRouterOptions& options) {
  LinearRouterOutput routed;
  const variable_list outputs =
      LogitRouter::apply(logits, or_empty(valid).contiguous(), options, &routed);
  return with_graph(std::move(routed), outputs);
}

}  // namespace perseid::gates
