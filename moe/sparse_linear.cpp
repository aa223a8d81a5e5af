#include "moe/sparse_linear.h"

#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <cmath>

#include "kernels/error.h"
#include "kernels/random.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kOperation = "sparse_linear";

/// A link where autograd keeps values of a step.
struct LinkHolder : torch::CustomClassHolder {
  explicit LinkHolder(std::shared_ptr<UnitLink> shared) : link(std::move(shared)) {}
  std::shared_ptr<UnitLink> link;
};

/// y = x W^T of rows [N, in]. Backward: dx = delta W, dW = delta^T x at active entries.
struct SparseProduct : torch::autograd::Function<SparseProduct> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::shared_ptr<UnitLink>& link) {
    context->save_for_backward({x, weight});
    context->saved_data["link"] = c10::IValue::make_capsule(c10::make_intrusive<LinkHolder>(link));
    return x.mm(weight.t());
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    const at::Tensor delta = grads[0].contiguous();
    const c10::intrusive_ptr<c10::intrusive_ptr_target> capsule =
        context->saved_data["link"].toCapsule();
    const UnitLink& link = *static_cast<const LinkHolder&>(*capsule).link;
    if (link.accumulate) link.accumulate(x, delta);
    at::Tensor grad_x, grad_weight;
    if (context->needs_input_grad(0)) grad_x = delta.mm(weight);
    if (context->needs_input_grad(1)) {
      grad_weight = delta.t().mm(x);
      if (link.inactive.defined()) grad_weight.masked_fill_(link.inactive, 0);
    }
    return {grad_x, grad_weight, at::Tensor()};
  }
};

at::Tensor uniform(at::IntArrayRef sizes, at::ScalarType type, double bound,
                   kernels::RandomKey key) {
  const at::Tensor result = at::empty(sizes, type);
  kernels::fill_uniform(mutable_data_of(result), result.numel(), dtype_of(result, kOperation),
                        -bound, bound, key);
  return result;
}

}  // namespace

SparseLinearImpl::SparseLinearImpl(const SparseLinearOptions& options)
    : options_(options), link_(std::make_shared<UnitLink>()) {
  const int64_t in = options.in_features(), out = options.out_features();
  require(in >= 1, kOperation, "in_features", in, "is below 1");
  require(out >= 1, kOperation, "out_features", out, "is below 1");
  const double bound = 1 / std::sqrt(static_cast<double>(in));
  const kernels::RandomKey key = draw_key(options.seed(), 0, options.key(), UnitDraw::kWeights);
  weight = register_parameter("weight", uniform({out, in}, options.dtype(), bound, key.with(0)));
  if (options.bias()) {
    bias = register_parameter("bias", uniform({out}, options.dtype(), bound, key.with(1)));
  }
}

at::Tensor SparseLinearImpl::forward(const at::Tensor& x) {
  require(x.dim() >= 1 && x.size(-1) == options_.in_features(), kOperation, "x", to_text(x.sizes()),
          "does not end with in_features=" + to_text(options_.in_features()));
  const at::Tensor rows = x.reshape({-1, options_.in_features()});
  at::Tensor product = SparseProduct::apply(rows, weight, link_);
  if (bias.defined()) product = product + bias;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = options_.out_features();
  return product.view(sizes);
}

SparseUnit SparseLinearImpl::unit() const {
  SparseUnit unit;
  unit.name = to_string(options_.key());
  unit.key = options_.key();
  unit.parameter = weight;
  unit.link = link_;
  return unit;
}

}  // namespace perseid
