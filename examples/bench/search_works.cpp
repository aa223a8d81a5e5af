#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <memory>

#include "examples/bench/kernel_bench.h"
#include "kernels/doubly_stochastic.h"
#include "moe/tensor_types.h"

namespace perseid::bench {
namespace {

/// Scores as a permutation search starts with them, U(-0.05, 0.05), at its first temperature.
struct Search {
  kernels::DoublyStochasticShape shape;
  kernels::DoublyStochasticOptions options;
  kernels::Stream stream;
  at::Tensor scores;         ///< [n, n] float32, a leaf
  at::Tensor grad_pi;        ///< [n, n]
  at::Tensor pi, grad;       ///< [n, n]
  at::Tensor rows, columns;  ///< [iterations, n] float64
  at::Tensor torch_pi;       ///< LibTorch's, with its graph

  void forward() const {
    kernels::doubly_stochastic(shape, options, kernels::DType::kFloat32, data_of(scores),
                               mutable_data_of(pi), rows.mutable_data_ptr<double>(),
                               columns.mutable_data_ptr<double>(), stream);
  }
  void backward() const {
    kernels::doubly_stochastic_backward(
        shape, options, kernels::DType::kFloat32, data_of(scores), rows.const_data_ptr<double>(),
        columns.const_data_ptr<double>(), data_of(grad_pi), mutable_data_of(grad), stream);
  }
  at::Tensor torch_forward() const {
    at::Tensor x = scores.to(at::kDouble) / options.temperature;
    for (int64_t t = 0; t < options.iterations; ++t) {
      x = x - x.logsumexp(1, true);
      x = x - x.logsumexp(0, true);
    }
    return x.exp().to(at::kFloat);
  }
  at::Tensor torch_backward() const {
    return torch::autograd::grad({torch_pi}, {scores}, {grad_pi}, /*retain_graph=*/true).front();
  }
};

std::shared_ptr<Search> make_search(int64_t n, const Place& place, uint64_t seed) {
  const auto floats = at::TensorOptions(at::kFloat).device(place.tensors());
  at::manual_seed(seed);
  auto search = std::make_shared<Search>();
  search->shape = {1, n};
  search->options = {1e-3, kSearchIterations};
  search->stream = place.stream();
  search->scores = (at::rand({n, n}, floats) * 0.1 - 0.05).requires_grad_();
  search->grad_pi = at::randn({n, n}, floats);
  search->pi = at::empty({n, n}, floats);
  search->grad = at::empty({n, n}, floats);
  search->rows = at::empty({kSearchIterations, n}, floats.dtype(at::kDouble));
  search->columns = at::empty_like(search->rows);
  search->torch_pi = search->torch_forward();
  return search;
}

}  // namespace

std::vector<LayerCase> search_cases() {
  std::vector<LayerCase> cases;
  for (const int64_t n : {16, 64, 256}) {
    LayerCase shape;
    shape.num_experts = n;
    cases.push_back(shape);
  }
  return cases;
}

std::vector<Work> search_works(const LayerCase& shape, const Place& place, uint64_t seed) {
  constexpr double kTolerance = 1e-5;
  const auto search = make_search(shape.num_experts, place, seed);
  search->forward();
  search->backward();
  require_close(search->pi, search->torch_pi.detach(), kTolerance, "search", "pi");
  require_close(search->grad, search->torch_backward(), kTolerance, "search", "grad_scores");
  const double elements = static_cast<double>(shape.num_experts * shape.num_experts);
  const double potentials = 16.0 * static_cast<double>(shape.num_experts * kSearchIterations);
  const double products = 2 * elements * static_cast<double>(kSearchIterations);
  enum : size_t { kTorch = 1, kTorchBackward = 3 };
  return {{"doubly_stochastic", 8 * elements + potentials, 2 * products, kTorch,
           [search] { search->forward(); }},
          {"logsumexp, sub", 8 * elements + potentials, 2 * products, kTorch,
           [search] {
             const at::NoGradGuard no_grad;
             search->torch_forward();
           }},
          {"doubly_stochastic_backward", 12 * elements + potentials, 4 * products, kTorchBackward,
           [search] { search->backward(); }},
          {"its autograd", 12 * elements + potentials, 4 * products, kTorchBackward,
           [search] { search->torch_backward(); }}};
}

}  // namespace perseid::bench
