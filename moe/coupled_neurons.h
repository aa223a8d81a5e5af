#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "kernels/activation.h"
#include "kernels/random.h"
#include "moe/sparse_mask.h"
#include "moe/sparse_optimizer.h"

// Hidden units of an expert, switched as a whole: {row j of W1, row j of W3, column j of W2}. What
// is active then is a smaller dense expert, without indices.
//
// With all three parts 0 every gradient of a unit is 0, so none would ever be grown for its
// gradient. Candidates get fresh random rows instead, and column 0: the expert's output does not
// change, and their score is the gradient of that column.

namespace perseid {

/// One expert without biases; tensors may be views of the experts of a layer.
struct ExpertWeights {
  at::Tensor w1;  ///< [F, D]
  at::Tensor w3;  ///< [F, D]; undefined: a plain expert, f(x W1^T) W2^T
  at::Tensor w2;  ///< [d_out, F]
};
/// Of expert `slot` of GroupedMLP's up_proj and down_proj.
ExpertWeights expert_weights(const at::Tensor& up_proj, const at::Tensor& down_proj, bool gated,
                             int64_t slot);

/// Frobenius norms of the three parts together.
/// @return [F] float32
at::Tensor neuron_scores(const ExpertWeights& expert);

/// Rows for new units, uniform in +-1/sqrt(D) as those of new experts.
struct NeuronCandidates {
  at::Tensor w1;  ///< [C, D]
  at::Tensor w3;  ///< [C, D] or undefined
};
NeuronCandidates draw_neurons(int64_t count, const ExpertWeights& like, kernels::RandomKey key);

/// Norm of the gradient of each candidate's column of W2, sum over rows of delta_t h_tj.
/// @param x      [N, D] rows of this expert
/// @param delta  [N, d_out] gradients of its outputs for them, routing weights included
/// @return [C] float32
at::Tensor candidate_scores(const NeuronCandidates& candidates, kernels::Activation activation,
                            const at::Tensor& x, const at::Tensor& delta);

struct NeuronUpdate {
  PackedMask active;             ///< [1, F] afterwards; the one before if nothing is done
  std::vector<int64_t> dropped;  ///< rising
  std::vector<int64_t> grown;    ///< units that were inactive before, rising
  int64_t num_non_finite = 0;    ///< scores that are NaN or infinite: nothing is done
  bool has_no_gradient = false;  ///< fewer candidates than wanted score above 0: nothing is done
};

struct NeuronRule {
  kernels::Activation activation = kernels::Activation::kSilu;
  double fraction = 0.3;              ///< of the active units that change, rounded down
  int64_t candidates_per_neuron = 4;  ///< drawn for each unit that is to be grown
};

/// Drops the units of smallest score and grows as many, the best candidates, in places that were
/// inactive before; never more than there are such places. Writes the expert: dropped units become
/// 0, grown ones get the rows of their candidate and column 0.
NeuronUpdate update_neurons(const ExpertWeights& expert, const PackedMask& active,
                            const NeuronRule& rule, const at::Tensor& x, const at::Tensor& delta,
                            kernels::RandomKey key);

/// Smaller dense experts of the active units, in their order, then units of 0.
struct CompactExperts {
  at::Tensor up_proj;    ///< [L, 2F' or F', D]
  at::Tensor down_proj;  ///< [L, d_out, F']
  at::Tensor units;      ///< [L, F'] int64 which unit each was; -1: none
};
/// F' is the largest number of active units of an expert, rounded up to `multiple` but at most F.
/// @param active  [L] masks [1, F]
CompactExperts compact_experts(const at::Tensor& up_proj, const at::Tensor& down_proj, bool gated,
                               const std::vector<PackedMask>& active, int64_t multiple = 16);

struct CoupledNeuronsOptions {
  bool gated = true;
  int64_t num_active = 0;  ///< units of each expert, 1 or more
  NeuronRule rule;
  uint64_t seed = 0;
  int64_t layer_id = 0;
  std::vector<int64_t> expert_ids;  ///< [L] global ids, by slot
};

/// Keeps the experts of a layer at a fixed number of hidden units, and moves them. Inactive units
/// are stored as 0.
class CoupledNeurons {
 public:
  /// Draws the first units and sets the others to 0.
  /// @param up_proj    [L, 2F or F, D] and
  /// @param down_proj  [L, d_out, F] of a GroupedMLP without biases; it must outlive this
  CoupledNeurons(const at::Tensor& up_proj, const at::Tensor& down_proj,
                 CoupledNeuronsOptions options);

  /// Compresses the states of both parameters to active units. The optimizer must outlive this.
  void attach(CompressedStates& optimizer, GrownSecondMoment policy = GrownSecondMoment::kMean);

  /// Gradients of inactive units become 0. After backward, before clipping and the step; without
  /// an attached optimizer the step must leave weights of gradient 0 alone.
  void mask_gradients() const;

  /// After a step, with rows and gradients of the expert in some pass. Throws Diverged that names
  /// the expert for scores that are not finite.
  NeuronUpdate update(int64_t slot, int64_t step, const at::Tensor& x, const at::Tensor& delta);

  const PackedMask& active(int64_t slot) const;   ///< [1, F]
  PackedMask up_positions(int64_t slot) const;    ///< [2F or F, D] active entries
  PackedMask down_positions(int64_t slot) const;  ///< [d_out, F]
  CompactExperts compact(int64_t multiple = 16) const;

 private:
  at::Tensor up_proj_;
  at::Tensor down_proj_;
  CoupledNeuronsOptions options_;
  std::vector<PackedMask> active_;
  CompressedStates* optimizer_ = nullptr;
  GrownSecondMoment policy_ = GrownSecondMoment::kMean;
};

}  // namespace perseid
