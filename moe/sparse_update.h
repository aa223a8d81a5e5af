#pragma once
#include <cstdint>
#include <vector>

#include "kernels/random.h"
#include "moe/sparse_mask.h"
#include "moe/sparse_structure.h"

// One update of a mask: atoms are dropped and as many grown, so that every cell keeps its number.
// Pure functions of scores, masks and keys.

namespace perseid {

enum class DropCriterion : uint8_t {
  kMagnitude,  ///< the smallest scores go
  kSetSigned,  ///< the same fraction of the positive weights and of the negative ones, nearest to 0
  // g: gradient of active entries in the masked product, the mean over the grad_accum steps that
  // end with the update's; as the step leaves it, summed over ranks, before anyone clips it.
  kMest,    ///< the smallest |w| + mest_lambda |g| go
  kTaylor,  ///< the smallest (w g)^2 go: what the loss would change, to first order
};
enum class GrowCriterion : uint8_t {
  kRandom,   ///< any
  kGrad,     ///< the largest scores, never one of 0
  kUnfired,  ///< those that were never active, any of them; then the others
  // As kGrad, by the magnitude of:
  kMomentum,     ///< a moving average of the gradient of all entries, over all steps until `end`
  kSampledGrad,  ///< the gradient, of inactive atoms that are drawn for the update alone
  /// Gradient^2 / L of each atom, L being the sum of squares of its inputs over the rows: the
  /// progress that its block of coordinates guarantees. Needs a link.
  kGreedyProgress,
  /// None: the fraction is not dropped either, only what the target has too many of, in each cell
  /// by itself (gradual magnitude pruning).
  kNone,
};

struct UpdateRule {
  DropCriterion drop = DropCriterion::kMagnitude;
  GrowCriterion grow = GrowCriterion::kRandom;
  /// Share of the grown that kRandom chooses, after `grow` has chosen the others: "mixed".
  double random_share = 0;
  /// True: a dropped atom is not grown again by the same update. False: it may be, and then it
  /// counts as untouched.
  bool exclude_just_dropped = true;
  double mest_lambda = 1;       ///< kMest, 0 or more
  double momentum_decay = 0.9;  ///< kMomentum: average = decay average + (1 - decay) gradient
  /// kSampledGrad: atoms that are drawn for each that grows, at least 1. Cells that keep their own
  /// number get at least as many as they could lose.
  double candidates_per_grown = 4;
};

/// Whether atoms are grown by scores.
bool grows_by_score(GrowCriterion grow);
/// Whether drop scores need gradients.
bool drops_by_gradient(DropCriterion drop);
/// Throws ConfigError that names the field.
void validate(const UpdateRule& rule);

struct UpdateInput {
  const PackedMask* active = nullptr;
  /// [num_atoms] read at active atoms: kSetSigned the weights, of atoms that are one position each;
  /// else scores, whose sign does not count.
  const float* drop_scores = nullptr;
  /// [num_atoms] scores, whose sign does not count, read at inactive atoms, and at dropped ones if
  /// they may grow. kSampledGrad: those of `candidates` alone, one after the other.
  const float* grow_scores = nullptr;
  const PackedMask* candidates = nullptr;   ///< kSampledGrad: inactive atoms, the only ones to grow
  const PackedMask* ever_active = nullptr;  ///< kUnfired: atoms that were active before
  double fraction = 0;                      ///< share of the active atoms that change, in [0, 1]
  int64_t target = -1;  ///< active atoms afterwards, a multiple of the cells; -1: as many as now
  /// Atoms of the unit that change, on top of what the target takes or gives; -1: floor(fraction *
  /// active). Not with kSetSigned, which counts signs.
  int64_t num_grow = -1;
  /// [cells] active atoms of each afterwards, instead of `target`; null: equal cells.
  const std::vector<int64_t>* cell_targets = nullptr;
  /// Atoms that go whatever their score and do not come, unless nothing else can keep the budget;
  /// null: none.
  const PackedMask* barred = nullptr;
  kernels::RandomKey drop_key, grow_key, random_key;
};

struct MaskUpdate {
  PackedMask mask;     ///< afterwards; the one before if nothing is done
  PackedMask dropped;  ///< active before and not after
  PackedMask grown;    ///< active after and not before
  int64_t num_dropped = 0;
  int64_t num_grown = 0;
  int64_t num_non_finite = 0;  ///< NaN and infinite scores that were looked at: nothing is done
  /// Every eligible grow score is 0, or kTaylor's of each active atom: nothing is done.
  bool has_no_gradient = false;
};

/// floor(fraction * count): how many of so many change.
int64_t share_of(double fraction, int64_t count);

/// Drops floor(fraction * active) atoms of the unit, or the fraction of each sign, plus those that
/// `target` has too many of, and those that cells have too many of; then each cell grows what it
/// lacks. Where a cell cannot grow enough, the best of its dropped atoms stay, then any come: the
/// budget comes first. Cells need not have been equal before.
/// Throws ConfigError for a fraction outside [0, 1] or a target that the cells cannot share
/// equally.
MaskUpdate update_mask(const AtomLayout& layout, const UpdateRule& rule, const UpdateInput& input);

}  // namespace perseid
