#pragma once
#include <cstdint>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// One step of an optimizer on the active entries of a weight, whose states hold nothing else: state
// s of entry number s in the order of positions. Inactive entries of weight and gradient are
// neither read nor written. States have the type in which sums over the weight's elements are
// formed: float64 for float64, else float32. For the host: on kCuda all throw ConfigError. Same
// bits for any thread count.

namespace perseid::kernels {

/// Positions of a block, so that threads find their states.
inline constexpr int64_t kActiveBlock = 2048;
constexpr int64_t num_active_blocks(int64_t num_positions) {
  return (num_positions + kActiveBlock - 1) / kActiveBlock;
}

/// Which entries are active.
struct ActiveEntries {
  const uint64_t* is_active = nullptr;  ///< position p is bit p % 64 of word p / 64
  int64_t num_positions = 0;
  /// [num_active_blocks + 1] active entries before each block, and all: by count_active_blocks
  const int64_t* block_starts = nullptr;
};
void count_active_blocks(const uint64_t* is_active, int64_t num_positions, int64_t* block_starts);

/// Weight and gradient [num_positions]; master [active] the weight in the type of states, or null:
/// then the weight itself has it. With a master the weight is written from it, rounded.
struct StepWeights {
  DType dtype = DType::kFloat32;  ///< any type of dispatch_dtype
  void* weight = nullptr;
  const void* grad = nullptr;
  void* master = nullptr;
};

/// torch::optim::SGD.
struct SgdStep {
  double lr = 0, momentum = 0, dampening = 0, weight_decay = 0;
  bool nesterov = false;
  bool is_first = false;  ///< the buffer starts as the gradient
};
/// @param buffer  [active] read and written; not used without momentum
void sgd_active_step(const ActiveEntries& entries, const SgdStep& step, const StepWeights& weights,
                     void* buffer, Stream stream = {});
void sgd_active_step_reference(const ActiveEntries& entries, const SgdStep& step,
                               const StepWeights& weights, void* buffer);

/// torch::optim::Adam and AdamW.
struct AdamStep {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  bool is_decoupled = false;  ///< AdamW: decay shrinks the weight, not through the gradient
  int64_t step = 1;           ///< this one's number, from 1
};
/// 1 - beta^n by n from 0 on, up to where the power vanishes beside 1. Kept between steps, as each
/// needs but one more.
struct BiasCorrections {
  std::vector<double> first, second;
  void extend(const AdamStep& step);  ///< anew if the betas have changed

 private:
  double beta1_ = -1, beta2_ = -1;
};
struct AdamStates {
  void* momentum = nullptr;           ///< [active]
  void* second_moment = nullptr;      ///< [active]
  void* max_second_moment = nullptr;  ///< [active] AMSGrad, or null
  /// [active] steps of each entry so far, which count instead of `step`; stays at 65535. Or null.
  uint16_t* age = nullptr;
  const BiasCorrections* by_age = nullptr;  ///< extended for this step; with age
};
void adam_active_step(const ActiveEntries& entries, const AdamStep& step,
                      const StepWeights& weights, const AdamStates& states, Stream stream = {});
void adam_active_step_reference(const ActiveEntries& entries, const AdamStep& step,
                                const StepWeights& weights, const AdamStates& states);

}  // namespace perseid::kernels
