#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "moe/sparse_budget.h"
#include "moe/sparse_mask.h"
#include "moe/sparse_structure.h"

// Soft methods: parameters stay dense, and a layer computes with an effective weight made from the
// largest of them, Pi = the budget's largest |w| of each cell (N:M: the N largest of each group of
// M). What changes over the training is a function of the step.

namespace perseid {

enum class ForwardMethod : uint8_t {
  kHard,            ///< inactive weights are 0 and stay so until an update of the mask
  kSte,             ///< W * Pi, and W gets the gradient of the product (straight through)
  kSrSte,           ///< so, and inactive weights decay (Zhou et al. 2021)
  kMaskDecay,       ///< W * (Pi + decay (1 - Pi)) with a falling decay (MdGf)
  kStructureDecay,  ///< W * Pi, where N:M changes from frame to frame (SdGf)
  kTopKast,         ///< W * Pi; the gradient reaches the weights of a larger set (Jayakumar 2020)
};
/// Decay t steps after the dense ones.
enum class MaskDecay : uint8_t {
  kLinear,       ///< max(0, 1 - rate t)
  kExponential,  ///< exp(-rate t)
};
/// Gradient of an inactive weight in kMaskDecay and kStructureDecay.
enum class InactiveGradient : uint8_t {
  kSte,     ///< that of the effective weight
  kScaled,  ///< times what the weight is multiplied by: the derivative, for a fixed Pi
};

/// N of M neighbours along `in`.
struct NmFrame {
  int64_t n = 1;
  int64_t m = 1;
  friend bool operator==(const NmFrame&, const NmFrame&) = default;
};

struct Forward {
  ForwardMethod method = ForwardMethod::kHard;
  int64_t dense_steps = 0;  ///< the first steps use W itself; not with kTopKast
  int64_t every = 1;        ///< steps between two choices of Pi; a new frame is one, too
  /// kSrSte: lambda (1 - Pi) W is added to the gradient of W. kTopKast: factor of top_kast_loss.
  double lambda = 2e-4;
  /// kSrSte: instead W shrinks by learning rate * lambda before the optimizer's step, so that an
  /// optimizer that rescales gradients does not rescale it.
  bool decoupled = false;
  MaskDecay decay = MaskDecay::kExponential;
  double decay_rate = 1e-4;
  InactiveGradient inactive = InactiveGradient::kSte;
  double fine_tune = 0;          ///< kMaskDecay: share of the steps, the last, with decay 0
  int64_t total_steps = 0;       ///< needed for fine_tune and frames only
  std::vector<NmFrame> frames;   ///< kStructureDecay, of equal length; the last is the structure's
  Density backward_extra = 0.1;  ///< kTopKast: what the gradient reaches beyond the budget

  bool is_soft() const { return method != ForwardMethod::kHard; }
};
/// Every field that changes the training, each with a space before it; nothing for kHard.
std::ostream& operator<<(std::ostream& out, const Forward& forward);

/// Throws ConfigError that names the field: numbers out of range, frames that do not end with the
/// structure's N:M, atoms of several weights.
void validate(const Forward& forward, const Structure& structure);

/// Frames of kStructureDecay. M stays and N is M - 1, then M/2, M/4, ..., N. M/N is a power of 2.
std::vector<NmFrame> stepwise_frames(int64_t n, int64_t m);
std::vector<NmFrame> geometric_frames(int64_t n, int64_t m);  ///< 8N:8M, 4N:4M, 2N:2M, N:M
std::vector<NmFrame> densify_frames(int64_t n, int64_t m);    ///< N:8M, N:4M, N:2M, N:M

// Functions of the step.

/// Whether W itself is used.
bool is_dense_step(const Forward& forward, int64_t step);
/// Number of the frame of a step: dense steps belong to the first, steps beyond the end to the
/// last.
int64_t frame_index(const Forward& forward, int64_t step);
/// What inactive weights are multiplied by: 1 in a dense step.
double inactive_factor(const Forward& forward, int64_t step);
/// Whether a Pi that was chosen in `chosen_step` (-1: before the first step) is replaced.
bool is_choice_due(const Forward& forward, int64_t step, int64_t chosen_step);

/// Marks the k largest |w| of each cell; equal ones with the smaller index.
/// @param weight  [out, in]
/// @param cells   of single weights
/// Throws Diverged that names `name`, `layer` and `step` for a NaN or an infinity.
PackedMask largest_weights(const at::Tensor& weight, const kernels::AtomCells& cells, int64_t k,
                           const std::string& name, int64_t layer, int64_t step);

/// What the effective weight of one unit is made of in a step.
struct SoftMask {
  PackedMask active;             ///< Pi; all in a dense step
  PackedMask backward;           ///< kTopKast: what the gradient reaches; else empty
  int64_t chosen_step = -1;      ///< of these
  at::Tensor is_active;          ///< [out, in] bool, where the weight is
  at::Tensor is_reached;         ///< so, of `backward`; undefined without
  double inactive_factor = 1;    ///< of the forward
  double inactive_gradient = 1;  ///< of the backward
};
/// Cells and number of a step. With frames they change.
AtomLayout layout_at(const Forward& forward, const AtomLayout& layout, int64_t step);
/// @param nnz  active weights that the budget gives to this unit
SoftMask choose_soft_mask(const Forward& forward, const AtomLayout& layout, int64_t nnz,
                          const at::Tensor& weight, int64_t step, const std::string& name,
                          int64_t layer);
/// Of bits that were saved: all but the choice itself. Throws ConfigError if `active` or `backward`
/// does not have the number of active weights that `chosen_step` asks for in each cell.
SoftMask restore_soft_mask(const Forward& forward, const AtomLayout& layout, int64_t nnz,
                           PackedMask active, PackedMask backward, int64_t chosen_step,
                           const at::Tensor& weight, const std::string& name);
/// Sets the factors to those of a step.
void set_factors(const Forward& forward, int64_t step, SoftMask& mask);

/// weight * (Pi + factor (1 - Pi)), differentiable by `weight` [out, in]; the weight itself where
/// nothing is changed.
at::Tensor effective_weight(const at::Tensor& weight, const SoftMask& mask);

/// lambda (|w|^2 over Pi / 2 + |w|^2 over backward without Pi / (2 d)), d the density of Pi.
/// Differentiable; the same term is in add_gradient_term.
at::Tensor top_kast_loss(const at::Tensor& weight, const SoftMask& mask, double lambda);

/// Adds what the method adds to a gradient once in a step, whatever the number of passes and ranks:
/// the decay of kSrSte unless decoupled, the gradient of top_kast_loss.
/// @param weight    [out, in] detached
/// @param gradient  [out, in] of it
void add_gradient_term(const Forward& forward, const SoftMask& mask, const at::Tensor& weight,
                       const at::Tensor& gradient);
/// kSrSte, decoupled: inactive entries of `weight` times 1 - learning_rate * lambda.
void decay_inactive(const Forward& forward, const SoftMask& mask, double learning_rate,
                    const at::Tensor& weight);

}  // namespace perseid
