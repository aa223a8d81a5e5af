#pragma once
#include <memory>
#include <vector>

#include "examples/train_fashion/optimizer.h"
#include "examples/train_fashion/train.h"
#include "moe/moe_layer.h"
#include "moe/sparsifier.h"

namespace perseid::examples {

/// What the options ask for in a run of `num_steps` steps, which is not SparseMethod::kNone.
SparsifierConfig sparsifier_config(const TrainOptions& options, int64_t num_steps);

/// Sparse experts, for the training loops of both tasks; nothing with SparseMethod::kNone. All is
/// collective.
class SparseExperts {
 public:
  /// @param optimizer  of the experts; it outlives this, as the layer does
  SparseExperts(const MoELayer& layer, GateAdam& optimizer, const TrainOptions& options,
                int64_t num_steps);

  void before_step(int64_t step);
  void after_backward(int64_t step);  ///< once gradients are summed
  void after_step(int64_t step);
  SparsityResult result() const;
  /// Adds the masks, 0 and 1, by the names of their keys.
  void add_masks(std::vector<WeightDump>& dumps) const;

 private:
  std::unique_ptr<Sparsifier> sparsifier_;
};

}  // namespace perseid::examples
