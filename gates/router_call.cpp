#include "gates/router_call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

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
  return tensor.defined() ? tensor : at::empty({0}, at::kFloat);
}
Tensor or_undefined(const Tensor& tensor) { return tensor.numel() > 0 ? tensor : Tensor(); }

Tensor sum_of_rows(const Tensor& rows) {
  return linear_product_backward({}, {}, {}, rows, {.bias = true}).bias;
}

std::vector<Tensor> route_logits(const Tensor& logits, const Tensor& valid,
                                 const Tensor& expert_bias, const LinearRouterOptions& options) {
  const kernels::Stream stream = stream_of(logits, "top_k_gate");
  const kernels::RouterShape shape{logits.size(0), logits.size(1), options.top_k};
  const at::TensorOptions real = logits.options();
  const int64_t num_slots = shape.num_tokens * shape.top_k;
  const auto none = [&] { return at::empty({0}, real); };
  std::vector<Tensor> list = {at::empty({num_slots}, real),
                              at::empty({num_slots}, real.dtype(at::kInt)),
                              at::empty({shape.num_experts}, real.dtype(at::kLong)),
                              at::empty({}, real.dtype(at::kLong)),
                              at::empty({}, real.dtype(at::kDouble)),
                              options.score_sum ? at::empty({shape.num_experts}, real) : none(),
                              options.lse_square_sum ? at::empty({}, real) : none(),
                              options.score_shares ? at::empty_like(logits) : none()};
  kernels::RouterOutput output;
  output.weights = list[kWeights].mutable_data_ptr();
  output.expert_idx = list[kExpertIdx].mutable_data_ptr<int32_t>();
  output.tokens_per_expert = list[kTokensPerExpert].mutable_data_ptr<int64_t>();
  output.non_finite_tokens = list[kNonFinite].mutable_data_ptr<int64_t>();
  output.entropy_sum = list[kEntropySum].mutable_data_ptr<double>();
  if (options.score_sum) output.score_sum = list[kScoreSum].mutable_data_ptr();
  if (options.lse_square_sum) output.lse_square_sum = list[kLseSquareSum].mutable_data_ptr();
  if (options.score_shares) output.score_shares = list[kScoreShares].mutable_data_ptr();
  kernels::route(shape, options.scores, kernel_type(logits.scalar_type()),
                 kernel_input(logits, valid, expert_bias), output, stream);
  return list;
}

Tensor route_logits_backward(const Tensor& logits, const Tensor& valid, const Tensor& expert_idx,
                             const LinearRouterOptions& options,
                             const std::vector<Tensor>& gradients) {
  const at::ScalarType type = logits.scalar_type();
  const Tensor grad_weights = dense_gradient(gradients[kWeights], type);
  const Tensor grad_score_sum = dense_gradient(gradients[kScoreSum], type);
  const Tensor grad_lse_square_sum = dense_gradient(gradients[kLseSquareSum], type);
  const Tensor grad_shares = dense_gradient(gradients[kScoreShares], type);
  kernels::RouterGradInput grad;
  grad.expert_idx = expert_idx.const_data_ptr<int32_t>();
  grad.grad_weights = data_or_null(grad_weights);
  grad.grad_score_sum = options.score_sum ? data_or_null(grad_score_sum) : nullptr;
  grad.grad_lse_square_sum = options.lse_square_sum ? data_or_null(grad_lse_square_sum) : nullptr;
  grad.grad_score_shares = options.score_shares ? data_or_null(grad_shares) : nullptr;
  kernels::RouterOptions scores = options.scores;
  scores.num_groups = scores.topk_groups = 1;  // the selection is made
  const Tensor grad_logits = at::empty_like(logits);
  kernels::route_backward({logits.size(0), logits.size(1), options.top_k}, scores,
                          kernel_type(type), kernel_input(logits, valid, {}), grad,
                          grad_logits.mutable_data_ptr(), stream_of(grad_logits, "top_k_gate"));
  return grad_logits;
}

LinearRouterOutput router_output(const std::vector<Tensor>& list,
                                 const LinearRouterOptions& options) {
  LinearRouterOutput output;
  output.weights = list[kWeights];
  output.expert_idx = list[kExpertIdx];
  output.tokens_per_expert = list[kTokensPerExpert];
  output.non_finite_tokens = list[kNonFinite];
  output.entropy_sum = list[kEntropySum];
  if (options.score_sum) output.score_sum = list[kScoreSum];
  if (options.lse_square_sum) output.lse_square_sum = list[kLseSquareSum];
  if (options.score_shares) output.score_shares = list[kScoreShares];
  return output;
}

}  // namespace perseid::gates
