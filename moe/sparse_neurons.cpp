#include "moe/sparse_neurons.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/error.h"

namespace perseid {
namespace {

constexpr const char* kSparseNeurons = "sparse_neurons";

/// matrices.size(): there is none.
size_t find_matrix(const std::vector<NeuronMatrix>& matrices, const UnitKey& key) {
  const auto place = std::lower_bound(
      matrices.begin(), matrices.end(), key,
      [](const NeuronMatrix& matrix, const UnitKey& wanted) { return matrix.key < wanted; });
  return place != matrices.end() && place->key == key
             ? static_cast<size_t>(place - matrices.begin())
             : matrices.size();
}
size_t linked_matrix(const std::vector<NeuronMatrix>& matrices, const UnitKey& key) {
  const size_t place = find_matrix(matrices, key);
  require(place < matrices.size(), kSparseNeurons, "links", to_string(key),
          "is no unit of the Sparsifier");
  return place;
}

void link_rows(HiddenLayer& layer, const std::vector<NeuronMatrix>& matrices, size_t place) {
  const NeuronMatrix &rows = matrices[place], &columns = matrices[layer.columns_of];
  require(rows.out == columns.in, kSparseNeurons, ("rows of " + rows.name).c_str(), rows.out,
          "differ from the " + to_text(columns.in) + " columns of " + columns.name +
              "; hidden unit j is row j of one and column j of the other");
  layer.rows_of.push_back(place);
  layer.width += rows.in;
}

}  // namespace

std::vector<HiddenLayer> hidden_layers(const std::vector<NeuronMatrix>& matrices,
                                       const std::vector<NeuronLink>& links) {
  std::vector<HiddenLayer> layers;
  const auto start = [&](size_t columns_of) {
    HiddenLayer layer;
    layer.columns_of = columns_of;
    layer.size = matrices[columns_of].in;
    layer.width = matrices[columns_of].out;
    return layer;
  };
  for (size_t w2 = 0; w2 < matrices.size(); ++w2) {
    if (matrices[w2].key.matrix != Matrix::kW2) continue;
    HiddenLayer layer = start(w2);
    for (const Matrix matrix : {Matrix::kW1, Matrix::kW3}) {
      UnitKey key = matrices[w2].key;
      key.matrix = matrix;
      const size_t place = find_matrix(matrices, key);
      if (place < matrices.size()) link_rows(layer, matrices, place);
    }
    if (!layer.rows_of.empty()) layers.push_back(layer);
  }
  for (const NeuronLink& link : links) {
    HiddenLayer layer = start(linked_matrix(matrices, link.columns_of));
    link_rows(layer, matrices, linked_matrix(matrices, link.rows_of));
    layers.push_back(layer);
  }
  std::vector<bool> has_rows(matrices.size(), false), has_columns(matrices.size(), false);
  for (const HiddenLayer& layer : layers) {
    const auto take = [&](std::vector<bool>& is_taken, size_t place, const char* what) {
      require(!is_taken[place], kSparseNeurons, "links", matrices[place].name,
              std::string("has its ") + what + " in two of them");
      is_taken[place] = true;
    };
    take(has_columns, layer.columns_of, "columns");
    for (const size_t place : layer.rows_of) take(has_rows, place, "rows");
  }
  return layers;
}

PackedMask crossings(int64_t out, int64_t in, const PackedMask* rows, const PackedMask* columns) {
  const PackedMask row = columns != nullptr ? *columns : PackedMask::full(1, in);
  PackedMask result(out, in);
  for (int64_t r = 0; r < out; ++r) {
    if (rows == nullptr || rows->test(r)) result.set_rows(r, row);
  }
  return result;
}

PackedMask active_rows(const PackedMask& mask) {
  std::vector<int64_t> counts(static_cast<size_t>(mask.rows()));
  kernels::count_atoms({mask.rows(), mask.cols()}, mask.data(), counts.data());
  PackedMask result(1, mask.rows());
  for (int64_t row = 0; row < mask.rows(); ++row) {
    if (counts[static_cast<size_t>(row)] > 0) result.set(row, true);
  }
  return result;
}

PackedMask active_columns(const PackedMask& mask) {
  PackedMask result(1, mask.cols());
  for (size_t w = 0; w < mask.words().size(); ++w) {
    for (uint64_t left = mask.words()[w]; left != 0; left &= left - 1) {
      const int64_t place = static_cast<int64_t>(w) * 64 + std::countr_zero(left);
      result.set(place % mask.cols(), true);
    }
  }
  return result;
}

at::Tensor fresh_rows(const std::vector<int64_t>& places, const PackedMask& columns,
                      kernels::RandomKey key) {
  const int64_t in = columns.cols();
  const double bound = 1 / std::sqrt(static_cast<double>(std::max<int64_t>(columns.count(), 1)));
  const at::Tensor result = at::zeros({static_cast<int64_t>(places.size()), in}, at::kDouble);
  for (size_t i = 0; i < places.size(); ++i) {
    double* const row = result.mutable_data_ptr<double>() + static_cast<int64_t>(i) * in;
    kernels::fill_uniform(row, in, kernels::DType::kFloat64, -bound, bound,
                          key.with(static_cast<uint64_t>(places[i])));
    for (int64_t col = 0; col < in; ++col) {
      if (!columns.test(col)) row[col] = 0;
    }
  }
  return result;
}

}  // namespace perseid
