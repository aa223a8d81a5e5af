#include "moe/sparsifier.h"

#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

#include "comm/agree.h"
#include "moe/optimizer_states.h"
#include "moe/sparse_optimizer.h"
#include "moe/sparsifier_unit.h"

namespace perseid {
namespace {

void check_unit(const SparseUnit& unit) {
  if (!unit.parameter.defined()) {
    fail_sparsifier("parameter of " + unit.name, "undefined", "is missing");
  }
  const int64_t wanted = unit.slot < 0 ? 2 : 3;
  if (unit.parameter.dim() != wanted) {
    fail_sparsifier("parameter of " + unit.name, to_text(unit.parameter.sizes()),
                    unit.slot < 0 ? "is not [out, in]" : "is not [experts, out, in]");
  }
  if (unit.slot >= 0 && unit.slot >= unit.parameter.size(0)) {
    fail_sparsifier("slot of " + unit.name, to_text(unit.slot),
                    "is outside its parameter of " + to_text(unit.parameter.size(0)) + " experts");
  }
  const int64_t out = unit.parameter.size(-2);
  if (unit.num_out >= 0 && (unit.first_out < 0 || unit.first_out + unit.num_out > out)) {
    fail_sparsifier("rows of " + unit.name,
                    to_text(unit.first_out) + " to " + to_text(unit.first_out + unit.num_out),
                    "are outside its weight of " + to_text(out) + " rows");
  }
  if (!at::isFloatingType(unit.parameter.scalar_type())) {
    fail_sparsifier("parameter of " + unit.name, to_text(unit.parameter.scalar_type()),
                    "is not a floating-point type");
  }
  const bool has_counter = unit.link == nullptr && unit.row_counts != nullptr;
  if (has_counter && unit.row_slot >= unit.row_counts->rows.size()) {
    fail_sparsifier(
        "row_slot of " + unit.name, to_text(unit.row_slot),
        "is outside the counter of " + to_text(unit.row_counts->rows.size()) + " experts");
  }
}

/// Whether both have an entry of one parameter.
bool overlap(const SparseUnit& a, const SparseUnit& b) {
  if (!a.parameter.is_same(b.parameter) || a.slot != b.slot) return false;
  const auto end = [](const SparseUnit& unit) {
    return unit.num_out < 0 ? unit.parameter.size(-2) : unit.first_out + unit.num_out;
  };
  const auto begin = [](const SparseUnit& unit) { return unit.num_out < 0 ? 0 : unit.first_out; };
  return begin(a) < end(b) && begin(b) < end(a);
}

bool is_part(const SparseUnit& unit) { return unit.slot >= 0 || unit.num_out >= 0; }

}  // namespace

bool StepPlan::has_update() const {
  return std::find(actions.begin(), actions.end(), UnitAction::kUpdate) != actions.end();
}

double SparsityTotals::density() const {
  return static_cast<double>(nnz) / static_cast<double>(std::max<int64_t>(1, size));
}
double SparsityTotals::itop_rate() const {
  return static_cast<double>(ever_active) / static_cast<double>(std::max<int64_t>(1, num_atoms));
}

/// What this rank was given, units ordered by key.
void Sparsifier::check_arguments() const {
  const Schedule& schedule = config_.schedule;
  validate(schedule);
  validate(config_.forward, config_.structure);
  require(!config_.forward.is_soft() || schedule.end_step() <= schedule.begin, kSparsifier, "end",
          schedule.end_step(),
          "is above begin=" + to_text(schedule.begin) +
              ", but a soft forward has no updates of masks; set end to begin");
  require(config_.grad_accum >= 1 && config_.grad_accum <= schedule.every, kSparsifier,
          "grad_accum", config_.grad_accum,
          "is outside [1, every=" + to_text(schedule.every) + "]");
  check_targets();
  const bool has_tokens = schedule.clock == Clock::kTokens;
  require(config_.grad_accum == 1 || !has_tokens, kSparsifier, "grad_accum", config_.grad_accum,
          "is above 1, but with the token clock nobody knows when an update comes");
  validate(config_.rule);
  const GrowCriterion grow = config_.rule.grow;
  require(config_.grad_accum == 1 || grow != GrowCriterion::kMomentum, kSparsifier, "grad_accum",
          config_.grad_accum, "is above 1, but momentum looks at all steps");
  require(config_.min_rows >= 0, kSparsifier, "min_rows", config_.min_rows, "is negative");
  require(
      config_.state.second_moment != GrownSecondMoment::kGradient || grow == GrowCriterion::kGrad,
      kSparsifier, "second_moment", "gradient", "needs grow = grad, which looks at gradients");
  require(config_.state.weight_std >= 0, kSparsifier, "weight_std", config_.state.weight_std,
          "is negative");
  require(config_.all_units.empty() || groups_.world.size() == 1, kSparsifier, "all_units",
          config_.all_units.size(), "are listed, but ranks tell each other; leave it empty");
  const Structure& structure = config_.structure;
  if (structure.cell == Cell::kGroup && structure.group > 0 && structure.group_keep > 0 &&
      structure.group_keep <= structure.group) {
    const Density own = Density::ratio(structure.group_keep, structure.group);
    require(config_.budget.density == own, kSparsifier, "density", config_.budget.density.value(),
            "differs from " + to_text(own.value()) + ", which N:M fixes; set that");
  }
  check_neurons();
  for (size_t u = 0; u < units_.size(); ++u) {
    const SparseUnit& unit = units_[u];
    check_unit(unit);
    if (u > 0 && units_[u - 1].key == unit.key) {
      fail_sparsifier("units", unit.name,
                      "has the key of " + units_[u - 1].name + " (" + to_string(unit.key) + ")");
    }
    for (size_t other = 0; other < u; ++other) {
      if (overlap(units_[other], unit)) {
        fail_sparsifier("units", unit.name, "is the same weight as " + units_[other].name);
      }
    }
    if (config_.order == UpdateOrder::kInsteadOfStep && is_part(unit) &&
        (schedule.stagger || has_tokens)) {
      fail_sparsifier("order", "instead_of_step",
                      "cannot leave out one expert of " + unit.name +
                          " alone when updates are staggered; choose before_step");
    }
    if (has_tokens && unit.holders == Holders::kReplicas && unit.link == nullptr &&
        unit.row_counts == nullptr && !unit.counts_rows) {
      fail_sparsifier("clock", "tokens",
                      "needs the rows of " + unit.name + ", which nobody counts");
    }
    if (config_.forward.is_soft() && unit.link == nullptr && unit.effective_parts == nullptr &&
        !unit.uses_effective) {
      fail_sparsifier("forward", "soft",
                      "reaches nothing through " + unit.name +
                          ", whose layer computes with the weight itself; use SparseLinear, or "
                          "Sparsifier::effective and set uses_effective");
    }
    if (grow == GrowCriterion::kGreedyProgress && unit.link == nullptr &&
        !config_.forward.is_soft()) {
      fail_sparsifier("grow", "greedy_progress",
                      "needs the inputs of " + unit.name +
                          ", which only a link hands over; use SparseLinear, or grad");
    }
    const bool has_part = unit.effective_parts != nullptr &&
                          unit.effective_parts->contains(unit.slot, unit.first_out);
    if (has_part || (unit.link != nullptr && unit.link->accumulate)) {
      fail_sparsifier("units", unit.name, "belongs to another Sparsifier");
    }
  }
}

Sparsifier::Sparsifier(std::vector<SparseUnit> units, SparsifierConfig config,
                       ParallelGroups groups)
    : units_(std::move(units)), config_(std::move(config)), groups_(std::move(groups)) {
  std::sort(units_.begin(), units_.end(),
            [](const SparseUnit& a, const SparseUnit& b) { return a.key < b.key; });
  const comm::CallSite site{.operation = kSparsifier};
  comm::agree(groups_.world, site, [this] { check_arguments(); });
  know_units(site);

  // From here on all ranks do the same with the same numbers.
  std::vector<AtomLayout> layouts;
  std::vector<BudgetUnit> budget_units;
  std::vector<UnitKey> keys;
  for (const Known& known : known_) {
    const AtomLayout layout = make_layout(config_.structure, known.out, known.in, known.name);
    BudgetUnit budget_unit;
    budget_unit.name = known.name;
    budget_unit.out = layout.rows * layout.atom_rows;
    budget_unit.in = layout.cols * layout.atom_cols;
    budget_unit.granule = layout.granule();
    budget_unit.floor = layout.smallest_budget();
    if (layout.group_keep > 0) {
      budget_unit.ceiling = budget_unit.floor;
    } else {
      const int64_t size = budget_unit.out * budget_unit.in;
      if (config_.budget.floor.has_value()) budget_unit.floor = config_.budget.floor->of(size);
      budget_unit.ceiling = config_.budget.ceiling.of(size);
    }
    for (const NmFrame& frame : config_.forward.frames) {
      make_layout(Structure::n_of_m(frame.n, frame.m), known.out, known.in, known.name);
    }
    budget_units.push_back(budget_unit);
    keys.push_back(known.key);
    layouts.push_back(layout);
  }
  const bool has_neurons = config_.structure.cell == Cell::kNeuron;
  std::vector<HiddenLayer> layers = know_hidden_layers();
  start_targets(layouts, std::move(budget_units), layers);
  const std::vector<UnitKey>& all = config_.all_units.empty() ? keys : config_.all_units;
  const std::vector<int64_t> offsets =
      has_neurons ? neuron_offsets(all) : update_offsets(config_.schedule, all);
  for (Known& known : known_) {
    const auto place = std::find(all.begin(), all.end(), known.key);
    if (place == all.end()) {
      fail_sparsifier("all_units", to_string(known.key), "is missing; list all units");
    }
    known.offset = offsets[static_cast<size_t>(place - all.begin())];
  }
  mean_rows_ = config_.schedule.mean_rows;
  size_t place = 0;
  std::vector<Unit> states;
  for (const SparseUnit& unit : units_) {
    while (known_[place].key != unit.key) ++place;
    Unit state;
    state.layout = layouts[place];
    state.place = place;
    state.nnz = targets_.first()[place];
    if (config_.schedule.nm_ramp.has_value()) {
      state.layout = frame_layout(states.size(), 0);
      state.nnz = state.layout.smallest_budget();
    }
    states.push_back(std::move(state));
  }
  states_ = std::move(states);
  hold_hidden_layers(layers);
  if (config_.forward.is_soft()) {
    start_soft();
    return;
  }
  // Nothing is refused from here on: links point to this.
  for (size_t u = 0; u < units_.size(); ++u) {
    const SparseUnit& unit = units_[u];
    set_mask(u, has_neurons
                    ? crossings_of(u)
                    : random_mask(states_[u].layout, states_[u].nnz,
                                  draw_key(config_.seed, 0, unit.key, UnitDraw::kFirstMask)));
    if (unit.link != nullptr) {
      unit.link->accumulate = [this, u](const at::Tensor& x, const at::Tensor& delta) {
        states_[u].num_pending += x.size(0);
        take_link(u, x, delta);
      };
    } else if (unit.row_counts != nullptr) {
      ++unit.row_counts->num_readers;
      states_[u].num_rows_seen = unit.row_counts->rows[unit.row_slot];
    }
  }
}

Sparsifier::~Sparsifier() {
  for (const SparseUnit& unit : units_) {
    if (config_.forward.is_soft() && unit.effective_parts != nullptr) {
      unit.effective_parts->erase(unit.slot, unit.first_out);
    }
    if (unit.link != nullptr) {
      *unit.link = {};
    } else if (unit.row_counts != nullptr) {
      --unit.row_counts->num_readers;
    }
  }
}

void Sparsifier::attach(torch::optim::Optimizer& optimizer) {
  require_known(optimizer);
  const bool is_used = std::any_of(units_.begin(), units_.end(), [&](const SparseUnit& unit) {
    return holds(optimizer, unit.parameter);
  });
  if (!is_used && !units_.empty()) {
    fail_sparsifier("optimizer", "given", "holds no parameter of a unit");
  }
  CompressedStates* const compressed = compressed_states(optimizer);
  const bool keeps_age = config_.state.second_moment == GrownSecondMoment::kAge;
  if (compressed == nullptr && keeps_age) {
    fail_sparsifier("second_moment", "age",
                    "needs states of an optimizer of moe/sparse_optimizer.h");
  }
  if (compressed != nullptr && config_.forward.is_soft()) {
    fail_sparsifier("optimizer", "with compressed states",
                    "forgets inactive weights, which a soft method trains; use LibTorch's own");
  }
  for (size_t u = 0; compressed != nullptr && u < units_.size(); ++u) {
    const SparseUnit& unit = units_[u];
    if (!holds(optimizer, unit.parameter)) continue;
    compressed->compress(unit.parameter, unit.slot, slot_positions(u, states_[u].mask), keeps_age);
  }
  optimizers_.push_back(&optimizer);
}

bool Sparsifier::has_token_clock(const Known& unit) const {
  return config_.schedule.clock == Clock::kTokens && unit.holders == Holders::kReplicas;
}

/// Of an expert in a step; 0 while it is being measured.
double Sparsifier::mean_rows(int64_t step) const {
  if (mean_rows_ > 0 || step < config_.schedule.begin) return mean_rows_;
  int64_t num_units = 0, num_rows = 0;
  for (const Known& unit : known_) {
    if (!has_token_clock(unit)) continue;
    ++num_units;
    num_rows += unit.total_rows;
  }
  const auto num_parts = static_cast<double>(num_units * num_counted_steps_);
  return num_parts > 0 ? static_cast<double>(num_rows) / num_parts : 0;
}

double Sparsifier::time_of(const Known& unit, int64_t step) const {
  if (!has_token_clock(unit)) return static_cast<double>(step);
  const double mean = mean_rows(step);
  return mean > 0 ? static_cast<double>(unit.total_rows) / mean : -1;
}

bool Sparsifier::is_due(const Known& unit, int64_t step) const {
  const Schedule& schedule = config_.schedule;
  if (is_freeing_step(unit, step)) return true;
  if (!has_token_clock(unit)) return is_update_step(schedule, step, unit.offset);
  if (step < schedule.begin || step >= schedule.end_step()) return false;
  return update_window(schedule, time_of(unit, step), unit.offset) > unit.window;
}

StepPlan Sparsifier::plan(int64_t step) const {
  StepPlan result;
  result.step = step;
  for (const Unit& state : states_) {
    const Known& unit = known_[state.place];
    UnitAction action = UnitAction::kNone;
    if (is_due(unit, step)) {
      action = UnitAction::kUpdate;
    } else if (needs_gradient()) {
      const Schedule& schedule = config_.schedule;
      const bool is_averaged = config_.rule.grow == GrowCriterion::kMomentum &&
                               step < schedule.end_step() && schedule.begin < schedule.end_step();
      if (is_averaged || next_update(unit, step) >= 0) action = UnitAction::kAccumulate;
    }
    result.actions.push_back(action);
  }
  return result;
}

StepPlan Sparsifier::begin_step(int64_t step) {
  require(step >= 0, kSparsifier, "step", step, "is negative");
  if (config_.forward.is_soft()) choose_masks(step);
  const Schedule& schedule = config_.schedule;
  const bool is_measured = schedule.clock == Clock::kTokens && mean_rows_ == 0 &&
                           step >= schedule.begin && step < schedule.end_step();
  if (is_measured && std::any_of(known_.begin(), known_.end(),
                                 [this](const Known& unit) { return has_token_clock(unit); })) {
    const double mean = mean_rows(step);
    require(mean > 0, kSparsifier, "mean_rows", mean,
            "was measured in the " + to_text(num_counted_steps_) +
                " steps so far; train before begin=" + to_text(schedule.begin) + ", or set it");
    mean_rows_ = mean;
  }
  remove_candidates();  // of a step that was not ended
  current_ = plan(step);
  due_.clear();
  for (size_t i = 0; i < known_.size(); ++i) {
    known_[i].time = time_of(known_[i], step);
    if (is_due(known_[i], step)) due_.push_back(i);
  }
  begin_sources(step);
  is_started_ = true;
  last_step_ = step;
  place_candidates(step);
  return current_;
}

void Sparsifier::require_step(const char* call, int64_t step) const {
  if (!is_started_) {
    fail_sparsifier("step", to_text(step), std::string("of ") + call + " was not begun");
  }
  require(step == current_.step, kSparsifier, "step", step,
          std::string("of ") + call + " differs from step=" + to_text(current_.step) +
              " of begin_step");
}

void Sparsifier::count_rows(const UnitKey& key, int64_t num_rows) {
  require(num_rows >= 0, kSparsifier, "num_rows", num_rows, "is negative");
  find(key).num_pending += num_rows;
}

UpdateReport Sparsifier::end_backward(int64_t step) {
  require_step("end_backward", step);
  const c10::NoGradGuard no_grad;
  const comm::CallSite site{.operation = kSparsifier, .step = step};
  remove_candidates();
  if (needs_gradient()) add_sources(site);
  if (config_.schedule.clock == Clock::kTokens) {
    sum_rows(site);
    ++num_counted_steps_;
  }
  UpdateReport report;
  report.step = step;
  if (config_.order != UpdateOrder::kAfterStep) report = update(step);
  for (size_t u = 0; u < units_.size(); ++u) {
    at::Tensor& gradient = units_[u].parameter.mutable_grad();
    if (!gradient.defined()) continue;
    if (config_.order == UpdateOrder::kInsteadOfStep &&
        current_.actions[u] == UnitAction::kUpdate) {
      gradient = at::Tensor();
    } else if (config_.forward.is_soft()) {
      finish_soft_gradient(u);
    } else {
      keep_active(u, units_[u].part_of(gradient));
    }
  }
  return report;
}

UpdateReport Sparsifier::end_step(int64_t step) {
  require_step("end_step", step);
  const c10::NoGradGuard no_grad;
  UpdateReport report;
  report.step = step;
  if (config_.order == UpdateOrder::kAfterStep) report = update(step);
  if (optimizers_.empty() && !config_.forward.is_soft()) {
    for (size_t u = 0; u < units_.size(); ++u) {
      keep_active(u, units_[u].weight());
    }
  }
  is_started_ = false;
  return report;
}

Sparsifier::Unit& Sparsifier::find(const UnitKey& key) {
  return const_cast<Unit&>(std::as_const(*this).find(key));
}
const Sparsifier::Unit& Sparsifier::find(const UnitKey& key) const {
  const auto place = std::lower_bound(
      units_.begin(), units_.end(), key,
      [](const SparseUnit& unit, const UnitKey& wanted) { return unit.key < wanted; });
  if (place == units_.end() || place->key != key) {
    fail_sparsifier("unit", to_string(key), "is not of this Sparsifier");
  }
  return states_[static_cast<size_t>(place - units_.begin())];
}

const PackedMask& Sparsifier::mask(const UnitKey& key) const { return find(key).mask; }
const AtomLayout& Sparsifier::layout(const UnitKey& key) const { return find(key).layout; }

UnitStats Sparsifier::stats(const UnitKey& key) const {
  const Unit& unit = find(key);
  UnitStats stats;
  stats.nnz = count_positions(unit.layout, unit.mask);
  stats.density =
      static_cast<double>(stats.nnz) / static_cast<double>(unit.layout.out * unit.layout.in);
  stats.ever_active =
      static_cast<double>(unit.ever_active.count()) / static_cast<double>(unit.layout.num_atoms());
  stats.num_updates = unit.num_updates;
  stats.num_skipped = unit.num_skipped;
  if (unit.num_updates > 0) stats.churn = unit.churn_sum / static_cast<double>(unit.num_updates);
  stats.fingerprint = unit.mask.fingerprint();
  const PackedMask positions = position_bits(unit.layout, unit.mask);
  stats.active_rows = active_rows(positions).count();
  stats.active_columns = active_columns(positions).count();
  return stats;
}

int64_t Sparsifier::nnz() const {
  int64_t sum = 0;
  for (const Unit& unit : states_) sum += count_positions(unit.layout, unit.mask);
  return sum;
}

}  // namespace perseid
