#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

#include "moe/effective_parts.h"
#include "moe/parallel_groups.h"
#include "moe/row_counts.h"
#include "moe/soft_mask.h"
#include "moe/sparse_ablation.h"
#include "moe/sparse_budget.h"
#include "moe/sparse_mask.h"
#include "moe/sparse_neurons.h"
#include "moe/sparse_schedule.h"
#include "moe/sparse_structure.h"
#include "moe/sparse_targets.h"
#include "moe/sparse_unit.h"
#include "moe/sparse_update.h"

namespace torch::nn {
class Module;
}
namespace torch::optim {
class Optimizer;
}

namespace perseid {

/// What a sparse layer and the Sparsifier of its weight share. The layer makes it, the Sparsifier
/// fills it while it lives.
struct UnitLink {
  PackedMask active;    ///< [out, in]; the other weights are 0; empty: none is
  at::Tensor inactive;  ///< [out, in] bool, the others, where the weight is; on the host undefined
  double density = 1;   ///< share of the active
  /// To be called by the backward, once per pass, with x [N, in] and the gradient of the product
  /// delta [N, out] of each row that counts. Empty: nobody wants them.
  std::function<void(const at::Tensor& x, const at::Tensor& delta)> accumulate;
  /// Soft methods: what to compute with, made from the parameter, differentiable. Empty: itself.
  std::function<at::Tensor(const at::Tensor& weight)> effective;
};

/// Which ranks hold a weight and train it alike.
enum class Holders : uint8_t {
  kAllRanks,  ///< dense parameters: all of ParallelGroups::world
  kReplicas,  ///< experts: one group expert_replicas
};

/// One weight whose entries are switched: a parameter [out, in], one expert of [L, out, in], or
/// some rows of either. Weights are dense tensors; inactive entries are stored as 0.
struct SparseUnit {
  std::string name;  ///< for errors and Budget::custom; equal on all its ranks
  UnitKey key;
  at::Tensor parameter;
  int64_t slot = -1;      ///< parameter[slot] is the weight; -1: the parameter is
  int64_t first_out = 0;  ///< rows [first_out, first_out + num_out) of it are
  int64_t num_out = -1;   ///< -1: all
  Holders holders = Holders::kAllRanks;
  /// Set: the layer's backward hands over rows, and parameter.grad() need hold the gradient of
  /// active entries only. Null: parameter.grad() holds the gradient of all entries after backward.
  std::shared_ptr<UnitLink> link;
  /// Rows are row_counts->rows[row_slot]. Null, without a link: see counts_rows. With a link they
  /// are those that it is given.
  std::shared_ptr<RowCounts> row_counts;
  size_t row_slot = 0;
  bool counts_rows = false;  ///< Sparsifier::count_rows is called for this unit
  /// Without a link, for soft methods: the layer computes with effective_parts->of(parameter).
  std::shared_ptr<EffectiveParts> effective_parts;
  /// Without either: whoever owns the weight computes with Sparsifier::effective.
  bool uses_effective = false;
  /// Its products get a bias: a row of 0 does not give 0.
  bool has_bias = false;

  at::Tensor weight() const;  ///< [out, in], detached, shares memory with the parameter
  /// The same part of a tensor that is shaped like the parameter.
  at::Tensor part_of(const at::Tensor& tensor) const;
};

/// The 2-D weights of a module and those below it that a Sparsifier may have, by their names in it,
/// each with a Matrix of its own: not those of gates, norms and embeddings, nor of Experts, which
/// have sparse_units. Without layers and experts in their keys.
std::vector<SparseUnit> module_matrices(const torch::nn::Module& module);

/// Those of any module whose names fit `pattern` (* stands for any text), with the names
/// "layer<layer>.<name>". Their rows are not counted. Throws ConfigError if none fits.
/// @param layer  tells modules of a model apart, also from its layers of experts
std::vector<SparseUnit> sparse_units(const torch::nn::Module& module, const std::string& pattern,
                                     int64_t layer);

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
  /// Soft methods choose masks by themselves: `rule` is not used, and `schedule` must not update.
  Forward forward;
  StatePolicy state;
  UpdateOrder order = UpdateOrder::kBeforeStep;
  /// An update looks at the sum of the gradients of this many steps, its own the last; one in the
  /// first steps has fewer. 1 for kMomentum, which looks at all steps.
  int64_t grad_accum = 1;
  /// An update is skipped if the unit had fewer rows since its last one. Units whose rows are
  /// counted only.
  int64_t min_rows = 64;
  uint64_t seed = 0;
  /// One process that has some of the units of a model only: the keys of all, for updates that take
  /// turns. Empty: there are no others. With several ranks it stays empty.
  std::vector<UnitKey> all_units;
  /// Constant fan-in with grow = grad: rows of little use lose their weights to the others. A unit
  /// keeps its number of weights exactly unless loses_rest is set.
  Ablation ablation;
  /// Structure::coupled_neurons(): every unit's rows or columns are hidden units, an expert's
  /// matrices all of one number. Density is the share of them that is active; a weight between two
  /// hidden layers has the product. Scores are Frobenius norms of all parts of a hidden unit.
  Neurons neurons;
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

/// A skipped update grows nothing, except where a new M of nm_ramp makes a group lack atoms; what a
/// ramp or kLoad takes from the unit goes all the same.
enum class SkipReason : uint8_t { kNotSkipped, kFewRows, kNoGradient };
struct UnitUpdate {
  UnitKey key;
  int64_t num_dropped = 0;  ///< atoms
  int64_t num_grown = 0;
  SkipReason skipped = SkipReason::kNotSkipped;
};
struct UpdateReport {
  int64_t step = 0;
  std::vector<UnitUpdate> units;  ///< those of this rank that were to update now
};

struct UnitStats {
  int64_t nnz = 0;         ///< active weights
  double density = 0;      ///< of out * in
  double ever_active = 0;  ///< share of the atoms that were active at any time (the ITOP rate)
  int64_t num_updates = 0;
  int64_t num_skipped = 0;
  double churn = 0;          ///< mean over the updates of dropped / active atoms
  uint64_t fingerprint = 0;  ///< of the mask
  int64_t active_rows = 0;   ///< with an active weight
  int64_t active_columns = 0;
};
/// Sums over the units of all ranks, each once.
struct SparsityTotals {
  int64_t nnz = 0;          ///< active weights
  int64_t size = 0;         ///< active and inactive ones
  int64_t ever_active = 0;  ///< atoms that were active at any time
  int64_t num_atoms = 0;
  int64_t num_updates = 0;
  int64_t num_skipped = 0;
  double churn = 0;  ///< mean over the updates of dropped / active atoms

  double density() const;
  double itop_rate() const;  ///< ever_active / num_atoms
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
  double churn_sum = 0;    ///< of dropped / active atoms over the updates
  int64_t total_rows = 0;  ///< since the start, with Clock::kTokens
  int64_t window = -1;     ///< of its last update, with Clock::kTokens
  /// Inside a window of grad_accum steps, else undefined: [out, in]; kSampledGrad [1, positions of
  /// the candidates]. kMomentum: the moving average, [out, in], until `end`.
  at::Tensor grad_sum;
  at::Tensor active_sum;     ///< of drop criteria with gradients: [1, active positions]
  at::Tensor energy_sum;     ///< kGreedyProgress: [1, in] float64
  PackedMask backward;       ///< kTopKast: weights that the gradient reaches
  int64_t nnz = 0;           ///< weights that `mask` has, with padded ones
  int64_t frame = 0;         ///< of Schedule::nm_ramp
  double load = 1;           ///< of Distribution::kLoad, when budgets were last shared
  int64_t load_rows = 0;     ///< total_rows then
  int64_t chosen_step = -1;  ///< soft methods: when `mask` was chosen
};
struct SparsifierState {
  static constexpr int64_t kVersion = 3;
  int64_t version = kVersion;
  uint64_t config_hash = 0;
  double mean_rows = 0;           ///< of Clock::kTokens; 0: still being measured
  int64_t num_counted_steps = 0;  ///< in which rows were counted for it
  int64_t step = -1;              ///< the last that was begun; -1: none
  std::vector<UnitState> units;   ///< of all ranks, ordered by key
};

/// Keeps weights sparse while they are trained, each with an exact number of active entries, and
/// moves these entries. Random numbers depend on keys only: masks and updates do not depend on the
/// number of ranks, on which rank holds what, or on the order of the units.
///
///   Sparsifier sparsifier(layer.experts()->sparse_units(0), presets::rigl(0.1, total_steps),
///                         layer.groups());
///   sparsifier.attach(optimizer);
///   for each step:
///     sparsifier.begin_step(step);
///     loss.backward();
///     sum_gradients(model, groups);   // with several ranks, see moe/gradients.h
///     sparsifier.end_backward(step);  // then clip: norms are of the masked gradient
///     optimizer.step();
///     sparsifier.end_step(step);
///
/// Ranks: budgets are shared by the units of all ranks. A unit is updated by each rank that holds
/// it, from the same numbers: its gradient, which sum_gradients has summed, or what its link was
/// given, which is summed here, with its sign; and the rows of all ranks. Each update compares the
/// new masks of all holders before it makes them. Constructor, end_backward, end_step, state_dict,
/// load and totals are collective over groups.world; what one rank refuses is refused by all, and
/// nothing is changed then. Equal scores give equal masks. Between numbers of ranks scores are
/// equal bit for bit where the layer's numbers are: MoELayerOptions::strict, one replica of each
/// expert, and no trained parameter that all ranks share; else their sums over ranks differ in
/// rounding, and masks where two scores are as close as that.
///
/// Budgets that change (schedule.density_ramp, nm_ramp and grow_first, Distribution::kGlobal and
/// kLoad) change with the updates. Their sum is exact after each, also where a unit is skipped.
/// Under kGlobal one selection is made over the units of all ranks, by magnitudes. They go with
/// neither coupled neurons, ablation nor kSampledGrad.
///
/// Coupled neurons: from begin_step to end_backward weights may hold candidates (see
/// moe/sparse_neurons.h), so begin_step comes before the forward, and weights are not to be saved
/// in between.
///
/// Evaluate and save before the update of a step, not after it: grown weights are untrained.
///
/// Under a soft method (config.forward) parameters and gradients are dense, and layers compute with
/// effective(): SparseLinear and grouped experts do so by themselves. begin_step chooses the masks
/// from the weights and is collective then; mask, nnz and stats are those of the last step. An
/// optimizer's own weight decay reaches all weights.
class Sparsifier {
 public:
  /// Draws the first masks and sets inactive weights to 0. Throws ConfigError for a unit that is
  /// named or passed twice, shapes that the structure does not fit, or a budget that cannot be
  /// kept; RanksDisagree for configurations or units that differ between ranks.
  /// @param groups  of the model; by default those of one process
  Sparsifier(std::vector<SparseUnit> units, SparsifierConfig config, ParallelGroups groups = {});
  ~Sparsifier();
  Sparsifier(const Sparsifier&) = delete;
  Sparsifier& operator=(const Sparsifier&) = delete;

  /// From now on updates treat its states, too: torch::optim::SGD, Adam or AdamW that holds units'
  /// parameters; it must outlive this. Those of moe/sparse_optimizer.h compress their states.
  /// Without an optimizer end_step sets inactive weights to 0.
  void attach(torch::optim::Optimizer& optimizer);

  /// What the step will do: a function of step, unit and configuration, with Clock::kTokens also of
  /// the rows so far.
  StepPlan plan(int64_t step) const;
  /// Starts a step, before its backward.
  StepPlan begin_step(int64_t step);
  /// For units without a link that count rows: `num_rows` rows went through it in this pass.
  void count_rows(const UnitKey& key, int64_t num_rows);
  /// After backward: updates what is due unless the order is kAfterStep, then sets gradients of
  /// inactive weights to 0, or adds the soft method's own term. An undefined gradient counts as 0.
  /// Throws Diverged that names unit and step for a NaN or an infinity among the scores,
  /// RanksDisagree that names unit and ranks if the holders of a unit come to different masks; no
  /// mask or weight has changed then.
  UpdateReport end_backward(int64_t step);
  /// After the optimizer step: updates what is due if the order is kAfterStep.
  UpdateReport end_step(int64_t step);

  const std::vector<SparseUnit>& units() const { return units_; }  ///< ordered by key
  const SparsifierConfig& config() const { return config_; }
  const PackedMask& mask(const UnitKey& key) const;  ///< of atoms
  /// Structure::coupled_neurons(): active hidden units [1, F], of which `key` has the columns, as
  /// compact_experts takes them.
  const PackedMask& neurons(const UnitKey& key) const;
  /// What a layer computes with, differentiable by the parameter: hard masks the weight itself.
  at::Tensor effective(const UnitKey& key) const;  ///< [out, in]
  const AtomLayout& layout(const UnitKey& key) const;
  UnitStats stats(const UnitKey& key) const;
  int64_t nnz() const;  ///< active weights of the units of this rank
  SparsityTotals totals() const;
  /// What the budget asks for beyond the active weights of all ranks, because units take whole
  /// granules (Allocation::rest); of a ramp at its end.
  int64_t budget_rest() const { return budget_rest_; }

  /// Draws active weights from a normal distribution of std gain / sqrt(active entries of the row).
  void reset_weights(double gain);

  /// The same on every rank, whatever their number: copies of the units of all.
  SparsifierState state_dict() const;
  /// Of any number of ranks. Units that `state` has beyond those of this model are ignored. Sets
  /// weights outside the masks to 0. Throws ConfigError for another version or configuration, a
  /// missing unit, or a mask that does not have its unit's shape and budget, RanksDisagree for
  /// states that differ between ranks; nothing is changed then.
  void load(const SparsifierState& state);

 private:
  struct Unit;
  struct Known;
  struct Proposal;
  struct Hidden;
  struct Goal;
  struct Scores;
  Unit& find(const UnitKey& key);
  const Unit& find(const UnitKey& key) const;
  bool needs_gradient() const;
  int64_t next_update(const Known& unit, int64_t step) const;
  void begin_sources(int64_t step);
  void take_link(size_t u, const at::Tensor& x, const at::Tensor& delta);
  void add_sources(const comm::CallSite& site);
  void forget_sources(Unit& unit) const;
  bool wants_gradient(size_t u) const;
  bool has_token_clock(const Known& unit) const;
  double mean_rows(int64_t step) const;
  double time_of(const Known& unit, int64_t step) const;
  bool is_due(const Known& unit, int64_t step) const;
  bool is_primary(size_t u) const;
  int64_t rows_here(size_t u) const;
  void add_gradient(size_t u, const at::Tensor& gradient, bool is_owned);
  void add_link_gradients(Holders holders, const comm::CallSite& site);
  std::vector<int64_t> summed_rows(const comm::CallSite& site) const;
  void sum_rows(const comm::CallSite& site);
  UpdateReport update(int64_t step);
  SkipReason skip_reason(size_t u) const;
  at::Tensor drop_scores_of(size_t u) const;
  at::Tensor grow_scores_of(size_t u) const;
  Scores scores_of(size_t u, int64_t step) const;
  MaskUpdate skipped_change(size_t u, const Goal& goal, int64_t step) const;
  Proposal propose(size_t u, int64_t step, const std::vector<Proposal>& earlier);
  [[noreturn]] void fail_diverged(size_t u, int64_t num_non_finite, int64_t step) const;
  void apply(size_t u, int64_t step, const MaskUpdate& change);
  void set_mask(size_t u, PackedMask mask);
  void set_link(size_t u);
  void keep_active(size_t u, const at::Tensor& values) const;
  PackedMask slot_positions(size_t u, const PackedMask& mask) const;
  void change_compressed(size_t u, const PackedMask& mask, GrownSecondMoment policy,
                         const at::Tensor& gradient);
  void check_arguments() const;
  // Budgets that change, sparsifier_targets.cpp.
  void check_targets() const;
  void start_targets(const std::vector<AtomLayout>& layouts, std::vector<BudgetUnit> units,
                     std::vector<HiddenLayer>& hidden_layers);
  bool has_changing_budgets() const;
  void choose_targets(int64_t step, const comm::CallSite& site);
  Goal goal_of(size_t u, int64_t step) const;
  std::vector<Proposal> propose_global(int64_t step, const comm::CallSite& site);
  AtomLayout frame_layout(size_t u, int64_t frame) const;
  void set_frame(size_t u, int64_t frame);
  void check_saved_budget(size_t u, const UnitState& saved, int64_t step);
  void check_saved_sum(const std::vector<const UnitState*>& saved, int64_t step);
  void know_units(const comm::CallSite& site);
  void require_same_fingerprints(const std::vector<size_t>& units,
                                 const std::vector<uint64_t>& fingerprints, const char* what,
                                 const comm::CallSite& site) const;
  void check_neurons() const;
  std::vector<HiddenLayer> know_hidden_layers();
  Allocation allocate_neurons(std::vector<HiddenLayer>& layers) const;
  std::vector<int64_t> neuron_offsets(const std::vector<UnitKey>& keys) const;
  void hold_hidden_layers(const std::vector<HiddenLayer>& layers);
  PackedMask crossings_of(size_t u) const;
  int64_t next_update(size_t u, int64_t step) const;
  PackedMask candidate_places(const Hidden& layer, int64_t update_step) const;
  at::Tensor candidate_rows(size_t u, const std::vector<int64_t>& places,
                            int64_t update_step) const;
  void place_candidates(int64_t step);
  void remove_candidates();
  MaskUpdate change_neurons(const Hidden& layer, int64_t step, UnitUpdate& report) const;
  std::vector<Proposal> propose_neurons(int64_t step);
  void start_grown_rows(size_t u, int64_t step, const PackedMask& mask);
  void check_saved_neurons(const std::vector<const PackedMask*>& masks) const;
  bool has_ablation(size_t u) const;
  bool is_freeing_step(const Known& unit, int64_t step) const;
  PackedMask barred_columns(size_t u, int64_t step, const std::vector<Proposal>& earlier) const;
  bool keeps_budget(size_t u, const AtomLayout& layout, const UnitState& saved) const;
  void start_soft();
  void set_soft_mask(size_t u, SoftMask mask);
  void choose_masks(int64_t step);
  void choose_first_masks();
  void finish_soft_gradient(size_t u);
  void require_step(const char* call, int64_t step) const;
  std::string config_text() const;
  uint64_t config_hash() const;

  std::vector<SparseUnit> units_;
  SparsifierConfig config_;
  ParallelGroups groups_;
  std::vector<int> replica_ranks_;  ///< of groups_.expert_replicas, in world
  std::vector<Unit> states_;        ///< of each of units_
  std::vector<Known> known_;        ///< units of all ranks, ordered by key
  std::vector<Hidden> hidden_;      ///< of this rank; with coupled neurons or ablation only
  std::vector<torch::optim::Optimizer*> optimizers_;
  int64_t budget_rest_ = 0;
  std::vector<BudgetUnit> budget_units_;  ///< of known_
  BudgetTargets targets_;
  /// Of each of known_, for the current update; those of other ranks may be old under kLoad.
  std::vector<int64_t> targets_now_;
  std::vector<double> loads_now_;  ///< kLoad, if budgets are shared by this update; else empty
  double mean_rows_ = 0;           ///< of the token clock; 0: still being measured
  int64_t num_counted_steps_ = 0;
  StepPlan current_;
  std::vector<size_t> due_;  ///< places in known_ that update in the current step
  bool is_started_ = false;
  int64_t last_step_ = -1;  ///< that was begun
};

}  // namespace perseid
