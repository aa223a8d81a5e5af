#pragma once
#include <string>
#include <vector>

#include "kernels/error.h"
#include "moe/sparsifier.h"

// Internal: what the Sparsifier keeps of each unit, for its source files.

namespace perseid {

inline constexpr const char* kSparsifier = "sparsifier";  ///< in errors

[[noreturn]] inline void fail_sparsifier(const std::string& argument, const std::string& value,
                                         const std::string& limit) {
  throw ConfigError(ErrorDetail{kSparsifier, argument, value, limit});
}

/// Collective: the bytes of every rank, by rank.
std::vector<std::string> gather_bytes(const std::string& mine, const comm::Group& group,
                                      const comm::CallSite& site);

/// A unit of this rank.
struct Sparsifier::Unit {
  AtomLayout layout;
  size_t place = 0;  ///< in known_
  PackedMask mask;
  PackedMask ever_active;
  PackedMask blocks;          ///< [out, in] positions of `mask`, if its atoms have several
  at::Tensor inactive;        ///< [out, in] bool, the others, where the parameter is; see UnitLink
  int64_t num_rows = 0;       ///< since the last update, over all ranks
  int64_t num_pending = 0;    ///< rows of this rank that are not in any sum yet
  int64_t num_rows_seen = 0;  ///< of the counter of its experts
  int64_t num_updates = 0;
  int64_t num_skipped = 0;
  double churn_sum = 0;
  // What updates look at; see UnitState for shapes.
  int64_t update_step = -1;  ///< that the current step's gradients count for; -1: none
  at::Tensor link_gradient;  ///< what the link was given in this step
  at::Tensor link_energy;
  at::Tensor grad_sum;  ///< over the steps of a window, over all ranks
  at::Tensor active_sum;
  at::Tensor energy_sum;
  PackedMask candidates;         ///< kSampledGrad: atoms
  PackedMask sampled;            ///< their positions
  int64_t candidates_step = -1;  ///< update that they were drawn for
  int64_t nnz = 0;               ///< of the budget, now
  int64_t frame = 0;             ///< of the N:M ramp, which `layout` is of
  SoftMask soft;                 ///< soft methods only
  int64_t row_layer = -1;        ///< place in hidden_ of the units that its rows are; -1: no such
  int64_t column_layer = -1;

  const PackedMask& positions() const { return layout.is_elementwise() ? mask : blocks; }
};

/// What every rank knows of a unit of any rank; equal on all of them.
struct Sparsifier::Known {
  UnitKey key;
  std::string name;
  int64_t out = 0;
  int64_t in = 0;
  Holders holders = Holders::kAllRanks;
  bool counts_rows = false;
  bool has_bias = false;
  bool frees_columns = false;  ///< its columns are hidden units that ablation may set to 0
  bool is_kept = false;        ///< ablation leaves its rows
  int64_t offset = 0;          ///< of its updates
  int64_t total_rows = 0;      ///< over all ranks; of the token clock
  int64_t window = -1;         ///< of its last update by the token clock
  double time = 0;             ///< of its clock at the start of the current step
  int64_t first_atom = 0;      ///< atoms of the units before it
  double load = 1;             ///< kLoad: of the last sharing
  int64_t load_rows = 0;       ///< kLoad: total_rows then
};

/// A HiddenLayer of this rank.
struct Sparsifier::Hidden {
  std::vector<size_t> rows_of;  ///< in units_
  size_t columns_of = 0;
  PackedMask active;                ///< [1, F]; with coupled neurons
  std::vector<int64_t> candidates;  ///< that stand in the weights now
};

/// What a unit is to have after an update.
struct Sparsifier::Goal {
  AtomLayout layout;
  int64_t frame = 0;
  int64_t nnz = 0;        ///< positions
  int64_t num_grow = -1;  ///< atoms; -1: by the drop fraction
  int64_t base = 0;       ///< nnz without what is grown beyond the budget
};

/// What the criteria say, [num_atoms] float32 on the host.
struct Sparsifier::Scores {
  at::Tensor drop;
  at::Tensor grow;    ///< undefined if the criterion has none
  UpdateInput input;  ///< with pointers to them
};

/// What an update of one unit would do. `change` has the mask in any case.
struct Sparsifier::Proposal {
  size_t unit = 0;
  AtomLayout layout;
  int64_t frame = 0;
  int64_t nnz = 0;
  UnitUpdate report;
  MaskUpdate change;
};

}  // namespace perseid
