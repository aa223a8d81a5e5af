#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

#include "moe/sparsifier_unit.h"

// Hidden units: coupled neurons (their masks, their candidates), and what neuron ablation frees.

namespace perseid {
namespace {

std::vector<int64_t> listed(const PackedMask& mask) {
  std::vector<int64_t> places;
  for (int64_t place = 0; place < mask.num_places(); ++place) {
    if (mask.test(place)) places.push_back(place);
  }
  return places;
}

at::Tensor place_tensor(const std::vector<int64_t>& places, const at::Tensor& like) {
  return at::tensor(places, at::kLong).to(like.device());
}

AtomLayout row_layout(int64_t size) {
  return make_layout(Structure::unstructured(), 1, size, "hidden units");
}

/// A key that all matrices of one expert share, for updates in turns.
UnitKey shared_key(UnitKey key) {
  const bool is_of_expert =
      key.matrix == Matrix::kW1 || key.matrix == Matrix::kW3 || key.matrix == Matrix::kW2;
  if (is_of_expert) key.matrix = Matrix::kW2;
  return key;
}

}  // namespace

/// What the configuration alone decides.
void Sparsifier::check_neurons() const {
  const UpdateRule& rule = config_.rule;
  const Ablation& ablation = config_.ablation;
  const bool has_neurons = config_.structure.cell == Cell::kNeuron;
  validate(ablation);
  const auto refuse = [](const char* argument, const std::string& value, const char* limit) {
    fail_sparsifier(argument, value, limit);
  };
  if (ablation.is_on()) {
    const bool is_fan_in = config_.structure.cell == Cell::kRow &&
                           config_.structure.atom_rows == 1 && config_.structure.atom_cols == 1;
    if (!is_fan_in) refuse("ablation", "on", "needs Structure::constant_fan_in()");
    if (rule.grow != GrowCriterion::kGrad) {
      refuse("ablation", "on", "needs grow = grad, which looks at gradients");
    }
    if (rule.drop != DropCriterion::kMagnitude) {
      refuse("ablation", "on", "ranks weights by their size; choose drop = magnitude");
    }
    if (config_.forward.is_soft()) refuse("ablation", "on", "needs a hard forward");
  } else if (!ablation.kept.empty()) {
    refuse("ablation.kept", ablation.kept.front(), "keeps rows, but gamma=0 ablates none");
  }
  if (!config_.neurons.links.empty() && !has_neurons && !ablation.is_on()) {
    refuse("links", "given", "belong to coupled neurons or ablation; set one of these, or none");
  }
  if (!has_neurons) return;
  require(config_.neurons.candidates >= 1, kSparsifier, "candidates", config_.neurons.candidates,
          "is below 1");
  if (rule.drop != DropCriterion::kMagnitude) {
    refuse("drop", "other than magnitude", "is not a score of hidden units");
  }
  if (rule.grow != GrowCriterion::kGrad && rule.grow != GrowCriterion::kRandom) {
    refuse("grow", "other than grad and random", "is not a score of hidden units");
  }
  if (!rule.exclude_just_dropped) {
    refuse("exclude_just_dropped", "false", "cannot be: who comes was a candidate before");
  }
  if (config_.state.weight != GrownWeight::kZero) {
    refuse("grown weight", "normal", "would change outputs; hidden units start with column 0");
  }
  if (config_.state.second_moment == GrownSecondMoment::kGradient) {
    refuse("second_moment", "gradient", "is not known for new rows; choose zero, mean or age");
  }
  if (config_.forward.is_soft()) refuse("structure", "neuron", "needs a hard forward");
  if (config_.schedule.stagger && !config_.neurons.links.empty()) {
    refuse("stagger", "true", "parts weights that links couple; set it to false");
  }
}

/// Of all ranks, in the same order on each; as matrices the places in known_.
std::vector<HiddenLayer> Sparsifier::know_hidden_layers() {
  const bool has_neurons = config_.structure.cell == Cell::kNeuron;
  const Ablation& ablation = config_.ablation;
  if (!has_neurons && !ablation.is_on()) return {};
  std::vector<NeuronMatrix> matrices;
  for (const Known& unit : known_) matrices.push_back({unit.key, unit.name, unit.out, unit.in});
  std::vector<HiddenLayer> layers = hidden_layers(matrices, config_.neurons.links);

  std::vector<bool> is_coupled(known_.size(), false);
  for (const HiddenLayer& layer : layers) {
    Known& columns = known_[layer.columns_of];
    is_coupled[layer.columns_of] = true;
    bool has_bias = false;
    for (const size_t place : layer.rows_of) {
      const Known& rows = known_[place];
      is_coupled[place] = true;
      has_bias = has_bias || rows.has_bias;
      if (rows.holders != columns.holders ||
          (rows.holders == Holders::kReplicas && rows.key.expert != columns.key.expert)) {
        fail_sparsifier("links", rows.name, "may be on other ranks than " + columns.name);
      }
    }
    columns.frees_columns = ablation.is_on() && !has_bias;
  }
  for (size_t i = 0; has_neurons && i < known_.size(); ++i) {
    if (is_coupled[i]) continue;
    fail_sparsifier("units", known_[i].name,
                    "has no hidden units with another; pass w1, w3 and w2 of an expert, or list "
                    "links");
  }
  for (const std::string& pattern : ablation.kept) {
    bool is_used = false;
    for (Known& unit : known_) {
      if (!fits_pattern(pattern, unit.name)) continue;
      unit.is_kept = is_used = true;
    }
    if (!is_used) fail_sparsifier("ablation.kept", pattern, "fits no unit; correct it");
  }
  return layers;
}

/// Budgets are of hidden units; nnz, of each of known_, follows.
Allocation Sparsifier::allocate_neurons(std::vector<HiddenLayer>& layers) const {
  std::vector<BudgetUnit> budget_units;
  for (const HiddenLayer& layer : layers) {
    BudgetUnit unit;
    unit.name = known_[layer.columns_of].name;
    unit.out = layer.size;
    unit.in = layer.width;
    unit.granule = layer.width;
    const int64_t size = unit.out * unit.in;
    unit.floor = layer.width;
    if (config_.budget.floor.has_value()) {
      unit.floor = std::max(unit.floor, config_.budget.floor->of(size));
    }
    unit.ceiling = config_.budget.ceiling.of(size);
    budget_units.push_back(unit);
  }
  const Allocation shares = allocate(config_.budget, budget_units);
  std::vector<int64_t> rows, columns;
  for (const Known& unit : known_) {
    rows.push_back(unit.out);
    columns.push_back(unit.in);
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].num_active = shares.nnz[i] / layers[i].width;
    columns[layers[i].columns_of] = layers[i].num_active;
    for (const size_t place : layers[i].rows_of) rows[place] = layers[i].num_active;
  }
  Allocation result;
  result.rest = shares.rest;
  for (size_t i = 0; i < known_.size(); ++i) result.nnz.push_back(rows[i] * columns[i]);
  return result;
}

/// One for each key; equal for the matrices of an expert.
std::vector<int64_t> Sparsifier::neuron_offsets(const std::vector<UnitKey>& keys) const {
  std::vector<UnitKey> shared;
  for (const UnitKey& key : keys) shared.push_back(shared_key(key));
  std::sort(shared.begin(), shared.end());
  shared.erase(std::unique(shared.begin(), shared.end()), shared.end());
  const std::vector<int64_t> offsets = update_offsets(config_.schedule, shared);
  std::vector<int64_t> result;
  for (const UnitKey& key : keys) {
    const auto place = std::lower_bound(shared.begin(), shared.end(), shared_key(key));
    result.push_back(offsets[static_cast<size_t>(place - shared.begin())]);
  }
  return result;
}

/// Fills hidden_ with those of this rank, and draws the first masks of coupled neurons.
void Sparsifier::hold_hidden_layers(const std::vector<HiddenLayer>& layers) {
  constexpr size_t kElsewhere = ~size_t{0};
  std::vector<size_t> unit_of(known_.size(), kElsewhere);
  for (size_t u = 0; u < units_.size(); ++u) unit_of[states_[u].place] = u;
  for (const HiddenLayer& layer : layers) {
    if (unit_of[layer.columns_of] == kElsewhere) continue;
    const auto number = static_cast<int64_t>(hidden_.size());
    Hidden mine;
    mine.columns_of = unit_of[layer.columns_of];
    states_[mine.columns_of].column_layer = number;
    for (const size_t place : layer.rows_of) {
      mine.rows_of.push_back(unit_of[place]);
      states_[unit_of[place]].row_layer = number;
    }
    if (config_.structure.cell == Cell::kNeuron) {
      mine.active =
          random_mask(row_layout(layer.size), layer.num_active,
                      draw_key(config_.seed, 0, units_[mine.columns_of].key, UnitDraw::kFirstMask));
    }
    hidden_.push_back(std::move(mine));
  }
}

/// The mask of a unit from those of its hidden units.
PackedMask Sparsifier::crossings_of(size_t u) const {
  const Unit& state = states_[u];
  const auto active = [this](int64_t layer) {
    return layer < 0 ? nullptr : &hidden_[static_cast<size_t>(layer)].active;
  };
  return crossings(state.layout.out, state.layout.in, active(state.row_layer),
                   active(state.column_layer));
}

const PackedMask& Sparsifier::neurons(const UnitKey& key) const {
  const int64_t layer = find(key).column_layer;
  if (layer < 0 || config_.structure.cell != Cell::kNeuron) {
    fail_sparsifier("unit", to_string(key), "has no columns of coupled neurons; name a w2");
  }
  return hidden_[static_cast<size_t>(layer)].active;
}

/// Whether an update looks at this unit's gradient.
bool Sparsifier::wants_gradient(size_t u) const {
  return needs_gradient() &&
         (config_.structure.cell != Cell::kNeuron || states_[u].column_layer >= 0);
}

// ---- candidates ---------------------------------------------------------------------------------
/// The first update of the unit in `step` or later; it has one within grad_accum steps.
int64_t Sparsifier::next_update(size_t u, int64_t step) const {
  int64_t result = step;
  while (!is_due(known_[states_[u].place], result) && result - step < config_.grad_accum) ++result;
  return result;
}

/// [1, F]
PackedMask Sparsifier::candidate_places(const Hidden& layer, int64_t update_step) const {
  const int64_t size = layer.active.num_places(), num_active = layer.active.count();
  const int64_t num_inactive = size - num_active;
  const Known& unit = known_[states_[layer.columns_of].place];
  const double time = has_token_clock(unit) ? unit.time : static_cast<double>(update_step);
  const int64_t num_wanted = share_of(drop_fraction(config_.schedule, time), num_active);
  const int64_t count = num_wanted > num_inactive / config_.neurons.candidates
                            ? num_inactive
                            : num_wanted * config_.neurons.candidates;
  PackedMask places(1, size);
  kernels::select_atoms(
      {1, size}, kernels::AtomOrder::kLargest, nullptr,
      without(PackedMask::full(1, size), layer.active).data(), &count,
      draw_key(config_.seed, update_step, units_[layer.columns_of].key, UnitDraw::kNeuronPlaces),
      places.data());
  return places;
}

/// [places, in] what rows of the unit start with if the update of that step lets them come.
at::Tensor Sparsifier::candidate_rows(size_t u, const std::vector<int64_t>& places,
                                      int64_t update_step) const {
  const Unit& state = states_[u];
  const PackedMask columns = state.column_layer < 0
                                 ? PackedMask::full(1, state.layout.in)
                                 : hidden_[static_cast<size_t>(state.column_layer)].active;
  return fresh_rows(places, columns,
                    draw_key(config_.seed, update_step, units_[u].key, UnitDraw::kFill));
}

void Sparsifier::place_candidates(int64_t step) {
  if (config_.structure.cell != Cell::kNeuron || !needs_gradient()) return;
  const c10::NoGradGuard no_grad;
  for (Hidden& layer : hidden_) {
    if (current_.actions[layer.columns_of] == UnitAction::kNone) continue;
    const int64_t update_step = next_update(layer.columns_of, step);
    layer.candidates = listed(candidate_places(layer, update_step));
    if (layer.candidates.empty()) continue;
    for (const size_t u : layer.rows_of) {
      const at::Tensor weight = units_[u].weight();
      weight.index_copy_(0, place_tensor(layer.candidates, weight),
                         candidate_rows(u, layer.candidates, update_step).to(weight.options()));
      set_link(u);
    }
  }
}

void Sparsifier::remove_candidates() {
  const c10::NoGradGuard no_grad;
  for (Hidden& layer : hidden_) {
    if (layer.candidates.empty()) continue;
    const std::vector<int64_t> places = std::exchange(layer.candidates, {});
    for (const size_t u : layer.rows_of) {
      const at::Tensor weight = units_[u].weight();
      weight.index_fill_(0, place_tensor(places, weight), 0);
      set_link(u);
    }
  }
}

// ---- updates ------------------------------------------------------------------------------------
/// What an update does to the hidden units of one layer. Fills report.skipped.
MaskUpdate Sparsifier::change_neurons(const Hidden& layer, int64_t step, UnitUpdate& report) const {
  const size_t columns_of = layer.columns_of;
  const SparseUnit& columns = units_[columns_of];
  const Unit& state = states_[columns_of];
  const Known& known = known_[state.place];
  const int64_t size = layer.active.num_places();
  MaskUpdate unchanged;
  unchanged.mask = layer.active;
  if (known.counts_rows && state.num_rows < config_.min_rows) {
    report.skipped = SkipReason::kFewRows;
  } else if (needs_gradient() && !state.grad_sum.defined()) {
    report.skipped = SkipReason::kNoGradient;
  }
  if (report.skipped != SkipReason::kNotSkipped) return unchanged;

  const auto squares = [](const at::Tensor& values, int64_t dim) {
    return values.detach().to(at::kCPU, at::kDouble).square().sum(dim);
  };
  at::Tensor sums = squares(columns.weight(), 0);
  for (const size_t u : layer.rows_of) sums = sums + squares(units_[u].weight(), 1);
  const at::Tensor drop_scores = sums.sqrt().to(at::kFloat).contiguous();
  at::Tensor grow_scores;
  if (needs_gradient()) {
    const PackedMask candidates = candidate_places(layer, step);
    grow_scores = squares(state.grad_sum, 0).sqrt().to(at::kFloat).contiguous();
    float* const score = grow_scores.mutable_data_ptr<float>();
    for (int64_t place = 0; place < size; ++place) {
      if (!candidates.test(place)) score[place] = 0;
    }
  }
  UpdateInput input;
  input.active = &layer.active;
  input.drop_scores = drop_scores.const_data_ptr<float>();
  if (grow_scores.defined()) input.grow_scores = grow_scores.const_data_ptr<float>();
  input.fraction = drop_fraction(config_.schedule, known.time);
  input.drop_key = draw_key(config_.seed, step, columns.key, UnitDraw::kDrop);
  input.grow_key = draw_key(config_.seed, step, columns.key, UnitDraw::kGrow);
  input.random_key = draw_key(config_.seed, step, columns.key, UnitDraw::kRandomGrow);
  MaskUpdate change = update_mask(row_layout(size), config_.rule, input);
  if (change.num_non_finite > 0) {
    ErrorDetail detail{kSparsifier, "scores of hidden units of " + columns.name,
                       to_text(change.num_non_finite),
                       "are NaN or infinite; the training has diverged"};
    detail.layer = static_cast<int>(columns.key.layer);
    detail.step = step;
    throw Diverged(detail);
  }
  if (change.has_no_gradient) report.skipped = SkipReason::kNoGradient;
  return change;
}

/// Of all units that are due. A unit between two hidden layers changes with both.
std::vector<Sparsifier::Proposal> Sparsifier::propose_neurons(int64_t step) {
  std::vector<PackedMask> masks;
  std::vector<UnitUpdate> reports;
  for (const Hidden& layer : hidden_) {
    UnitUpdate report;
    const bool is_due_now = current_.actions[layer.columns_of] == UnitAction::kUpdate;
    masks.push_back(is_due_now ? change_neurons(layer, step, report).mask : layer.active);
    reports.push_back(report);
  }
  std::vector<Proposal> result;
  for (size_t u = 0; u < units_.size(); ++u) {
    if (current_.actions[u] != UnitAction::kUpdate) continue;
    const Unit& state = states_[u];
    Proposal proposal;
    proposal.unit = u;
    const PackedMask* sides[2] = {nullptr, nullptr};
    bool is_changed = false;
    const int64_t layers[2] = {state.row_layer, state.column_layer};
    for (int side = 0; side < 2; ++side) {
      if (layers[side] < 0) continue;
      const auto layer = static_cast<size_t>(layers[side]);
      sides[side] = &masks[layer];
      if (reports[layer].skipped == SkipReason::kNotSkipped) {
        is_changed = true;
      } else {
        proposal.report.skipped = reports[layer].skipped;
      }
    }
    if (is_changed) proposal.report.skipped = SkipReason::kNotSkipped;
    proposal.layout = state.layout;
    proposal.nnz = state.nnz;
    proposal.report.key = units_[u].key;
    proposal.change.mask = crossings(state.layout.out, state.layout.in, sides[0], sides[1]);
    proposal.change.dropped = without(state.mask, proposal.change.mask);
    proposal.change.grown = without(proposal.change.mask, state.mask);
    proposal.change.num_dropped = proposal.report.num_dropped = proposal.change.dropped.count();
    proposal.change.num_grown = proposal.report.num_grown = proposal.change.grown.count();
    result.push_back(std::move(proposal));
  }
  return result;
}

/// Rows of the unit that come by an update, before its mask is set. Their new columns stay 0.
void Sparsifier::start_grown_rows(size_t u, int64_t step, const PackedMask& mask) {
  const Unit& state = states_[u];
  const std::vector<int64_t> places = listed(without(active_rows(mask), active_rows(state.mask)));
  if (places.empty()) return;
  const at::Tensor weight = units_[u].weight();
  weight.index_copy_(0, place_tensor(places, weight),
                     candidate_rows(u, places, step).to(weight.options()));
}

/// Throws ConfigError for masks, by unit and with its budget, that are not of the same hidden
/// units.
void Sparsifier::check_saved_neurons(const std::vector<const PackedMask*>& masks) const {
  if (config_.structure.cell != Cell::kNeuron) return;
  for (const Hidden& layer : hidden_) {
    const PackedMask active = active_columns(*masks[layer.columns_of]);
    const std::string& name = units_[layer.columns_of].name;
    if (active.count() != layer.active.count()) {
      fail_sparsifier("mask of " + name, to_text(active.count()),
                      "hidden units are not its " + to_text(layer.active.count()));
    }
    for (const size_t u : layer.rows_of) {
      if (active_rows(*masks[u]) == active) continue;
      fail_sparsifier("mask of " + units_[u].name, "given", "has other hidden units than " + name);
    }
  }
}

// ---- ablation -----------------------------------------------------------------------------------
bool Sparsifier::has_ablation(size_t u) const {
  return config_.ablation.is_on() && units_[u].key.matrix != Matrix::kW2 &&
         !known_[states_[u].place].is_kept;
}

/// The step in which masks freeze: what reads ablated units then goes.
bool Sparsifier::is_freeing_step(const Known& unit, int64_t step) const {
  const int64_t end = config_.schedule.end_step();
  return unit.frees_columns && config_.ablation.free_columns == FreeColumns::kAtEnd &&
         step == end && end > config_.schedule.begin;
}

/// Entries of columns whose hidden unit is 0 after the updates of this step. Empty: none is to go.
PackedMask Sparsifier::barred_columns(size_t u, int64_t step,
                                      const std::vector<Proposal>& earlier) const {
  const Known& unit = known_[states_[u].place];
  const bool is_now =
      config_.ablation.free_columns == FreeColumns::kNow || is_freeing_step(unit, step);
  if (!unit.frees_columns || !is_now) return {};
  const Hidden& layer = hidden_[static_cast<size_t>(states_[u].column_layer)];
  PackedMask zero(1, states_[u].layout.in);
  for (const size_t rows : layer.rows_of) {
    const auto place = std::find_if(earlier.begin(), earlier.end(), [&](const Proposal& proposal) {
      return proposal.unit == rows && proposal.report.skipped == SkipReason::kNotSkipped;
    });
    const PackedMask left =
        active_rows(place != earlier.end() ? place->change.mask : states_[rows].mask);
    zero = zero | without(PackedMask::full(1, left.cols()), left);
  }
  return crossings(states_[u].layout.out, states_[u].layout.in, nullptr, &zero);
}

/// Whether a saved mask of the unit is one that its number of weights allows.
bool Sparsifier::keeps_budget(size_t u, const AtomLayout& layout, const UnitState& saved) const {
  std::vector<int64_t> counts(static_cast<size_t>(layout.cells.num_cells));
  kernels::count_atoms(layout.cells, saved.mask.data(), counts.data());
  if (has_ablation(u)) {
    const bool loses_rest = config_.ablation.loses_rest;
    const int64_t count = saved.mask.count();
    return (loses_rest ? count <= saved.nnz : count == saved.nnz) && are_shared(counts, loses_rest);
  }
  const int64_t per_cell = saved.nnz / layout.granule();
  return per_cell * layout.granule() == saved.nnz &&
         std::all_of(counts.begin(), counts.end(),
                     [per_cell](int64_t count) { return count == per_cell; });
}

}  // namespace perseid
