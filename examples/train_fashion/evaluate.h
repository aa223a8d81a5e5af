#pragma once
#include "examples/train_fashion/image_tensors.h"
#include "examples/train_fashion/train.h"
#include "moe/moe_layer.h"

namespace perseid::examples {

/// Cross-entropy of images, summed.
/// @param logits  [n, 10]
/// @param labels  [n] int64
at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels);

/// Sets those fields of `result` that are of the test. Collective; leaves the layer in eval mode.
void evaluate(MoELayer& layer, const ImageTensors& images, const TrainOptions& options,
              RunResult& result);

}  // namespace perseid::examples
