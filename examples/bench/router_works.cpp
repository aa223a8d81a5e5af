#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <memory>

#include "examples/bench/kernel_bench.h"
#include "kernels/router.h"
#include "moe/tensor_types.h"

namespace perseid::bench {
namespace {

/// Inputs and outputs; the operations write into the same tensors again and again.
struct Router {
  kernels::RouterShape shape;
  kernels::Stream stream;
  at::Tensor logits;  ///< [T, E] float32, a leaf
  at::Tensor grad_weights, grad_score_sum, grad_lse_square_sum;
  at::Tensor expert_idx, weights, score_sum, lse_square_sum, tokens_per_expert, non_finite_tokens;
  at::Tensor grad_logits;
  at::Tensor torch_weights;  ///< LibTorch's, with its graph

  void route(bool with_sums) const {
    kernels::RouterOutput output;
    output.expert_idx = expert_idx.mutable_data_ptr<int32_t>();
    output.weights = weights.mutable_data_ptr();
    if (with_sums) {
      output.score_sum = score_sum.mutable_data_ptr();
      output.lse_square_sum = lse_square_sum.mutable_data_ptr();
      output.tokens_per_expert = tokens_per_expert.mutable_data_ptr<int64_t>();
      output.non_finite_tokens = non_finite_tokens.mutable_data_ptr<int64_t>();
    }
    kernels::route(shape, {}, kernels::DType::kFloat32, input(), output, stream);
  }

  void route_backward(bool with_sums) const {
    kernels::RouterGradInput grad;
    grad.expert_idx = expert_idx.const_data_ptr<int32_t>();
    grad.grad_weights = grad_weights.const_data_ptr();
    if (with_sums) {
      grad.grad_score_sum = grad_score_sum.const_data_ptr();
      grad.grad_lse_square_sum = grad_lse_square_sum.const_data_ptr();
    }
    kernels::route_backward(shape, {}, kernels::DType::kFloat32, input(), grad,
                            grad_logits.mutable_data_ptr(), stream);
  }

  at::Tensor torch_grad(const at::Tensor& of) const {
    return torch::autograd::grad({of}, {logits}, {grad_weights}, /*retain_graph=*/true).front();
  }

 private:
  kernels::RouterInput input() const {
    kernels::RouterInput input;
    input.logits = logits.const_data_ptr();
    return input;
  }
};

at::Tensor softmax_top_k(const at::Tensor& logits, int64_t top_k) {
  const at::Tensor chosen = std::get<0>(logits.softmax(1).topk(top_k, 1));
  return chosen / chosen.sum(1, true);
}

std::shared_ptr<Router> make_router(const LayerCase& shape, const Place& place, uint64_t seed) {
  const int64_t T = shape.num_tokens, E = shape.num_experts, K = shape.top_k;
  const auto floats = at::TensorOptions(at::kFloat).device(place.tensors());
  const auto counts = floats.dtype(at::kLong);
  at::manual_seed(seed);
  auto router = std::make_shared<Router>();
  router->shape = {T, E, K};
  router->stream = place.stream();
  router->logits = at::randn({T, E}, floats).requires_grad_();
  router->grad_weights = at::randn({T, K}, floats);
  router->grad_score_sum = at::randn({E}, floats);
  router->grad_lse_square_sum = at::randn({1}, floats);
  router->expert_idx = at::empty({T, K}, floats.dtype(at::kInt));
  router->weights = at::empty({T, K}, floats);
  router->score_sum = at::empty({E}, floats);
  router->lse_square_sum = at::empty({1}, floats);
  router->tokens_per_expert = at::empty({E}, counts);
  router->non_finite_tokens = at::empty({1}, counts);
  router->grad_logits = at::empty({T, E}, floats);
  router->torch_weights = softmax_top_k(router->logits, K);
  return router;
}

/// Gradients are compared for our choices: of equal logits LibTorch may take another.
void check(const Router& router) {
  constexpr double kTolerance = 1e-5;
  router.route(true);
  require_close(router.weights, router.torch_weights.detach(), kTolerance, "router", "weights");
  require_close(router.score_sum, router.logits.detach().softmax(1).sum(0), kTolerance, "router",
                "score_sum");
  if (router.shape.top_k == 1) return;  // the weight is 1 and has no gradient
  router.route_backward(false);
  const at::Tensor chosen = router.logits.softmax(1).gather(1, router.expert_idx.to(at::kLong));
  require_close(router.grad_logits, router.torch_grad(chosen / chosen.sum(1, true)), kTolerance,
                "router", "grad_logits");
}

}  // namespace

std::vector<Work> router_works(const LayerCase& shape, const Place& place, uint64_t seed) {
  const std::shared_ptr<Router> router = make_router(shape, place, seed);
  check(*router);
  const auto logits = static_cast<double>(shape.num_tokens * shape.num_experts);
  const auto choices = static_cast<double>(shape.num_assignments());
  const auto experts = static_cast<double>(shape.num_experts);
  // Softmax: a difference, an exponential, a sum and a product for each logit.
  const double flops = 4 * logits;
  const double forward = 4 * logits + 8 * choices;
  const double sums = 12 * experts;  // a float32 and an int64 each
  // Without sums the gradient is 0 but for the choices: their logits, ids and gradients are read.
  const double backward = 4 * logits + 12 * choices;
  const double backward_sums = 8 * logits + 8 * choices + 4 * experts;
  enum : size_t { kTorch = 2, kTorchBackward = 5 };
  return {
      {"route", forward, flops, kTorch, [router] { router->route(false); }},
      {"route, sums for losses", forward + sums, flops, kTorch, [router] { router->route(true); }},
      {"softmax, topk, normalize", forward, flops, kTorch,
       [router] {
         const at::NoGradGuard no_grad;
         softmax_top_k(router->logits, router->shape.top_k);
       }},
      {"route_backward", backward, 4 * choices, kTorchBackward,
       [router] { router->route_backward(false); }},
      {"route_backward, of sums", backward_sums, flops, kTorchBackward,
       [router] { router->route_backward(true); }},
      {"its autograd", backward, 4 * choices, kTorchBackward,
       [router] { router->torch_grad(router->torch_weights); }}};
}

}  // namespace perseid::bench
