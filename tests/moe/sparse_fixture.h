#pragma once
#include <ATen/ATen.h>
#include <torch/optim/optimizer.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/random.h"
#include "moe/sparsifier.h"

// What tests of sparse weights share.

namespace perseid::testing {

/// Standard normal numbers, drawn in float64.
inline at::Tensor normal(at::IntArrayRef sizes, uint64_t seed, at::ScalarType type = at::kDouble) {
  const at::Tensor result = at::empty(sizes, at::kDouble);
  kernels::fill_normal(result.data_ptr<double>(), result.numel(), kernels::DType::kFloat64,
                       kernels::random_key(seed));
  return result.to(type);
}

inline SparseUnit unit_of(const at::Tensor& parameter, int64_t layer) {
  SparseUnit unit;
  unit.name = "layer" + std::to_string(layer);
  unit.key = {layer, 0, Matrix::kWeight};
  unit.parameter = parameter;
  return unit;
}

/// tanh(x W0^T) W1^T against fixed targets.
struct TwoWeights {
  at::Tensor w0 = normal({11, 7}, 1).requires_grad_(true);
  at::Tensor w1 = normal({5, 11}, 2).requires_grad_(true);
  std::vector<SparseUnit> units() const { return {unit_of(w0, 0), unit_of(w1, 1)}; }
  std::vector<at::Tensor> parameters() const { return {w0, w1}; }
  void backward(int64_t step) const {
    const at::Tensor x = normal({6, 7}, 100 + static_cast<uint64_t>(step));
    const at::Tensor y = normal({6, 5}, 999);
    (x.mm(w0.t()).tanh().mm(w1.t()) - y).square().sum().backward();
  }
};

/// One step of a model with backward(step). @return what was updated, whatever the order
template <typename Model>
std::vector<UnitUpdate> train_step(Model& model, Sparsifier& sparsifier,
                                   torch::optim::Optimizer& optimizer, int64_t step) {
  sparsifier.begin_step(step);
  optimizer.zero_grad();
  model.backward(step);
  std::vector<UnitUpdate> updates = sparsifier.end_backward(step).units;
  optimizer.step();
  const std::vector<UnitUpdate> late = sparsifier.end_step(step).units;
  updates.insert(updates.end(), late.begin(), late.end());
  return updates;
}

/// Active atoms of each cell.
inline std::vector<int64_t> cell_counts(const AtomLayout& layout, const PackedMask& mask) {
  std::vector<int64_t> counts(static_cast<size_t>(layout.cells.num_cells));
  kernels::count_atoms(layout.cells, mask.data(), counts.data());
  return counts;
}

}  // namespace perseid::testing
