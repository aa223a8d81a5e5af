#include "examples/bench/contenders.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <cmath>
#include <utility>

#include "gates/top_k_gate.h"
#include "kernels/activation.h"
#include "moe/tensor_types.h"

namespace perseid::bench {
namespace {

/// A leaf that shares the values and collects its own gradient.
at::Tensor leaf(const at::Tensor& values) { return values.detach().requires_grad_(); }

}  // namespace

// ---- the layer ----------------------------------------------------------------------------------
LayerContender::LayerContender(const std::vector<LayerProblem>& problems) : Contender("layer") {
  for (const LayerProblem& problem : problems) {
    tokens_.push_back(leaf(problem.tokens));
    grad_outs_.push_back(problem.grad_out);
  }
  const LayerCase& shape = problems.front().shape;
  const ExpertPlacement placement = ExpertPlacement::contiguous(shape.num_experts, 1);
  auto gate = std::make_shared<gates::TopKGate>(
      gates::TopKGateOptions(shape.d_model, shape.num_experts).top_k(shape.top_k));
  experts_ =
      std::make_shared<GroupedMLP>(GroupedMLPOptions(shape.d_model, shape.d_ff), placement, 0);
  experts_->to(shape.dtype);
  router_ = gate->weight;
  {
    const at::NoGradGuard no_grad;
    router_.copy_(problems.front().router);
  }
  layer_ = std::make_shared<MoELayer>(std::vector<std::shared_ptr<gates::Gate>>{gate}, experts_,
                                      placement, make_parallel_groups(comm::self_group()));
  layer_->to(tokens_.front().device());
}

Outcome LayerContender::run() {
  const size_t turn = turn_++ % tokens_.size();
  MoEOutput output = layer_->forward(MoEInput(tokens_[turn]));
  const at::Tensor loss = output.loss();
  stats_ = std::move(output.stats);
  return {output.output(),
          torch::autograd::grad({output.output(), loss},
                                {tokens_[turn], experts_->up_proj, experts_->down_proj, router_},
                                {grad_outs_[turn], at::ones_like(loss)})};
}

// ---- dense --------------------------------------------------------------------------------------
DenseContender::DenseContender(const LayerCase& shape, const Place& place)
    : Contender("dense"), shape_(shape), stream_(place.stream()) {
  const int64_t A = shape.num_assignments(), D = shape.d_model, F = shape.d_ff;
  const at::TensorOptions options = at::TensorOptions(shape.dtype).device(place.tensors());
  const auto random = [&](int64_t rows, int64_t columns, double scale) {
    return (at::randn({rows, columns}, options.dtype(at::kFloat)) * scale).to(shape.dtype);
  };
  const auto buffer = [&](int64_t rows, int64_t columns) {
    return at::empty({rows, columns}, options);
  };
  rows_ = random(A, D, 1);
  up_ = random(2 * F, D, 1 / std::sqrt(static_cast<double>(D)));
  down_ = random(D, F, 1 / std::sqrt(static_cast<double>(F)));
  grad_out_ = random(A, D, 1);
  pre_ = buffer(A, 2 * F);
  act_ = buffer(A, F);
  out_ = buffer(A, D);
  grad_act_ = buffer(A, F);
  grad_pre_ = buffer(A, 2 * F);
  grad_rows_ = buffer(A, D);
  grad_up_ = buffer(2 * F, D);
  grad_down_ = buffer(D, F);
}

Outcome DenseContender::run() {
  const kernels::DType dtype = dtype_of(rows_, "dense");
  const kernels::ActivationShape activation{shape_.num_assignments(), shape_.d_ff,
                                            kernels::Activation::kSilu, true};
  at::mm_out(pre_, rows_, up_.t());
  kernels::activation_forward(activation, dtype, data_of(pre_), nullptr, mutable_data_of(act_),
                              stream_);
  at::mm_out(out_, act_, down_.t());

  at::mm_out(grad_act_, grad_out_, down_);
  kernels::activation_backward(activation, dtype, data_of(pre_), nullptr, data_of(grad_act_),
                               mutable_data_of(grad_pre_), nullptr, nullptr, stream_);
  at::mm_out(grad_down_, grad_out_.t(), act_);
  at::mm_out(grad_up_, grad_pre_.t(), rows_);
  at::mm_out(grad_rows_, grad_pre_, up_);
  return {out_, {grad_rows_, grad_up_, grad_down_}};
}

// ---- peers --------------------------------------------------------------------------------------
at::Tensor loop_forward(const PeerInput& input) {
  const int64_t K = input.expert_idx.size(1);
  const at::Tensor experts = input.expert_idx.reshape(-1);
  // One unbind, not one select per expert: the backward of a select fills a whole [E, 2F, D].
  const std::vector<at::Tensor> ups = input.up.unbind(0), downs = input.down.unbind(0);
  at::Tensor out = at::zeros_like(input.tokens);
  for (size_t e = 0; e < ups.size(); ++e) {
    const at::Tensor places = (experts == static_cast<int64_t>(e)).nonzero().squeeze(1);
    if (places.size(0) == 0) continue;
    const at::Tensor token_of = places.div(K, "floor");
    const std::vector<at::Tensor> pre =
        input.tokens.index_select(0, token_of).mm(ups[e].t()).chunk(2, 1);
    const at::Tensor y = (at::silu(pre[0]) * pre[1]).mm(downs[e].t());
    out.index_add_(0, token_of, y * input.weights.index_select(0, places).unsqueeze(1));
  }
  return out;
}

at::Tensor grouped_mm_forward(const PeerInput& input) {
  const int64_t K = input.expert_idx.size(1), E = input.up.size(0);
  const at::Tensor experts = input.expert_idx.reshape(-1);
  const auto [sorted, order] = experts.sort(true, 0, false);
  const at::Tensor token_of = order.div(K, "floor");
  // Unlike bincount and cumsum, this does not make the host wait for a GPU.
  const at::Tensor ends =
      at::searchsorted(sorted, at::arange(E, experts.options()), /*out_int32=*/true,
                       /*right=*/true);
  const at::Tensor rows = input.tokens.index_select(0, token_of);
  const std::vector<at::Tensor> pre =
      at::_grouped_mm(rows, input.up.transpose(1, 2), ends).chunk(2, 1);
  const at::Tensor y = at::_grouped_mm(at::silu(pre[0]) * pre[1], input.down.transpose(1, 2), ends);
  return at::zeros_like(input.tokens)
      .index_add(0, token_of, y * input.weights.index_select(0, order).unsqueeze(1));
}

PeerContender::PeerContender(std::string name, PeerForward forward,
                             const std::vector<PeerInput>& inputs)
    : Contender(std::move(name)), forward_(forward) {
  const at::Tensor up = leaf(inputs.front().up), down = leaf(inputs.front().down);
  for (const PeerInput& input : inputs) {
    inputs_.push_back(
        {leaf(input.tokens), input.expert_idx, leaf(input.weights), up, down, input.grad_out});
  }
}

Outcome PeerContender::run() {
  const PeerInput& input = inputs_[turn_++ % inputs_.size()];
  const at::Tensor out = forward_(input);
  return {out, torch::autograd::grad({out}, {input.tokens, input.up, input.down, input.weights},
                                     {input.grad_out})};
}

PlainGateOutput plain_gate(const at::Tensor& tokens, const at::Tensor& router,
                           const at::Tensor& expert_idx, double aux_loss_coeff) {
  const int64_t T = expert_idx.size(0), K = expert_idx.size(1), E = router.size(0);
  const at::Tensor logits = tokens.to(at::kFloat).mm(router.t());
  const at::Tensor scores = logits.softmax(1);
  const at::Tensor weights =
      K == 1 ? scores.gather(1, expert_idx) : logits.gather(1, expert_idx).softmax(1);
  const at::Tensor load =
      expert_idx.reshape(-1).bincount({}, E).to(at::kFloat) / static_cast<double>(T * K);
  const at::Tensor loss = (load * scores.mean(0)).sum() * (aux_loss_coeff * static_cast<double>(E));
  return {weights.reshape(-1), loss};
}

}  // namespace perseid::bench
