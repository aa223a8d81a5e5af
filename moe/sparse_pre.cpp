#include "moe/sparse_pre.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "kernels/error.h"
#include "kernels/select.h"
#include "kernels/statistical_top_k.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

constexpr const char* kActivationSparsity = "activation_sparsity";

kernels::StatisticalTopKShape shape_of(const at::Tensor& z, int64_t k) {
  kernels::StatisticalTopKShape shape;
  shape.num_tokens = z.size(0);
  shape.num_experts = z.size(1);
  shape.top_k = k;
  return shape;
}
kernels::StatisticalTopKOptions options_of(const ActivationSparsity& sparsity) {
  kernels::StatisticalTopKOptions options;
  options.unbiased = sparsity.unbiased;
  options.detach_threshold = sparsity.detach_threshold;
  options.min_experts = 0;  // a row of equal z has no hidden value
  return options;
}

}  // namespace

const char* name_of(ActivationSparsityKind kind) {
  return kind == ActivationSparsityKind::kNone   ? "none"
         : kind == ActivationSparsityKind::kTopK ? "top_k"
                                                 : "statistical_top_k";
}

void validate(const ActivationSparsity& sparsity, int64_t d_ff, const char* operation) {
  const int64_t k = sparsity.k;
  const std::string of = std::string(" of activation_sparsity=") + name_of(sparsity.kind);
  switch (sparsity.kind) {
    case ActivationSparsityKind::kNone:
      break;
    case ActivationSparsityKind::kTopK:
      require(k >= 1 && k <= d_ff, operation, "k", k,
              "is outside [1, d_ff=" + to_text(d_ff) + "]" + of);
      break;
    case ActivationSparsityKind::kStatisticalTopK:
      require(k >= 1 && k < d_ff, operation, "k", k,
              "is outside [1, d_ff=" + to_text(d_ff) + ")" + of);
      break;
  }
}

SparsePre::SparsePre(const at::Tensor& pre, int64_t d_ff, const ActivationSparsity& sparsity)
    : d_ff_(d_ff), sparsity_(sparsity), rows_(pre) {
  const bool is_top_k = sparsity.kind == ActivationSparsityKind::kTopK;
  if (sparsity.kind == ActivationSparsityKind::kNone || (is_top_k && sparsity.k == d_ff)) return;
  rows_ = at::empty_like(pre);
  z_ = pre.narrow(1, 0, d_ff).to(weight_type(pre)).contiguous();
  const kernels::DType dtype = dtype_of(z_, kActivationSparsity);
  if (is_top_k) {
    const at::Tensor is_kept = at::empty(z_.sizes(), at::kByte);
    kernels::select_k_rows(data_of(z_), z_.size(0), d_ff, sparsity.k, dtype,
                           is_kept.mutable_data_ptr<uint8_t>());
    // A NaN is never among the largest, but must not vanish.
    dropped_ = is_kept.logical_not().logical_and_(z_.eq(z_));
    rows_.copy_(pre);
    rows_.narrow(1, 0, d_ff).masked_fill_(dropped_, 0);
    return;
  }
  sparse_z_ = at::empty_like(z_);
  kernels::statistical_top_k(shape_of(z_, sparsity.k), options_of(sparsity), dtype, data_of(z_),
                             nullptr, mutable_data_of(sparse_z_), nullptr);
  rows_.copy_(pre);
  rows_.narrow(1, 0, d_ff).copy_(sparse_z_);
}

void SparsePre::backward(const at::Tensor& grad) const {
  if (!z_.defined()) return;
  const at::Tensor grad_z = grad.narrow(1, 0, d_ff_);
  if (dropped_.defined()) {
    grad_z.masked_fill_(dropped_, 0);
    return;
  }
  const at::Tensor grad_sparse = grad_z.to(z_.scalar_type()).contiguous();
  const at::Tensor result = at::empty_like(z_);
  kernels::statistical_top_k_backward(
      shape_of(z_, sparsity_.k), options_of(sparsity_), dtype_of(z_, kActivationSparsity),
      data_of(z_), nullptr, data_of(sparse_z_), data_of(grad_sparse), mutable_data_of(result));
  grad_z.copy_(result);
}

}  // namespace perseid
