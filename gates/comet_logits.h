#pragma once
#include <ATen/core/Tensor.h>

#include "gates/comet_core.h"

// Internal: the linear layers of the COMET gate, forward and backward, all logits at once or along
// active paths. No graph. Same bits for any number of threads.

namespace perseid::gates {

struct CometLogits {
  at::Tensor splits;  ///< [T, K*(E-1)]
  at::Tensor leaves;  ///< [T, K*E]
};

/// In the type of the features. Logits that no path reaches may be 0, see kernels/comet_lazy.h.
CometLogits comet_logits(const at::Tensor& features, const CometParameters& parameters,
                         const at::Tensor& valid, const CometCoreOptions& options);

/// grad weight: gradient of the features [T, D].
/// @param grad    [T, N] gradient of the logits; its zeros are skipped where that pays
/// @param weight  [N, D] in the same type
at::Tensor grad_of_features(const at::Tensor& grad, const at::Tensor& weight, Descent descent);

/// grad^T features: gradient of the weight [N, D].
at::Tensor grad_of_weight(const at::Tensor& grad, const at::Tensor& features, Descent descent);

}  // namespace perseid::gates
