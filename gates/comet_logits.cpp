#include "gates/comet_logits.h"

#include <ATen/ops/empty.h>

#include "gates/kernel_types.h"
#include "gates/linear_product.h"
#include "kernels/comet_lazy.h"
#include "kernels/sparse_product.h"

namespace perseid::gates {

using at::Tensor;

namespace {

// Along active paths a logit costs a dot product of its own, not its share of a matrix product (of
// LibTorch's, when this was measured). In ms on one core, float32, T = 4096, D = 1024, E = 256, K =
// 2, forward / with backward, by the share of the 1022 logits that a token reaches:
//   share    2 %        5 %        9 %        31 %        100 %
//   dense    105 / 339  108 / 350  112 / 346  136 / 377   154 / 411
//   lazy      21 /  54   30 /  78   62 / 141  153 / 390   twice as long as dense
constexpr int64_t kProbes = 16;
/// Smaller gates and batches have nothing to gain.
constexpr int64_t kLogitsMin = 128;  ///< of a token
constexpr int64_t kTokensMin = 256;
constexpr int64_t kSparseShareInverse = 5;

/// Does skipping the zeros of a gradient of logits [T, N] pay?
bool is_sparse(const Tensor& grad, Descent descent) {
  if (is_on_device(grad)) return false;
  if (descent != Descent::kAuto) return descent == Descent::kLazy;
  if (grad.size(0) < kTokensMin || 2 * grad.size(1) < kLogitsMin) return false;
  const int64_t nonzero =
      kernels::count_nonzero(grad.const_data_ptr(), grad.numel(), kernel_type(grad.scalar_type()));
  return nonzero * kSparseShareInverse <= grad.numel();
}

}  // namespace

CometLogits comet_logits(const Tensor& features, const CometParameters& parameters,
                         const Tensor& valid, const CometCoreOptions& options) {
  const at::ScalarType type = features.scalar_type();
  const kernels::CometShape shape{features.size(0), options.num_experts, options.num_trees};
  const Tensor split_weight = parameters.split_weight.to(type).contiguous();
  const Tensor split_bias = parameters.split_bias.to(type).contiguous();
  const Tensor leaf_weight = parameters.leaf_weight.to(type).contiguous();
  const Tensor leaf_bias = parameters.leaf_bias.to(type).contiguous();
  const kernels::CometLinear layers{features.size(1),
                                    features.const_data_ptr(),
                                    split_weight.const_data_ptr(),
                                    split_bias.const_data_ptr(),
                                    leaf_weight.const_data_ptr(),
                                    leaf_bias.const_data_ptr()};
  const kernels::DType dtype = kernel_type(type);
  const kernels::Stream stream = stream_of(features, kCometGate);
  // On a GPU a matrix product is always faster than dot products along paths.
  const bool may_be_lazy = !is_on_device(features);
  bool is_lazy = may_be_lazy && options.descent == Descent::kLazy;
  if (may_be_lazy && options.descent == Descent::kAuto && shape.num_tokens >= kTokensMin &&
      split_bias.numel() + leaf_bias.numel() >= kLogitsMin) {
    is_lazy = kernels::comet_reaches_few(shape, options.kernel.gamma, dtype, layers, kProbes);
  }
  if (!is_lazy) {
    return {linear_product(features, split_weight, split_bias),
            linear_product(features, leaf_weight, leaf_bias)};
  }
  const CometLogits logits{at::empty({shape.num_tokens, split_bias.size(0)}, features.options()),
                           at::empty({shape.num_tokens, leaf_bias.size(0)}, features.options())};
  kernels::comet_reached_logits(
      shape, options.kernel.gamma, dtype, layers, static_cast<const uint8_t*>(data_or_null(valid)),
      logits.splits.mutable_data_ptr(), logits.leaves.mutable_data_ptr(), stream);
  return logits;
}

Tensor grad_of_features(const Tensor& grad, const Tensor& weight, Descent descent) {
  const Tensor rows = weight.contiguous();
  if (!is_sparse(grad, descent)) {
    return linear_product_backward({}, rows, {}, grad, {.features = true}).features;
  }
  const Tensor out = at::empty({grad.size(0), rows.size(1)}, grad.options());
  kernels::sparse_product(grad.const_data_ptr(), rows.const_data_ptr(), grad.size(0), rows.size(0),
                          rows.size(1), kernel_type(grad.scalar_type()), out.mutable_data_ptr());
  return out;
}

Tensor grad_of_weight(const Tensor& grad, const Tensor& features, Descent descent) {
  if (!is_sparse(grad, descent)) {
    return linear_product_backward(features, {}, {}, grad, {.weight = true}).weight;
  }
  const Tensor out = at::empty({grad.size(1), features.size(1)}, grad.options());
  kernels::sparse_transposed_product(grad.const_data_ptr(), features.const_data_ptr(), grad.size(0),
                                     grad.size(1), features.size(1),
                                     kernel_type(grad.scalar_type()), out.mutable_data_ptr());
  return out;
}

}  // namespace perseid::gates
