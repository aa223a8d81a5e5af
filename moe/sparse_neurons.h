#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/random.h"
#include "moe/sparse_mask.h"
#include "moe/sparse_unit.h"

// Hidden units: what is computed by row j of some weights and read by column j of another. With
// Structure::coupled_neurons() a Sparsifier switches them as a whole; neuron ablation frees the
// columns of those that are always 0.
//
// Coupled neurons in training. A hidden unit whose rows and column are 0 has gradient 0, so none
// would ever come for its gradient. In the steps whose gradient counts for an update some inactive
// units are candidates: their rows hold fresh random weights, their column 0. So no output changes,
// and the gradient of that column, sum over tokens of delta_t h_tj, tells what the unit would be
// worth: its norm is the score. Candidates stand in the weights from begin_step to end_backward
// only and are functions of seed, step of the update, unit and mask; the optimizer never sees them.
// A grown unit keeps its rows and starts with column 0: an update changes outputs by what it drops
// alone, and the column has a gradient from the next backward on.
//
// Nothing of this needs to know the activation: the layer computes h itself. Experts without W3
// have one row per unit; an activation with f(0) != 0, or a bias, gives inactive units a value,
// which their zero columns discard. Biases of hidden units are left as they are: a candidate is
// scored with that of its place.

namespace perseid {

/// Hidden unit j is row j of one weight and column j of the other.
struct NeuronLink {
  UnitKey rows_of;
  UnitKey columns_of;
};

struct Neurons {
  /// Coupled neurons with grow = grad: candidates of an update for each unit that is to be grown,
  /// as far as there are inactive units.
  int64_t candidates = 4;
  /// Of weights outside of experts; those of experts are known: rows of w1 and w3, columns of w2. A
  /// weight between two hidden layers is in two links and active where row and column are.
  std::vector<NeuronLink> links;
};

struct NeuronMatrix {
  UnitKey key;
  std::string name;
  int64_t out = 0;
  int64_t in = 0;
};

/// Hidden units of one expert or between two weights.
struct HiddenLayer {
  std::vector<size_t> rows_of;  ///< which matrices
  size_t columns_of = 0;
  int64_t size = 0;        ///< F, active and inactive ones
  int64_t width = 0;       ///< weights of one: its rows and its column
  int64_t num_active = 0;  ///< for the caller
};

/// Of all experts with a w2 and at least one of w1 and w3, then of `links`. Throws ConfigError for
/// sizes that differ, a link to a matrix that is not there, and one that is linked twice.
/// @param matrices  ordered by key
std::vector<HiddenLayer> hidden_layers(const std::vector<NeuronMatrix>& matrices,
                                       const std::vector<NeuronLink>& links);

/// Entries [out, in] whose row and column are active.
/// @param rows     [1, out]; null: all
/// @param columns  [1, in]; null: all
PackedMask crossings(int64_t out, int64_t in, const PackedMask* rows, const PackedMask* columns);
PackedMask active_rows(const PackedMask& mask);     ///< [1, out] with an entry
PackedMask active_columns(const PackedMask& mask);  ///< [1, in]

/// Rows for units that come: uniform in +-1/sqrt(active columns), 0 elsewhere. A row depends on its
/// place, not on the other places.
/// @param columns  [1, in] active ones
/// @return [places, in] float64 on the host
at::Tensor fresh_rows(const std::vector<int64_t>& places, const PackedMask& columns,
                      kernels::RandomKey key);

}  // namespace perseid
