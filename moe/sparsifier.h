#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

#include "moe/sparse_budget.h"
#include "moe/sparse_mask.h"
#include "moe/sparse_schedule.h"
#include "moe/sparse_structure.h"
#include "moe/sparse_unit.h"
#include "moe/sparse_update.h"

namespace torch::optim {
class Optimizer;
}

namespace perseid {

/// What a sparse layer and the Sparsifier of its weight share. The layer makes it, the Sparsifier
/// fills it while it lives.
struct UnitLink {
  at::Tensor inactive;  ///< [out, in] bool, true: the weight is 0; undefined: none is
  PackedMask active;    ///< [out, in], the others; empty without `inactive`
  double density = 1;   ///< share of the active
  /// To be called by the backward, once per pass, with x [N, in] and the gradient of the product
  /// delta [N, out] of each row that counts. Empty: nobody wants them.
  std::function<void(const at::Tensor& x, const at::Tensor& delta)> accumulate;
};

/// One weight whose entries are switched: a parameter [out, in], or one expert of [L, out, in].
/// Weights are dense tensors; inactive entries are stored as 0.
struct SparseUnit {
  std::string name;  ///< for errors and Budget::custom
  UnitKey key;
  at::Tensor parameter;
  int64_t slot = -1;  ///< parameter[slot] is the weight; -1: the parameter is
  /// Set: the layer's backward hands over rows, and parameter.grad() need hold the gradient of
  /// active entries only. Null: parameter.grad() holds the gradient of all entries after backward.
  std::shared_ptr<UnitLink> link;
  /// Without a link: Sparsifier::count_rows is called for this unit. With one, rows are counted.
  bool counts_rows = false;

  at::Tensor weight() const;  ///< [out, in], detached, shares memory with the parameter
};

/// The L units of an expert tensor.
/// @param parameter   [L, out, in]
/// @param expert_ids  [L] global ids, by slot
std::vector<SparseUnit> expert_units(const std::string& name, const at::Tensor& parameter,
                                     int64_t layer, Matrix matrix,
                                     const std::vector<int64_t>& expert_ids);

enum class UpdateOrder : uint8_t {
  kBeforeStep,     ///< masks change in end_backward; the step uses the new ones
  kInsteadOfStep,  ///< so, and the parameter is left out of the optimizer step (RigL's code)
  kAfterStep,      ///< masks change in end_step (SET, ITOP)
};

/// What grown weights start with. Their momentum starts with 0.
enum class GrownWeight : uint8_t { kZero, kNormal };
/// What Adam's second moment of a grown weight starts with. Its step count is not its own, so that
/// 0 makes the first step up to 3.2 times the learning rate at betas (0.9, 0.999).
enum class GrownSecondMoment : uint8_t {
  kZero,
  kMean,      ///< mean over the active weights of the unit that were not touched
  kAge,       ///< 0, and a step count of its own for each weight; needs SparseAdam or SparseAdamW
  kGradient,  ///< square of the gradient that the update looked at, per step; needs kGrad
};
struct StatePolicy {
  GrownWeight weight = GrownWeight::kZero;
  double weight_std = 0.1;  ///< kNormal
  GrownSecondMoment second_moment = GrownSecondMoment::kMean;
};

struct SparsifierConfig {
  Budget budget;
  Structure structure;
  UpdateRule rule;
  Schedule schedule;
  StatePolicy state;
  UpdateOrder order = UpdateOrder::kBeforeStep;
  /// kGrad: an update looks at the sum of the gradients of this many steps, its own the last; one
  /// in the first steps has fewer.
  int64_t grad_accum = 1;
  /// An update is skipped if the unit had fewer rows since its last one. Units whose rows are
  /// counted only.
  int64_t min_rows = 64;
  uint64_t seed = 0;
  /// Keys of the units of all ranks; empty: those of this Sparsifier. Staggered ones need them.
  std::vector<UnitKey> all_units;
};
/// One line for a log: every field that changes the training.
std::ostream& operator<<(std::ostream& out, const SparsifierConfig& config);

enum class UnitAction : uint8_t {
  kNone,
  kAccumulate,  ///< its gradient counts for a later update
  kUpdate,
};
struct StepPlan {
  int64_t step = 0;
  std::vector<UnitAction> actions;  ///< in the order of units()
  bool has_update() const;
};

enum class SkipReason : uint8_t { kNotSkipped, kFewRows, kNoGradient };
struct UnitUpdate {
  UnitKey key;
  int64_t num_dropped = 0;  ///< atoms
  int64_t num_grown = 0;
  SkipReason skipped = SkipReason::kNotSkipped;
};
struct UpdateReport {
  int64_t step = 0;
  std::vector<UnitUpdate> units;  ///< those that were to update now
};

struct UnitStats {
  int64_t nnz = 0;         ///< active weights
  double density = 0;      ///< of out * in
  double ever_active = 0;  ///< share of the atoms that were active at any time (the ITOP rate)
  int64_t num_updates = 0;
  int64_t num_skipped = 0;
  uint64_t fingerprint = 0;  ///< of the mask
};

/// What training needs to go on: masks, counters and sums of gradients. Weights and states of the
/// optimizer are saved by their owners.
struct UnitState {
  UnitKey key;
  PackedMask mask;
  PackedMask ever_active;
  int64_t num_rows = 0;  ///< since the last update
  int64_t num_updates = 0;
  int64_t num_skipped = 0;
  at::Tensor grad_sum;  ///< [out, in], inside a window of grad_accum steps; else undefined
};
struct SparsifierState {
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  uint64_t config_hash = 0;
  std::vector<UnitState> units;
};

/// Keeps weights sparse while they are trained, each with an exact number of active entries, and
/// moves these entries. For one process: the budget is shared by the units that it is given, and
/// gradients are not summed here. Random numbers depend on keys only: equal budgets give equal
/// masks whatever other units there are.
///
///   Sparsifier sparsifier(units, presets::rigl(0.1, total_steps));
///   sparsifier.attach(optimizer);
///   for each step:
///     sparsifier.begin_step(step);
///     loss.backward();
///     sparsifier.end_backward(step);  // then clip: norms are of the masked gradient
///     optimizer.step();
///     sparsifier.end_step(step);
///
/// Evaluate and save before the update of a step, not after it: grown weights are untrained.
class Sparsifier {
 public:
  /// Draws the first masks and sets inactive weights to 0. Throws ConfigError for a unit that is
  /// named or passed twice, shapes that the structure does not fit, or a budget that cannot be
  /// kept.
  Sparsifier(std::vector<SparseUnit> units, SparsifierConfig config);
  ~Sparsifier();
  Sparsifier(const Sparsifier&) = delete;
  Sparsifier& operator=(const Sparsifier&) = delete;

  /// From now on updates treat its states, too: torch::optim::SGD, Adam or AdamW that holds units'
  /// parameters; it must outlive this. Those of moe/sparse_optimizer.h compress their states.
  /// Without an optimizer end_step sets inactive weights to 0.
  void attach(torch::optim::Optimizer& optimizer);

  /// What the step will do: a function of step, unit and configuration.
  StepPlan plan(int64_t step) const;
  /// Starts a step, before its backward.
  StepPlan begin_step(int64_t step);
  /// For units without a link that count rows: `num_rows` rows went through it in this pass.
  void count_rows(const UnitKey& key, int64_t num_rows);
  /// After backward: updates what is due unless the order is kAfterStep, then sets gradients of
  /// inactive weights to 0. An undefined gradient counts as 0. Throws Diverged that names unit and
  /// step for a NaN or an infinity among the scores; no mask or weight has changed then.
  UpdateReport end_backward(int64_t step);
  /// After the optimizer step: updates what is due if the order is kAfterStep.
  UpdateReport end_step(int64_t step);

  const std::vector<SparseUnit>& units() const { return units_; }  ///< ordered by key
  const SparsifierConfig& config() const { return config_; }
  const PackedMask& mask(const UnitKey& key) const;  ///< of atoms
  const AtomLayout& layout(const UnitKey& key) const;
  UnitStats stats(const UnitKey& key) const;
  int64_t nnz() const;  ///< active weights of all units
  /// What the budget asks for beyond nnz(), because units take whole granules (Allocation::rest).
  int64_t budget_rest() const { return budget_rest_; }

  /// Draws active weights from a normal distribution of std gain / sqrt(active entries of the row).
  void reset_weights(double gain);

  SparsifierState state_dict() const;  ///< copies
  /// Units of other ranks in `state` are ignored. Sets weights outside the masks to 0. Throws
  /// ConfigError for another version or configuration, a missing unit, or a mask that does not have
  /// this unit's shape and budget; nothing is changed then.
  void load(const SparsifierState& state);

 private:
  struct Unit;
  struct Proposal;
  Unit& find(const UnitKey& key);
  const Unit& find(const UnitKey& key) const;
  bool needs_gradient() const;
  void add_gradient(size_t u, const at::Tensor& gradient);
  UpdateReport update(int64_t step);
  Proposal propose(size_t u, int64_t step);
  void apply(size_t u, int64_t step, const MaskUpdate& change);
  void set_mask(size_t u, PackedMask mask);
  void require_step(const char* call, int64_t step) const;
  uint64_t config_hash() const;

  std::vector<SparseUnit> units_;
  SparsifierConfig config_;
  std::vector<Unit> states_;  ///< of each of units_
  std::vector<torch::optim::Optimizer*> optimizers_;
  int64_t budget_rest_ = 0;
  StepPlan current_;
  bool is_started_ = false;
};

}  // namespace perseid
