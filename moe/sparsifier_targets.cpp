#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "moe/sparse_select.h"
#include "moe/sparsifier_unit.h"

// Budgets that change with the updates: ramps, growth beyond the budget, and budgets that units
// take from each other.

namespace perseid {
namespace {

/// Of the draws of a selection over all units.
constexpr UnitKey kAllUnits{-1, 0, Matrix::kWeight};

int64_t num_non_finite_of(const PackedMask& atoms, const float* scores) {
  int64_t count = 0;
  for (int64_t atom = 0; atom < atoms.num_places(); ++atom) {
    count += atoms.test(atom) && !std::isfinite(scores[atom]) ? 1 : 0;
  }
  return count;
}
bool are_all_zero(const PackedMask& atoms, const float* scores) {
  for (int64_t atom = 0; atom < atoms.num_places(); ++atom) {
    if (atoms.test(atom) && scores[atom] != 0.0f) return false;
  }
  return true;
}

int64_t sum_of(const std::vector<int64_t>& numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), int64_t{0});
}

}  // namespace

bool Sparsifier::has_changing_budgets() const {
  const Distribution distribution = config_.budget.distribution;
  const Schedule& schedule = config_.schedule;
  return schedule.density_ramp.has_value() || schedule.nm_ramp.has_value() || schedule.grow_first ||
         distribution == Distribution::kGlobal || distribution == Distribution::kLoad;
}

void Sparsifier::check_targets() const {
  const Budget& budget = config_.budget;
  const Structure& structure = config_.structure;
  const UpdateRule& rule = config_.rule;
  const Schedule& schedule = config_.schedule;
  const bool is_global = budget.distribution == Distribution::kGlobal;
  const bool is_shared = is_global || budget.distribution == Distribution::kLoad;
  const char* const name = is_global ? "global" : "load";
  require(!has_changing_budgets() || !config_.forward.is_soft(), kSparsifier, "forward", "soft",
          "chooses masks of budgets that stay; give up ramps, grow_first, global and load");
  require(!has_changing_budgets() || structure.cell != Cell::kNeuron, kSparsifier, "structure",
          "neuron", "has budgets that stay; give up ramps, grow_first, global and load");
  require(!has_changing_budgets() || !config_.ablation.is_on(), kSparsifier, "ablation", "on",
          "shares budgets that stay; give up ramps, grow_first, global and load");
  require(!has_changing_budgets() || rule.grow != GrowCriterion::kSampledGrad, kSparsifier, "grow",
          "sampled_grad",
          "draws candidates for a budget that stays; choose grad, or give up ramps, grow_first, "
          "global and load");
  require(!is_shared || (schedule.clock == Clock::kStep && !schedule.stagger), kSparsifier,
          "distribution", name,
          "needs all units to update in one step; without stagger, by Clock::kStep");
  require(!is_shared || structure.cell != Cell::kGroup, kSparsifier, "distribution", name,
          "has nothing to share out under N:M, which fixes the density of every unit");
  require(!is_global || structure.cell == Cell::kUnit, kSparsifier, "distribution", name,
          "selects atoms of any row; choose a structure whose cell is the unit, or load");
  require(!is_global || rule.drop != DropCriterion::kSetSigned, kSparsifier, "distribution", name,
          "compares scores of all units, which set_signed has not; choose magnitude");
  require(!is_global || !drops_by_gradient(rule.drop), kSparsifier, "distribution", name,
          "compares weights of all units, also of those without a gradient; choose magnitude");
  const bool grows_globally =
      rule.grow == GrowCriterion::kRandom || rule.grow == GrowCriterion::kGrad ||
      rule.grow == GrowCriterion::kUnfired || rule.grow == GrowCriterion::kNone;
  require(!is_global || grows_globally, kSparsifier, "distribution", name,
          "grows by grad, random, unfired or none only");
  require(!schedule.grow_first || !is_shared, kSparsifier, "grow_first", "true",
          std::string("does not go with distribution ") + name);
  require(!schedule.grow_first || structure.cell != Cell::kGroup, kSparsifier, "grow_first", "true",
          "does not go with N:M, whose groups have no room beyond N");
  require(!schedule.grow_first || rule.drop != DropCriterion::kSetSigned, kSparsifier, "grow_first",
          "true", "does not go with set_signed, which drops a fraction of each sign");
  require(!schedule.density_ramp.has_value() || structure.cell != Cell::kGroup, kSparsifier,
          "density_ramp", "given", "does not go with N:M; choose nm_ramp");
  if (!schedule.nm_ramp.has_value()) return;
  const NmRampFrame& last = schedule.nm_ramp->frames.back();
  const std::string own = structure.cell == Cell::kGroup
                              ? to_text(structure.group_keep) + ":" + to_text(structure.group)
                              : std::string("not N:M");
  require(own == to_text(last.n) + ":" + to_text(last.m), kSparsifier, "nm_ramp",
          to_text(last.n) + ":" + to_text(last.m),
          "is its last frame, but the structure is " + own + "; they must be the same");
}

/// On all ranks alike, as known_ is.
/// @param hidden_layers  with coupled neurons their num_active is set
void Sparsifier::start_targets(const std::vector<AtomLayout>& layouts,
                               std::vector<BudgetUnit> units,
                               std::vector<HiddenLayer>& hidden_layers) {
  budget_units_ = std::move(units);
  targets_ = config_.structure.cell == Cell::kNeuron
                 ? BudgetTargets(allocate_neurons(hidden_layers))
                 : BudgetTargets(config_.budget, config_.schedule, budget_units_);
  budget_rest_ = targets_.last().rest;
  int64_t first_atom = 0;
  for (size_t i = 0; i < known_.size(); ++i) {
    known_[i].first_atom = first_atom;
    first_atom += layouts[i].num_atoms();
    if (!config_.schedule.nm_ramp.has_value()) continue;
    for (const NmRampFrame& frame : config_.schedule.nm_ramp->frames) {
      make_layout(Structure::n_of_m(frame.n, frame.m), known_[i].out, known_[i].in, known_[i].name);
    }
  }
  const bool counts = std::any_of(known_.begin(), known_.end(),
                                  [](const Known& known) { return known.counts_rows; });
  require(config_.budget.distribution != Distribution::kLoad || counts || known_.empty(),
          kSparsifier, "distribution", "load", "needs rows, but nobody counts those of any unit");
}

AtomLayout Sparsifier::frame_layout(size_t u, int64_t frame) const {
  const at::Tensor weight = units_[u].weight();
  Structure structure = config_.structure;
  if (config_.schedule.nm_ramp.has_value()) {
    const NmRampFrame& wanted = config_.schedule.nm_ramp->frames[static_cast<size_t>(frame)];
    structure = Structure::n_of_m(wanted.n, wanted.m);
  }
  return make_layout(structure, weight.size(0), weight.size(1), units_[u].name);
}

void Sparsifier::set_frame(size_t u, int64_t frame) {
  states_[u].frame = frame;
  states_[u].layout = frame_layout(u, frame);
}

/// Collective under kLoad. Sets targets_now_, and loads_now_ where budgets are shared anew.
void Sparsifier::choose_targets(int64_t step, const comm::CallSite& site) {
  const int64_t window = window_of(config_.schedule, step);
  loads_now_.clear();
  targets_now_ = targets_.at(window);
  if (config_.budget.distribution != Distribution::kLoad) return;
  const bool is_shared_anew = window % config_.budget.realloc_every == 0;
  if (!is_shared_anew && !config_.schedule.density_ramp.has_value()) {
    for (const Unit& state : states_) targets_now_[state.place] = state.nnz;
    return;
  }
  // Rows since budgets were shared last. Units whose rows nobody counts have the mean.
  int64_t num_rows = 0, num_counting = 0;
  for (const Known& known : known_) {
    if (!known.counts_rows) continue;
    num_rows += known.total_rows - known.load_rows;
    ++num_counting;
  }
  if (is_shared_anew && num_rows > 0) {
    const double mean = static_cast<double>(num_rows) / static_cast<double>(num_counting);
    for (const Known& known : known_) {
      const auto rows = static_cast<double>(known.total_rows - known.load_rows);
      loads_now_.push_back(known.counts_rows ? rows / mean : 1);
    }
  }
  // Units that are skipped now may lose weights, but grow none.
  std::vector<int64_t> held(2 * known_.size(), 0);
  for (size_t u = 0; u < units_.size(); ++u) {
    if (!is_primary(u)) continue;
    held[2 * states_[u].place] = states_[u].nnz;
    held[2 * states_[u].place + 1] = skip_reason(u) == SkipReason::kNotSkipped ? 0 : 1;
  }
  comm::all_reduce(held.data(), static_cast<int64_t>(held.size()), comm::ReduceOp::kSum,
                   groups_.world, site);
  Budget budget = config_.budget;
  budget.density = ramp_density(config_.schedule, budget.density, window);
  std::vector<BudgetUnit> units = budget_units_;
  std::vector<int64_t> highest;
  for (size_t i = 0; i < units.size(); ++i) {
    units[i].load = loads_now_.empty() ? known_[i].load : loads_now_[i];
    if (held[2 * i + 1] != 0) units[i].ceiling = held[2 * i];
    const int64_t ceiling = units[i].ceiling < 0 ? units[i].out * units[i].in : units[i].ceiling;
    highest.push_back(ceiling / units[i].granule * units[i].granule);
  }
  // Granules of several sizes may leave less room than the number that is to be shared out.
  const bool are_all_full = number_of_weights(budget.density, units) >= sum_of(highest);
  targets_now_ = are_all_full ? highest : allocate(budget, units).nnz;
}

Sparsifier::Goal Sparsifier::goal_of(size_t u, int64_t step) const {
  const Schedule& schedule = config_.schedule;
  const Unit& state = states_[u];
  const int64_t window = window_of(schedule, step);
  Goal goal;
  goal.layout = state.layout;
  goal.frame = state.frame;
  goal.nnz = targets_now_[state.place];
  if (schedule.nm_ramp.has_value()) {
    goal.frame = static_cast<int64_t>(ramp_frame(schedule, window));
    if (goal.frame != state.frame) goal.layout = frame_layout(u, goal.frame);
    goal.nnz = goal.layout.smallest_budget();
  }
  goal.base = goal.nnz;
  if (!schedule.grow_first) return goal;
  const int64_t granule = goal.layout.granule();
  const double fraction =
      window < last_window(schedule) ? drop_fraction(schedule, known_[state.place].time) : 0;
  const auto wanted =
      static_cast<int64_t>(std::floor(fraction * static_cast<double>(goal.base / granule)));
  const int64_t beyond = std::min(wanted, (goal.layout.size() - goal.base) / granule) * granule;
  goal.nnz += beyond;
  goal.num_grow = beyond / goal.layout.atom_size();
  return goal;
}

std::vector<Sparsifier::Proposal> Sparsifier::propose_global(int64_t step,
                                                             const comm::CallSite& site) {
  std::vector<Proposal> proposals;
  std::vector<Scores> scores(units_.size());
  std::vector<UpdatePart> parts;
  comm::agree(groups_.world, site, [&] {
    for (size_t u = 0; u < units_.size(); ++u) {
      const Unit& state = states_[u];
      Proposal proposal;
      proposal.unit = u;
      proposal.layout = state.layout;
      proposal.frame = state.frame;
      proposal.report.key = units_[u].key;
      SkipReason& skipped = proposal.report.skipped;
      skipped = skip_reason(u);
      PackedMask eligible = PackedMask::full(state.mask.rows(), state.mask.cols());
      if (config_.rule.exclude_just_dropped) eligible = without(eligible, state.mask);
      if (skipped == SkipReason::kNotSkipped) {
        scores[u] = scores_of(u, step);
        const float* const grow = scores[u].input.grow_scores;
        const bool has_candidates = state.mask.count() < state.mask.num_places();
        if (grow != nullptr && has_candidates && are_all_zero(eligible, grow)) {
          skipped = SkipReason::kNoGradient;
        }
        const int64_t num_non_finite = num_non_finite_of(state.mask, scores[u].input.drop_scores) +
                                       (grow == nullptr ? 0 : num_non_finite_of(eligible, grow));
        if (num_non_finite > 0) fail_diverged(u, num_non_finite, step);
      } else {
        // It may lose weights to a ramp.
        scores[u].drop = drop_scores_of(u);
        scores[u].input.active = &state.mask;
        scores[u].input.ever_active = &state.ever_active;
        scores[u].input.drop_scores = scores[u].drop.const_data_ptr<float>();
        const int64_t num_non_finite = num_non_finite_of(state.mask, scores[u].input.drop_scores);
        if (num_non_finite > 0) fail_diverged(u, num_non_finite, step);
      }
      const BudgetUnit& budget = budget_units_[state.place];
      const int64_t atom_size = state.layout.atom_size();
      UpdatePart part;
      part.place = static_cast<int64_t>(state.place);
      part.first_atom = known_[state.place].first_atom;
      part.is_counted = is_primary(u);
      part.is_skipped = skipped != SkipReason::kNotSkipped;
      part.lowest = (budget.floor + atom_size - 1) / atom_size;
      part.highest = budget.ceiling < 0 ? -1 : budget.ceiling / atom_size;
      part.input = scores[u].input;
      parts.push_back(part);
      proposals.push_back(std::move(proposal));
    }
  });
  UpdateOfAll update;
  update.fraction = drop_fraction(config_.schedule, static_cast<double>(step));
  const int64_t atom_size = config_.structure.atom_rows * config_.structure.atom_cols;
  update.target = sum_of(targets_now_) / atom_size;
  update.drop_key = draw_key(config_.seed, step, kAllUnits, UnitDraw::kDrop);
  update.grow_key = draw_key(config_.seed, step, kAllUnits, UnitDraw::kGrow);
  update.random_key = draw_key(config_.seed, step, kAllUnits, UnitDraw::kRandomGrow);
  std::vector<MaskUpdate> changes = update_over_ranks(
      parts, config_.rule, update, static_cast<int64_t>(known_.size()), groups_.world, site);
  for (size_t u = 0; u < proposals.size(); ++u) {
    Proposal& proposal = proposals[u];
    proposal.change = std::move(changes[u]);
    proposal.nnz = proposal.change.mask.count() * atom_size;
    proposal.report.num_dropped = proposal.change.num_dropped;
    proposal.report.num_grown = proposal.change.num_grown;
  }
  return proposals;
}

/// A saved mask keeps its budget, and that is one of this configuration up to the saved step.
void Sparsifier::check_saved_budget(size_t u, const UnitState& saved, int64_t step) {
  const Schedule& schedule = config_.schedule;
  const std::string& name = units_[u].name;
  const int64_t window = window_of(schedule, step);
  const auto last_frame =
      schedule.nm_ramp.has_value() ? static_cast<int64_t>(ramp_frame(schedule, window)) : 0;
  if (saved.frame < 0 || saved.frame > last_frame) {
    fail_sparsifier("frame of " + name, to_text(saved.frame),
                    "is outside [0, " + to_text(last_frame) + "]");
  }
  const AtomLayout layout = frame_layout(u, saved.frame);
  if (!keeps_budget(u, layout, saved)) {
    fail_sparsifier("mask of " + name, to_text(saved.mask.count()),
                    "active atoms do not keep its budget of " +
                        to_text(saved.nnz / layout.atom_size()) + " in equal cells");
  }

  const size_t place = states_[u].place;
  int64_t lowest = targets_.at(window)[place], highest = targets_.first()[place];
  if (schedule.nm_ramp.has_value()) lowest = highest = layout.smallest_budget();
  if (schedule.grow_first)
    highest += static_cast<int64_t>(schedule.alpha * static_cast<double>(highest));
  const Distribution distribution = config_.budget.distribution;
  if (distribution == Distribution::kGlobal || distribution == Distribution::kLoad) {
    const BudgetUnit& unit = budget_units_[place];
    lowest = unit.floor;
    highest = unit.ceiling < 0 ? unit.out * unit.in : unit.ceiling;
  }
  if (saved.nnz < lowest || saved.nnz > highest) {
    fail_sparsifier("budget of " + name, to_text(saved.nnz),
                    "is outside [" + to_text(lowest) + ", " + to_text(highest) +
                        "], what it may be after step " + to_text(step));
  }
}

/// Where units share one budget, its sum.
/// @param saved  of each of known_
void Sparsifier::check_saved_sum(const std::vector<const UnitState*>& saved, int64_t step) {
  const Distribution distribution = config_.budget.distribution;
  if (distribution != Distribution::kGlobal && distribution != Distribution::kLoad) return;
  int64_t sum = 0, granule = 1;
  for (const UnitState* const unit : saved) sum += unit->nnz;
  for (const BudgetUnit& unit : budget_units_) granule = std::max(granule, unit.granule);
  const int64_t highest = sum_of(targets_.first());
  const int64_t lowest = sum_of(targets_.at(window_of(config_.schedule, step)));
  if (sum > highest || sum <= lowest - granule) {
    fail_sparsifier("budgets", to_text(sum),
                    "in all are outside [" + to_text(lowest) + ", " + to_text(highest) +
                        "], what they may be after step " + to_text(step));
  }
}

}  // namespace perseid
