#include "examples/sparse_mlp/network.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include "examples/common/fashion_mnist.h"

namespace perseid::examples {
namespace {
constexpr double kWeightStd = 0.1, kDropRate = 0.2;
}  // namespace

Network::Network(int64_t hidden, uint64_t seed) : seed_(seed) {
  const std::vector<int64_t> widths = {kImagePixels, hidden, hidden, hidden, kNumClasses};
  const c10::NoGradGuard no_grad;
  for (size_t i = 0; i + 1 < widths.size(); ++i) {
    const auto layer = static_cast<int64_t>(i);
    layers_.emplace_back(
        SparseLinearOptions(widths[i], widths[i + 1]).key(UnitKey{layer, 0, Matrix::kWeight}));
    at::Tensor& weight = layers_.back()->weight;
    kernels::fill_normal(weight.mutable_data_ptr(), weight.numel(), kernels::DType::kFloat32,
                         key_of(seed, Stream::kWeights).with(i));
    weight.mul_(kWeightStd);
    layers_.back()->bias.zero_();
  }
}

at::Tensor Network::forward(const at::Tensor& x, int64_t step) {
  at::Tensor a = x;
  for (size_t i = 0; i < layers_.size(); ++i) {
    a = layers_[i]->forward(a);
    if (i + 1 == layers_.size()) break;
    a = a.relu();
    at::Tensor uniform = at::empty(a.sizes());
    kernels::fill_uniform(
        uniform.mutable_data_ptr(), uniform.numel(), kernels::DType::kFloat32, 0, 1,
        key_of(seed_, Stream::kDropout).with(static_cast<uint64_t>(step)).with(i));
    a = a - (a * uniform.lt(kDropRate)).detach();
  }
  return a;
}

double Network::accuracy(const Images& images) {
  const c10::NoGradGuard no_grad;
  at::Tensor a = images.pixels;
  for (size_t i = 0; i < layers_.size(); ++i) {
    a = layers_[i]->forward(a);
    if (i > 0) a = a * (1 - kDropRate);
    if (i + 1 < layers_.size()) a = a.relu();
  }
  return a.argmax(1).eq(images.labels).to(at::kDouble).mean().item<double>();
}

std::vector<at::Tensor> Network::parameters() const {
  std::vector<at::Tensor> all;
  for (const SparseLinear& layer : layers_) {
    all.push_back(layer->weight);
    all.push_back(layer->bias);
  }
  return all;
}

std::vector<SparseUnit> Network::units() const {
  std::vector<SparseUnit> all;
  for (const SparseLinear& layer : layers_) all.push_back(layer->unit());
  return all;
}

}  // namespace perseid::examples
