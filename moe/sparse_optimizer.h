#pragma once
#include <ATen/core/Tensor.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <cstdint>
#include <vector>

#include "kernels/active_step.h"
#include "moe/sparse_mask.h"
#include "moe/sparsifier.h"

// LibTorch's optimizers with states for active weights only. They are its own classes with another
// step() for the parameters whose states are compressed: learning-rate schedulers, zero_grad,
// groups and options are inherited, and other parameters are updated by LibTorch's code.
//
//   SparseAdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-3));
//   Sparsifier sparsifier(units, config);
//   sparsifier.attach(optimizer);  // compresses the states of its units

namespace perseid {

/// States of the active entries of one weight, in the order of positions; [active], float64 for
/// float64 weights, else float32. Undefined: not there, or not yet.
struct ActiveStates {
  PackedMask positions;
  std::vector<int64_t> block_starts;  ///< for kernels::ActiveEntries
  at::Tensor master;                  ///< the weight before rounding; of weights of 16 bits
  at::Tensor momentum;
  at::Tensor second_moment;
  at::Tensor max_second_moment;  ///< AMSGrad
  at::Tensor age;                ///< uint16, steps of each entry; GrownSecondMoment::kAge
};

/// A new mask for the states of one weight.
struct StateChange {
  PackedMask positions;
  GrownSecondMoment policy = GrownSecondMoment::kZero;
  /// Rows [first_row, first_row + num_rows) of the weight, num_rows = -1: all. New entries lie in
  /// them, and kMean is the mean over what stays there.
  int64_t first_row = 0;
  int64_t num_rows = -1;
  at::Tensor gradient = {};  ///< of these rows, read at new entries under kGradient
};

/// What the states of an optimizer with compressed states have in common; a Sparsifier calls it.
/// Weights are dense tensors on the host, contiguous, of any type of dtype_of; entries outside
/// the mask are never read or written. Weights of 16 bits get a float32 master copy, so that with
/// Adam an active weight has 12 bytes of states and an inactive one a bit.
class CompressedStates {
 public:
  virtual ~CompressedStates() = default;

  /// From now on the states of parameter[slot] (-1: of the parameter) are those of `positions`;
  /// other slots of the parameter have all positions until they are compressed, too. Before the
  /// parameter's first step.
  /// @param positions  as many places as the weight has elements
  /// @param keeps_age  Adam's bias correction counts the steps of each entry instead of all steps
  /// Throws ConfigError for a parameter that is not of this optimizer, has other states already, or
  /// is not as described above.
  void compress(const at::Tensor& parameter, int64_t slot, PackedMask positions,
                bool keeps_age = false);

  /// Entries that stay keep their states bit for bit, those that go lose them, new ones start with
  /// momentum 0 and age 0, the second moment of the policy, and as master the weight's value.
  void change_mask(const at::Tensor& parameter, int64_t slot, StateChange change);

  bool is_compressed(const at::Tensor& parameter) const;
  const ActiveStates& active_states(const at::Tensor& parameter, int64_t slot = -1) const;
  /// Of all compressed states with their masks, not counting LibTorch's of other parameters.
  int64_t state_bytes() const;

 protected:
  struct Parameter {
    at::Tensor tensor;
    int64_t step = 0;
    std::vector<ActiveStates> slots;       ///< one of a weight without slots
    kernels::BiasCorrections by_age = {};  ///< for those with age
  };
  Parameter* find(const at::Tensor& parameter);
  void write(torch::serialize::OutputArchive& archive) const;
  void read(torch::serialize::InputArchive& archive);
  std::vector<Parameter> compressed_;

 private:
  virtual const torch::optim::Optimizer& as_optimizer() const = 0;
};

/// @tparam Base  torch::optim::SGD, Adam or AdamW
template <typename Base>
class WithCompressedStates final : public Base, public CompressedStates {
 public:
  using Base::Base;
  at::Tensor step(torch::optim::Optimizer::LossClosure closure = nullptr) override;
  /// Also the compressed states, with their masks.
  void save(torch::serialize::OutputArchive& archive) const override;
  /// Into an optimizer whose parameters are compressed with the same masks, so load the Sparsifier
  /// first. Throws ConfigError for other masks.
  void load(torch::serialize::InputArchive& archive) override;

 private:
  const torch::optim::Optimizer& as_optimizer() const override { return *this; }
};
using SparseSGD = WithCompressedStates<torch::optim::SGD>;
using SparseAdam = WithCompressedStates<torch::optim::Adam>;
using SparseAdamW = WithCompressedStates<torch::optim::AdamW>;
extern template class WithCompressedStates<torch::optim::SGD>;
extern template class WithCompressedStates<torch::optim::Adam>;
extern template class WithCompressedStates<torch::optim::AdamW>;

}  // namespace perseid
