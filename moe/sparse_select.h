#pragma once
#include <cstdint>
#include <vector>

#include "comm/group.h"
#include "moe/sparse_update.h"

// Internal: one selection over the units of all ranks, and the update of their masks that is made
// of such selections. Nothing depends on the number of ranks or on who holds what.

namespace perseid {

/// A unit of this rank, among those of all ranks.
struct SelectPart {
  int64_t place = 0;              ///< of the unit among all
  int64_t first_atom = 0;         ///< of the unit: the atoms of those before it
  bool is_counted = true;         ///< true on one of the ranks that hold it
  const float* scores = nullptr;  ///< [num_atoms] read at candidates; null: all are equal
  const PackedMask* candidates = nullptr;
};
struct PartSelection {
  std::vector<PackedMask> masks;  ///< of each part
  int64_t num_selected = 0;       ///< of all ranks
};

/// Exactly min(k, candidates of all ranks) candidates: those that come first in the order, equal
/// scores by their number among all atoms, mixed with `key`; the set of kernels::select_atoms
/// on all units one after another. NaN comes last. Collective over `group`, with the same order, k
/// and key on all ranks, also on one without units.
/// Sends at most 8 times 256 counts, and once one for each unit if more than 2^32 atoms have ties.
/// @param num_units  of all ranks
PartSelection select_over_ranks(const std::vector<SelectPart>& parts, kernels::AtomOrder order,
                                int64_t k, kernels::RandomKey key, int64_t num_units,
                                const comm::Group& group, const comm::CallSite& site = {});

/// A unit of this rank in an update of all.
struct UpdatePart {
  int64_t place = 0;
  int64_t first_atom = 0;
  bool is_counted = true;
  /// It loses what the target takes from all, and nothing else happens to it.
  bool is_skipped = false;
  int64_t lowest = 0;    ///< atoms that it keeps: its best ones
  int64_t highest = -1;  ///< atoms that it may have; -1: all
  /// Active atoms, scores and ever_active as update_mask reads them; its numbers and keys are not
  /// read.
  UpdateInput input;
};
struct UpdateOfAll {
  double fraction = 0;  ///< share of the active atoms of units that are not skipped
  int64_t target = 0;   ///< active atoms of all units afterwards
  kernels::RandomKey drop_key, grow_key, random_key;
};

/// update_mask with one cell that has the atoms of all units: first those that the target has too
/// many of are dropped, wherever they are; then the fraction of the units that are not skipped,
/// which grow what is lacking. The `lowest` best atoms of each unit stay, and none gets more than
/// `highest`. Where the rule cannot grow enough, the best of the dropped ones stay, then any atoms
/// come: the sum comes first. Collective over `group`, with the same rule and numbers on all ranks;
/// scores must be finite. Criteria: drop kMagnitude or any other whose scores of all units compare;
/// grow kRandom, kGrad, kUnfired, kNone.
/// @return for each part; has_no_gradient and num_non_finite are not set
std::vector<MaskUpdate> update_over_ranks(const std::vector<UpdatePart>& parts,
                                          const UpdateRule& rule, const UpdateOfAll& update,
                                          int64_t num_units, const comm::Group& group,
                                          const comm::CallSite& site = {});

}  // namespace perseid
