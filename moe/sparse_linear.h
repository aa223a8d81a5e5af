#pragma once
#include <torch/arg.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>

#include "moe/sparsifier.h"

namespace perseid {

struct SparseLinearOptions {
  SparseLinearOptions(int64_t in_features, int64_t out_features)
      : in_features_(in_features), out_features_(out_features) {}
  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(UnitKey, key) = UnitKey{};  ///< tells the layers of a model apart
  TORCH_ARG(uint64_t, seed) = 0;        ///< of the first weights
  TORCH_ARG(at::ScalarType, dtype) = at::kFloat;
};

/// y = x W^T + b with a weight that a Sparsifier keeps sparse: `Sparsifier({layer->unit()}, ...)`.
/// Inactive weights are stored as 0 and get gradient 0; while an update of the masks is near, the
/// backward also gives the Sparsifier what it needs for the gradient of all of them. On the CPU, in
/// float32 and float64, a weight of density 0.1 or less costs what its active entries cost; else
/// the products are dense. Under a soft method the layer computes with the effective weight, and
/// all weights get a gradient. Without a Sparsifier it is torch::nn::Linear. Not differentiable
/// twice.
class SparseLinearImpl : public torch::nn::Module {
 public:
  SparseLinearImpl(int64_t in_features, int64_t out_features)
      : SparseLinearImpl(SparseLinearOptions(in_features, out_features)) {}
  explicit SparseLinearImpl(const SparseLinearOptions& options);

  /// @param x  [..., in_features]
  /// @return [..., out_features]
  at::Tensor forward(const at::Tensor& x);

  /// What to give to a Sparsifier; one at a time.
  SparseUnit unit() const;
  const SparseLinearOptions& options() const { return options_; }

  at::Tensor weight;  ///< [out_features, in_features]
  at::Tensor bias;    ///< [out_features], or undefined

 private:
  SparseLinearOptions options_;
  std::shared_ptr<UnitLink> link_;
};
TORCH_MODULE(SparseLinear);

}  // namespace perseid
