#include "gates/statistical_top_k_gate.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "gates/fixed_gate.h"
#include "gates/gate_parts.h"
#include "gates/kernel_types.h"
#include "gates/linear_router.h"
#include "gates/losses.h"
#include "gates/router_call.h"
#include "kernels/error.h"
#include "kernels/statistical_top_k.h"

namespace perseid::gates {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kStatisticalTopKGate = "statistical_top_k_gate";

// Inputs: logits [T, E], valid, K, options, count of tokens that are not finite. Output: weights.
struct Threshold : torch::autograd::Function<Threshold> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& valid,
                        int64_t top_k, const kernels::StatisticalTopKOptions& options,
                        const Tensor& non_finite_tokens) {
    const Tensor weights = at::empty_like(logits);
    kernels::statistical_top_k(
        {logits.size(0), logits.size(1), top_k}, options, kernel_type(logits.scalar_type()),
        logits.const_data_ptr(), static_cast<const uint8_t*>(data_or_null(or_undefined(valid))),
        weights.mutable_data_ptr(), non_finite_tokens.mutable_data_ptr<int64_t>(),
        stream_of(logits, kStatisticalTopKGate));
    ctx->save_for_backward({logits, valid, weights});
    ctx->saved_data["top_k"] = top_k;
    ctx->saved_data["unbiased"] = options.unbiased;
    ctx->saved_data["detach_threshold"] = options.detach_threshold;
    ctx->saved_data["min_experts"] = options.min_experts;
    ctx->saved_data["cap"] = options.cap;
    return weights;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    require(!c10::GradMode::is_enabled(), kStatisticalTopKGate, "create_graph", true,
            "is not supported: the gate has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &weights = saved[2];
    kernels::StatisticalTopKOptions options;
    options.unbiased = ctx->saved_data["unbiased"].toBool();
    options.detach_threshold = ctx->saved_data["detach_threshold"].toBool();
    options.min_experts = ctx->saved_data["min_experts"].toInt();
    options.cap = ctx->saved_data["cap"].toInt();
    Tensor grad_logits = at::empty_like(logits);
    kernels::statistical_top_k_backward(
        {logits.size(0), logits.size(1), ctx->saved_data["top_k"].toInt()}, options,
        kernel_type(logits.scalar_type()), logits.const_data_ptr(),
        static_cast<const uint8_t*>(data_or_null(or_undefined(saved[1]))), weights.const_data_ptr(),
        dense_gradient(gradients[0], logits.scalar_type()).const_data_ptr(),
        grad_logits.mutable_data_ptr(), stream_of(logits, kStatisticalTopKGate));
    return {grad_logits, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

StatisticalTopKGate::StatisticalTopKGate(const StatisticalTopKGateOptions& options)
    : Gate(kStatisticalTopKGate, options.num_experts(), options.top_k()), options_(options) {
  const int64_t E = options.num_experts(), K = options.top_k();
  require_d_model(kStatisticalTopKGate, options.d_model());
  require(K < E || E == 1, kStatisticalTopKGate, "top_k", K,
          "is num_experts, and no threshold lets all experts pass; choose top_k in [1, " +
              to_text(E - 1) + "], or DenseGate");
  require(options.min_experts() == 0 || options.min_experts() == 1, kStatisticalTopKGate,
          "min_experts", options.min_experts(),
          "is neither 0, for tokens without expert, nor 1, for the largest logit");
  require(options.cap() >= 0, kStatisticalTopKGate, "cap", options.cap(),
          "is negative; choose the most experts of a token, or 0 for no bound");
  require_coefficient(kStatisticalTopKGate, "balance_coeff", options.balance_coeff());
  if (E == 1) return;
  weight = register_parameter("weight", router_weight(E, options.d_model(), options.seed(),
                                                      options.layer_id(), options.gate_id()));
}

GateOutput StatisticalTopKGate::forward(const GateInput& input) {
  GateOutput output;
  if (num_experts() == 1) {
    gates::validate(input, options_.d_model(), kStatisticalTopKGate);
    output = one_expert_per_token(
        input, at::zeros({input.tokens.size(0)}, input.tokens.options().dtype(at::kInt)), 1);
  } else {
    require_input(input, weight, kStatisticalTopKGate);
    const Tensor valid = input.valid.value_or(Tensor());
    const Tensor logits =
        linear_logits(router_features(input, options_.input_norm(), weight), weight, {}, valid);
    kernels::StatisticalTopKOptions kernel;
    kernel.unbiased = options_.unbiased();
    kernel.detach_threshold = options_.detach_threshold();
    kernel.min_experts = options_.min_experts();
    kernel.cap = options_.cap();
    const Tensor non_finite_tokens = at::zeros({}, logits.options().dtype(at::kLong));
    output.routing = routing_from_dense(
        Threshold::apply(logits, or_empty(valid).contiguous(), top_k(), kernel, non_finite_tokens));
    output.stats = count_assignments(output.routing, num_experts(), count_valid(input));
    output.stats.non_finite_tokens = non_finite_tokens.item<int64_t>();
  }
  if (options_.balance_coeff() > 0) {
    output.global_losses.push_back(balance_entropy_loss(
        weight_per_expert(output.routing, num_experts()), options_.balance_coeff()));
  }
  return output;
}

}  // namespace perseid::gates
