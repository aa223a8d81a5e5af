#include "moe/sparse_linear.h"

#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <cmath>

#include "kernels/error.h"
#include "kernels/masked_product.h"
#include "kernels/random.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"

namespace perseid {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kSparseLinear = "sparse_linear";

/// A link where autograd keeps values of a step.
struct LinkHolder : torch::CustomClassHolder {
  explicit LinkHolder(std::shared_ptr<UnitLink> shared) : link(std::move(shared)) {}
  std::shared_ptr<UnitLink> link;
};

/// Above it dense products are faster.
constexpr double kSparseDensity = 0.1;

bool is_sparse(const UnitLink& link, const at::Tensor& x, const at::Tensor& weight) {
  const bool has_kernel = weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kDouble;
  return link.active.num_places() > 0 && link.density <= kSparseDensity && has_kernel &&
         weight.is_cpu() && x.scalar_type() == weight.scalar_type();
}

/// y = x W^T of rows [N, in]. Backward: dx = delta W, dW = delta^T x at active entries. The sparse
/// kernels want the rows side by side, [in, N]; their results are views [N, out] of such tensors,
/// which the next layer takes as they are.
struct SparseProduct : torch::autograd::Function<SparseProduct> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::shared_ptr<UnitLink>& link) {
    context->save_for_backward({x, weight});
    context->saved_data["link"] = c10::IValue::make_capsule(c10::make_intrusive<LinkHolder>(link));
    if (!is_sparse(*link, x, weight)) return x.mm(weight.t());
    const int64_t out = weight.size(0), in = weight.size(1), num_rows = x.size(0);
    const at::Tensor columns = x.t().contiguous();
    const at::Tensor dense = weight.contiguous();
    const at::Tensor product = at::empty({out, num_rows}, x.options());
    kernels::masked_product(data_of(dense), link->active.data(), data_of(columns), out, in,
                            num_rows, dtype_of(x, kSparseLinear), mutable_data_of(product));
    return product.t();
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &delta = grads[0];
    const c10::intrusive_ptr<c10::intrusive_ptr_target> capsule =
        context->saved_data["link"].toCapsule();
    const UnitLink& link = *static_cast<const LinkHolder&>(*capsule).link;
    if (link.accumulate) link.accumulate(x, delta);
    const bool needs_x = context->needs_input_grad(0), needs_weight = context->needs_input_grad(1);
    at::Tensor grad_x, grad_weight;
    if (!is_sparse(link, x, weight)) {
      if (needs_x) grad_x = delta.mm(weight);
      if (needs_weight) grad_weight = delta.t().mm(x);
      if (needs_weight && link.active.num_places() > 0) {
        zero_inactive(link.active, link.inactive, grad_weight);
      }
      return {grad_x, grad_weight, at::Tensor()};
    }
    const int64_t out = weight.size(0), in = weight.size(1), num_rows = x.size(0);
    const kernels::DType dtype = dtype_of(x, kSparseLinear);
    const at::Tensor delta_columns = delta.t().contiguous();
    if (needs_x) {
      const at::Tensor dense = weight.contiguous();
      const at::Tensor columns = at::empty({in, num_rows}, x.options());
      kernels::masked_transposed_product(data_of(dense), link.active.data(), data_of(delta_columns),
                                         out, in, num_rows, dtype, mutable_data_of(columns));
      grad_x = columns.t();
    }
    if (needs_weight) {
      const at::Tensor columns = x.t().contiguous();
      grad_weight = at::empty({out, in}, weight.options());
      kernels::masked_outer_product(data_of(delta_columns), data_of(columns), link.active.data(),
                                    out, in, num_rows, dtype, mutable_data_of(grad_weight));
    }
    return {grad_x, grad_weight, at::Tensor()};
  }
};

at::Tensor uniform(at::IntArrayRef sizes, at::ScalarType type, double bound,
                   kernels::RandomKey key) {
  const at::Tensor result = at::empty(sizes, type);
  kernels::fill_uniform(mutable_data_of(result), result.numel(), dtype_of(result, kSparseLinear),
                        -bound, bound, key);
  return result;
}

}  // namespace

SparseLinearImpl::SparseLinearImpl(const SparseLinearOptions& options)
    : options_(options), link_(std::make_shared<UnitLink>()) {
  use_libtorch_threads();
  const int64_t in = options.in_features(), out = options.out_features();
  require(in >= 1, kSparseLinear, "in_features", in, "is below 1");
  require(out >= 1, kSparseLinear, "out_features", out, "is below 1");
  const double bound = 1 / std::sqrt(static_cast<double>(in));
  const kernels::RandomKey key = draw_key(options.seed(), 0, options.key(), UnitDraw::kWeights);
  weight = register_parameter("weight", uniform({out, in}, options.dtype(), bound, key.with(0)));
  if (options.bias()) {
    bias = register_parameter("bias", uniform({out}, options.dtype(), bound, key.with(1)));
  }
}

at::Tensor SparseLinearImpl::forward(const at::Tensor& x) {
  require(x.dim() >= 1 && x.size(-1) == options_.in_features(), kSparseLinear, "x",
          to_text(x.sizes()), "does not end with in_features=" + to_text(options_.in_features()));
  const at::Tensor rows = x.reshape({-1, options_.in_features()});
  at::Tensor product =
      SparseProduct::apply(rows, link_->effective ? link_->effective(weight) : weight, link_);
  if (bias.defined()) product = product + bias;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = options_.out_features();
  return product.reshape(sizes);
}

SparseUnit SparseLinearImpl::unit() const {
  SparseUnit unit;
  unit.name = to_string(options_.key());
  unit.key = options_.key();
  unit.parameter = weight;
  unit.link = link_;
  unit.has_bias = bias.defined();
  return unit;
}

}  // namespace perseid
