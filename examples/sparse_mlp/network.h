#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "examples/sparse_mlp/images.h"
#include "moe/sparse_linear.h"

namespace perseid::examples {

/// 784 - hidden - hidden - hidden - 10 with ReLU and dropout, of SparseLinear: layer l has UnitKey
/// {l, 0, kWeight}. Weights start with N(0, 0.1^2).
class Network {
 public:
  Network(int64_t hidden, uint64_t seed);

  /// Logits [n, 10] in training. Dropped activations pass their gradient on, as in the tutorial.
  at::Tensor forward(const at::Tensor& x, int64_t step);
  /// Share of the images whose largest logit is their class.
  double accuracy(const Images& images);

  std::vector<at::Tensor> parameters() const;
  std::vector<SparseUnit> units() const;

 private:
  uint64_t seed_;
  std::vector<SparseLinear> layers_;
};

}  // namespace perseid::examples
