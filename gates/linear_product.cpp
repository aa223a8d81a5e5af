#include "gates/linear_product.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "gates/kernel_types.h"
#include "kernels/router_linear.h"

namespace perseid::gates {
namespace {

using at::Tensor;

constexpr const char* kLinearProduct = "linear_product";

kernels::DType features_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 ? kernels::DType::kBFloat16
                                               : kernel_type(tensor.scalar_type());
}

LinearGradients device_backward(const Tensor& features, const Tensor& weight, const Tensor& valid,
                                const Tensor& grad_in, LinearWanted wanted) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Tensor grad = clean_rows(grad_in, valid);
  LinearGradients result;
  if (wanted.features) {
    result.features = at::mm(grad, weight);
    if (features.defined()) result.features = result.features.to(features.scalar_type());
  }
  if (wanted.weight) {
    result.weight = at::mm(grad.t(), clean_rows(features, valid).to(grad.scalar_type()));
  }
  if (wanted.bias) result.bias = grad.sum(0, /*keepdim=*/false, at::kDouble).to(grad.scalar_type());
  return result;
}

}  // namespace

Tensor clean_rows(const Tensor& rows, const Tensor& valid) {
  return valid.defined() ? rows.masked_fill(valid.logical_not().unsqueeze(1), 0) : rows;
}

Tensor linear_product(const Tensor& features, const Tensor& weight, const Tensor& bias) {
  if (is_on_device(features)) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor rows = features.to(weight.scalar_type());
    return bias.defined() ? at::addmm(bias, rows, weight.t()) : at::mm(rows, weight.t());
  }
  const Tensor logits = at::empty({features.size(0), weight.size(0)}, weight.options());
  kernels::router_linear({features.size(0), weight.size(0), features.size(1)},
                         kernel_type(weight.scalar_type()), features_type(features),
                         features.const_data_ptr(), weight.const_data_ptr(), data_or_null(bias),
                         logits.mutable_data_ptr(), stream_of(features, kLinearProduct));
  return logits;
}

LinearGradients linear_product_backward(const Tensor& features, const Tensor& weight,
                                        const Tensor& valid, const Tensor& grad,
                                        LinearWanted wanted) {
  if (is_on_device(grad)) return device_backward(features, weight, valid, grad, wanted);
  const int64_t d_model = features.defined() ? features.size(1)
                          : weight.defined() ? weight.size(1)
                                             : 1;
  LinearGradients result;
  if (wanted.features) {
    const at::ScalarType type = features.defined() ? features.scalar_type() : grad.scalar_type();
    result.features = at::empty({grad.size(0), d_model}, grad.options().dtype(type));
  }
  if (wanted.weight) result.weight = at::empty({grad.size(1), d_model}, grad.options());
  if (wanted.bias) result.bias = at::empty({grad.size(1)}, grad.options());
  const auto target = [](const Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
  };
  kernels::router_linear_backward(
      {grad.size(0), grad.size(1), d_model}, kernel_type(grad.scalar_type()),
      features_type(features.defined() ? features : grad), data_or_null(features),
      data_or_null(weight), static_cast<const uint8_t*>(data_or_null(valid)), grad.const_data_ptr(),
      target(result.features), target(result.weight), target(result.bias),
      stream_of(grad, kLinearProduct));
  return result;
}

}  // namespace perseid::gates
