#include "gates/router_call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>

#include "gates/linear_product.h"
#include "kernels/error.h"

namespace perseid::gates {
namespace {

using at::Tensor;

kernels::RouterInput kernel_input(const Tensor& logits, const Tensor& valid,
                                  const Tensor& expert_bias) {
  kernels::RouterInput input;
  input.logits = logits.const_data_ptr();
  input.valid = static_cast<const uint8_t*>(data_or_null(valid));  // a bool is one byte, 0 or 1
  input.expert_bias = static_cast<const float*>(data_or_null(expert_bias));
  return input;
}

}  // namespace

Tensor or_empty(const Tensor& tensor) {
  static const Tensor* const none = [] {
    const c10::InferenceMode off(false);  // a graph may keep it
    return new Tensor(at::empty({0}, at::kFloat));
  }();
  return tensor.defined() ? tensor : *none;
}
Tensor or_undefined(const Tensor& tensor) { return tensor.numel() > 0 ? tensor : Tensor(); }

Tensor sum_of_rows(const Tensor& rows) {
  return linear_product_backward({}, {}, {}, rows, {.bias = true}).bias;
}

LinearRouterOutput route_logits(const Tensor& logits, const Tensor& valid,
                                const Tensor& expert_bias, const LinearRouterOptions& options) {
  const kernels::Stream stream = stream_of(logits, "top_k_gate");
  const kernels::RouterShape shape{logits.size(0), logits.size(1), options.top_k};
  const at::TensorOptions real = logits.options();
  const int64_t num_slots = shape.num_tokens * shape.top_k;
  LinearRouterOutput list;
  list.weights = at::empty({num_slots}, real);
  list.expert_idx = at::empty({num_slots}, real.dtype(at::kInt));
  list.tokens_per_expert = at::empty({shape.num_experts}, real.dtype(at::kLong));
  list.non_finite_tokens = at::empty({}, real.dtype(at::kLong));
  list.entropy_sum = at::empty({}, real.dtype(at::kDouble));
  if (options.score_sum) list.score_sum = at::empty({shape.num_experts}, real);
  if (options.lse_square_sum) list.lse_square_sum = at::empty({}, real);
  if (options.score_shares) list.score_shares = at::empty_like(logits);
  const auto buffer = [](const Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  kernels::RouterOutput output;
  output.weights = buffer(list.weights);
  output.expert_idx = list.expert_idx.mutable_data_ptr<int32_t>();
  output.tokens_per_expert = list.tokens_per_expert.mutable_data_ptr<int64_t>();
  output.non_finite_tokens = list.non_finite_tokens.mutable_data_ptr<int64_t>();
  output.entropy_sum = list.entropy_sum.mutable_data_ptr<double>();
  output.score_sum = buffer(list.score_sum);
  output.lse_square_sum = buffer(list.lse_square_sum);
  output.score_shares = buffer(list.score_shares);
  kernels::route(shape, options.scores, kernel_type(logits.scalar_type()),
                 kernel_input(logits, valid, expert_bias), output, stream);
  return list;
}

std::vector<Tensor*> differentiable(LinearRouterOutput& output) {
  std::vector<Tensor*> list = {&output.weights};
  for (Tensor* sum : {&output.score_sum, &output.lse_square_sum, &output.score_shares}) {
    if (sum->defined()) list.push_back(sum);
  }
  return list;
}

Tensor route_logits_backward(const Tensor& logits, const Tensor& valid, const Tensor& expert_idx,
                             const LinearRouterOptions& options,
                             const std::vector<Tensor>& gradients) {
  const at::ScalarType type = logits.scalar_type();
  auto next = gradients.begin();
  const auto take = [&](bool exists) { return exists ? dense_gradient(*next++, type) : Tensor(); };
  const Tensor grad_weights = take(true);
  const Tensor grad_score_sum = take(options.score_sum);
  const Tensor grad_lse_square_sum = take(options.lse_square_sum);
  const Tensor grad_shares = take(options.score_shares);
  kernels::RouterGradInput grad;
  grad.expert_idx = expert_idx.const_data_ptr<int32_t>();
  grad.grad_weights = data_or_null(grad_weights);
  grad.grad_score_sum = data_or_null(grad_score_sum);
  grad.grad_lse_square_sum = data_or_null(grad_lse_square_sum);
  grad.grad_score_shares = data_or_null(grad_shares);
  kernels::RouterOptions scores = options.scores;
  scores.num_groups = scores.topk_groups = 1;  // the selection is made
  const Tensor grad_logits = at::empty_like(logits);
  kernels::route_backward({logits.size(0), logits.size(1), options.top_k}, scores,
                          kernel_type(type), kernel_input(logits, valid, {}), grad,
                          grad_logits.mutable_data_ptr(), stream_of(grad_logits, "top_k_gate"));
  return grad_logits;
}

}  // namespace perseid::gates
