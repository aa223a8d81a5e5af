#include "moe/sparsifier.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/masked_select.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <utility>

#include "kernels/error.h"
#include "moe/optimizer_states.h"
#include "moe/sparse_optimizer.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

constexpr const char* kSparsifier = "sparsifier";

at::Tensor slot_of(const at::Tensor& parameter, int64_t slot) {
  return slot < 0 ? parameter : parameter.select(0, slot);
}

[[noreturn]] void fail(const std::string& argument, const std::string& value,
                       const std::string& limit) {
  throw ConfigError(ErrorDetail{kSparsifier, argument, value, limit});
}

void check_unit(const SparseUnit& unit) {
  if (!unit.parameter.defined()) fail("parameter of " + unit.name, "undefined", "is missing");
  const int64_t wanted = unit.slot < 0 ? 2 : 3;
  if (unit.parameter.dim() != wanted) {
    fail("parameter of " + unit.name, to_text(unit.parameter.sizes()),
         unit.slot < 0 ? "is not [out, in]" : "is not [experts, out, in]");
  }
  if (unit.slot >= 0 && unit.slot >= unit.parameter.size(0)) {
    fail("slot of " + unit.name, to_text(unit.slot),
         "is outside its parameter of " + to_text(unit.parameter.size(0)) + " experts");
  }
  if (!at::isFloatingType(unit.parameter.scalar_type())) {
    fail("parameter of " + unit.name, to_text(unit.parameter.scalar_type()),
         "is not a floating-point type");
  }
}

/// [out, in] standard normal numbers of a key, on the host.
at::Tensor normal_numbers(const AtomLayout& layout, bool is_double, kernels::RandomKey key) {
  const at::Tensor result =
      at::empty({layout.out, layout.in}, is_double ? at::kDouble : at::kFloat);
  kernels::fill_normal(result.mutable_data_ptr(), result.numel(),
                       is_double ? kernels::DType::kFloat64 : kernels::DType::kFloat32, key);
  return result;
}

/// Values of inactive positions become 0.
void keep_active(const AtomLayout& layout, const PackedMask& mask, const at::Tensor& inactive,
                 const at::Tensor& values) {
  if (layout.is_elementwise()) {
    zero_inactive(mask, inactive, values);
  } else {
    values.masked_fill_(inactive, 0);
  }
}

/// Mean of the marked elements; sums in order, so that threads do not matter. 0 without any.
double mean_where(const at::Tensor& values, const at::Tensor& is_counted) {
  const at::Tensor counted =
      values.masked_select(is_counted).to(at::kCPU, at::kDouble).contiguous();
  if (counted.numel() == 0) return 0;
  const double* const data = counted.const_data_ptr<double>();
  double sum = 0;
  for (int64_t i = 0; i < counted.numel(); ++i) sum += data[i];
  return sum / static_cast<double>(counted.numel());
}

}  // namespace

struct Sparsifier::Unit {
  AtomLayout layout;
  PackedMask mask;
  PackedMask ever_active;
  at::Tensor inactive;  ///< [out, in] bool, where the parameter is
  int64_t offset = 0;   ///< of its update steps
  int64_t num_rows = 0;
  int64_t num_updates = 0;
  int64_t num_skipped = 0;
  at::Tensor grad_sum;
};

/// What an update of one unit would do.
struct Sparsifier::Proposal {
  size_t unit = 0;
  UnitUpdate report;
  MaskUpdate change;
};

at::Tensor SparseUnit::weight() const { return slot_of(parameter.detach(), slot); }

std::vector<SparseUnit> expert_units(const std::string& name, const at::Tensor& parameter,
                                     int64_t layer, Matrix matrix,
                                     const std::vector<int64_t>& expert_ids) {
  if (parameter.dim() != 3 || parameter.size(0) != static_cast<int64_t>(expert_ids.size())) {
    fail("parameter of " + name, to_text(parameter.sizes()),
         "is not [experts, out, in] of " + to_text(expert_ids.size()) + " experts");
  }
  std::vector<SparseUnit> units;
  for (size_t slot = 0; slot < expert_ids.size(); ++slot) {
    SparseUnit unit;
    unit.name = name + "." + to_text(expert_ids[slot]);
    unit.key = {layer, expert_ids[slot], matrix};
    unit.parameter = parameter;
    unit.slot = static_cast<int64_t>(slot);
    units.push_back(unit);
  }
  return units;
}

bool StepPlan::has_update() const {
  return std::find(actions.begin(), actions.end(), UnitAction::kUpdate) != actions.end();
}

Sparsifier::Sparsifier(std::vector<SparseUnit> units, SparsifierConfig config)
    : units_(std::move(units)), config_(std::move(config)) {
  validate(config_.schedule);
  require(config_.grad_accum >= 1 && config_.grad_accum <= config_.schedule.every, kSparsifier,
          "grad_accum", config_.grad_accum,
          "is outside [1, every=" + to_text(config_.schedule.every) + "]");
  require(config_.min_rows >= 0, kSparsifier, "min_rows", config_.min_rows, "is negative");
  require(config_.state.second_moment != GrownSecondMoment::kGradient || needs_gradient(),
          kSparsifier, "second_moment", "gradient", "needs grow = grad, which looks at gradients");
  require(config_.state.weight_std >= 0, kSparsifier, "weight_std", config_.state.weight_std,
          "is negative");
  std::sort(units_.begin(), units_.end(),
            [](const SparseUnit& a, const SparseUnit& b) { return a.key < b.key; });
  const Structure& structure = config_.structure;
  if (structure.cell == Cell::kGroup && structure.group > 0 && structure.group_keep > 0 &&
      structure.group_keep <= structure.group) {
    const Density own = Density::ratio(structure.group_keep, structure.group);
    require(config_.budget.density == own, kSparsifier, "density", config_.budget.density.value(),
            "differs from " + to_text(own.value()) + ", which N:M fixes; set that");
  }
  std::vector<BudgetUnit> budget_units;
  std::vector<UnitKey> keys;
  for (size_t u = 0; u < units_.size(); ++u) {
    const SparseUnit& unit = units_[u];
    check_unit(unit);
    if (u > 0 && units_[u - 1].key == unit.key) {
      fail("units", unit.name,
           "has the key of " + units_[u - 1].name + " (" + to_string(unit.key) + ")");
    }
    for (size_t other = 0; other < u; ++other) {
      if (units_[other].parameter.is_same(unit.parameter) && units_[other].slot == unit.slot) {
        fail("units", unit.name, "is the same weight as " + units_[other].name);
      }
    }
    if (config_.order == UpdateOrder::kInsteadOfStep && config_.schedule.stagger &&
        unit.slot >= 0) {
      fail("order", "instead_of_step",
           "cannot leave out one expert of " + unit.name +
               " alone when updates are staggered; choose before_step");
    }
    Unit state;
    const at::Tensor weight = unit.weight();
    state.layout = make_layout(structure, weight.size(0), weight.size(1), unit.name);
    BudgetUnit budget_unit;
    budget_unit.name = unit.name;
    budget_unit.out = state.layout.rows * state.layout.atom_rows;
    budget_unit.in = state.layout.cols * state.layout.atom_cols;
    budget_unit.granule = state.layout.granule();
    budget_unit.floor = state.layout.smallest_budget();
    if (state.layout.group_keep > 0) budget_unit.ceiling = budget_unit.floor;
    budget_units.push_back(budget_unit);
    keys.push_back(unit.key);
    states_.push_back(std::move(state));
  }
  const Allocation allocation = allocate(config_.budget, budget_units);
  budget_rest_ = allocation.rest;
  const std::vector<UnitKey>& all = config_.all_units.empty() ? keys : config_.all_units;
  const std::vector<int64_t> offsets = update_offsets(config_.schedule, all);
  for (size_t u = 0; u < units_.size(); ++u) {
    const auto place = std::find(all.begin(), all.end(), keys[u]);
    if (place == all.end()) fail("all_units", to_string(keys[u]), "is missing; list all units");
    states_[u].offset = offsets[static_cast<size_t>(place - all.begin())];
    if (units_[u].link != nullptr && units_[u].link->accumulate) {
      fail("units", units_[u].name, "belongs to another Sparsifier");
    }
  }
  // Nothing is refused from here on: links point to this.
  for (size_t u = 0; u < units_.size(); ++u) {
    set_mask(u, random_mask(states_[u].layout, allocation.nnz[u],
                            draw_key(config_.seed, 0, keys[u], UnitDraw::kFirstMask)));
    if (units_[u].link == nullptr) continue;
    units_[u].link->accumulate = [this, u](const at::Tensor& x, const at::Tensor& delta) {
      states_[u].num_rows += x.size(0);
      const bool is_wanted = is_started_ && current_.actions[u] != UnitAction::kNone;
      if (is_wanted && needs_gradient()) add_gradient(u, delta.t().mm(x));
    };
  }
}

Sparsifier::~Sparsifier() {
  for (const SparseUnit& unit : units_) {
    if (unit.link != nullptr) *unit.link = {};
  }
}

void Sparsifier::attach(torch::optim::Optimizer& optimizer) {
  require_known(optimizer);
  const bool is_used = std::any_of(units_.begin(), units_.end(), [&](const SparseUnit& unit) {
    return holds(optimizer, unit.parameter);
  });
  if (!is_used && !units_.empty()) fail("optimizer", "given", "holds no parameter of a unit");
  CompressedStates* const compressed = compressed_states(optimizer);
  const bool keeps_age = config_.state.second_moment == GrownSecondMoment::kAge;
  if (compressed == nullptr && keeps_age) {
    fail("second_moment", "age", "needs states of an optimizer of moe/sparse_optimizer.h");
  }
  for (size_t u = 0; compressed != nullptr && u < units_.size(); ++u) {
    const SparseUnit& unit = units_[u];
    if (!holds(optimizer, unit.parameter)) continue;
    compressed->compress(unit.parameter, unit.slot,
                         position_bits(states_[u].layout, states_[u].mask), keeps_age);
  }
  optimizers_.push_back(&optimizer);
}

bool Sparsifier::needs_gradient() const { return config_.rule.grow == GrowCriterion::kGrad; }

StepPlan Sparsifier::plan(int64_t step) const {
  StepPlan result;
  result.step = step;
  for (const Unit& unit : states_) {
    UnitAction action = UnitAction::kNone;
    if (is_update_step(config_.schedule, step, unit.offset)) {
      action = UnitAction::kUpdate;
    } else if (needs_gradient()) {
      for (int64_t ahead = 1; ahead < config_.grad_accum; ++ahead) {
        if (!is_update_step(config_.schedule, step + ahead, unit.offset)) continue;
        action = UnitAction::kAccumulate;
        break;
      }
    }
    result.actions.push_back(action);
  }
  return result;
}

StepPlan Sparsifier::begin_step(int64_t step) {
  require(step >= 0, kSparsifier, "step", step, "is negative");
  current_ = plan(step);
  is_started_ = true;
  // A sum that its update did not take, because a step was left out, is of no use.
  for (size_t u = 0; u < units_.size(); ++u) {
    if (current_.actions[u] == UnitAction::kNone) states_[u].grad_sum = at::Tensor();
  }
  return current_;
}

void Sparsifier::require_step(const char* call, int64_t step) const {
  if (!is_started_) fail("step", to_text(step), std::string("of ") + call + " was not begun");
  require(step == current_.step, kSparsifier, "step", step,
          std::string("of ") + call + " differs from step=" + to_text(current_.step) +
              " of begin_step");
}

void Sparsifier::count_rows(const UnitKey& key, int64_t num_rows) {
  require(num_rows >= 0, kSparsifier, "num_rows", num_rows, "is negative");
  find(key).num_rows += num_rows;
}

void Sparsifier::add_gradient(size_t u, const at::Tensor& gradient) {
  const c10::NoGradGuard no_grad;
  const at::ScalarType type = gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor& sum = states_[u].grad_sum;
  if (!sum.defined()) sum = at::zeros(gradient.sizes(), gradient.options().dtype(type));
  sum.add_(gradient);
}

UpdateReport Sparsifier::end_backward(int64_t step) {
  require_step("end_backward", step);
  const c10::NoGradGuard no_grad;
  for (size_t u = 0; u < units_.size(); ++u) {
    const SparseUnit& unit = units_[u];
    const bool is_wanted = current_.actions[u] != UnitAction::kNone && needs_gradient();
    if (is_wanted && unit.link == nullptr && unit.parameter.grad().defined()) {
      add_gradient(u, slot_of(unit.parameter.grad(), unit.slot));
    }
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
    } else {
      keep_active(states_[u].layout, states_[u].mask, states_[u].inactive,
                  slot_of(gradient, units_[u].slot));
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
  if (optimizers_.empty()) {
    for (size_t u = 0; u < units_.size(); ++u) {
      keep_active(states_[u].layout, states_[u].mask, states_[u].inactive, units_[u].weight());
    }
  }
  is_started_ = false;
  return report;
}

UpdateReport Sparsifier::update(int64_t step) {
  // All are proposed before any is made: an error leaves everything as it was.
  std::vector<Proposal> proposals;
  for (size_t u = 0; u < units_.size(); ++u) {
    if (current_.actions[u] == UnitAction::kUpdate) proposals.push_back(propose(u, step));
  }
  UpdateReport report;
  report.step = step;
  for (const Proposal& proposal : proposals) {
    Unit& state = states_[proposal.unit];
    report.units.push_back(proposal.report);
    if (proposal.report.skipped != SkipReason::kNotSkipped) {
      state.grad_sum = at::Tensor();
      ++state.num_skipped;
      continue;
    }
    apply(proposal.unit, step, proposal.change);
    state.grad_sum = at::Tensor();
    state.num_rows = 0;
    ++state.num_updates;
  }
  return report;
}

Sparsifier::Proposal Sparsifier::propose(size_t u, int64_t step) {
  const SparseUnit& unit = units_[u];
  const Unit& state = states_[u];
  Proposal result;
  result.unit = u;
  result.report.key = unit.key;
  const at::Tensor& gradient = state.grad_sum;
  const bool counts_rows = unit.link != nullptr || unit.counts_rows;
  if (counts_rows && state.num_rows < config_.min_rows) {
    result.report.skipped = SkipReason::kFewRows;
  } else if (needs_gradient() && !gradient.defined()) {
    result.report.skipped = SkipReason::kNoGradient;
  }
  if (result.report.skipped != SkipReason::kNotSkipped) return result;

  const at::Tensor weight = unit.weight();
  const at::Tensor drop_scores = config_.rule.drop == DropCriterion::kSetSigned
                                     ? weight.to(at::kCPU, at::kFloat).contiguous()
                                     : atom_scores(state.layout, weight);
  const at::Tensor grow_scores =
      needs_gradient() ? atom_scores(state.layout, gradient) : at::Tensor();
  UpdateInput input;
  input.active = &state.mask;
  input.ever_active = &state.ever_active;
  input.drop_scores = drop_scores.const_data_ptr<float>();
  if (grow_scores.defined()) input.grow_scores = grow_scores.const_data_ptr<float>();
  input.fraction = drop_fraction(config_.schedule, step);
  input.drop_key = draw_key(config_.seed, step, unit.key, UnitDraw::kDrop);
  input.grow_key = draw_key(config_.seed, step, unit.key, UnitDraw::kGrow);
  input.random_key = draw_key(config_.seed, step, unit.key, UnitDraw::kRandomGrow);
  result.change = update_mask(state.layout, config_.rule, input);
  if (result.change.num_non_finite > 0) {
    ErrorDetail detail{kSparsifier, "scores of " + unit.name, to_text(result.change.num_non_finite),
                       "are NaN or infinite; the training has diverged"};
    detail.layer = static_cast<int>(unit.key.layer);
    detail.step = step;
    throw Diverged(detail);
  }
  if (result.change.has_no_gradient) result.report.skipped = SkipReason::kNoGradient;
  result.report.num_dropped = result.change.num_dropped;
  result.report.num_grown = result.change.num_grown;
  return result;
}

void Sparsifier::apply(size_t u, int64_t step, const MaskUpdate& change) {
  const SparseUnit& unit = units_[u];
  const Unit& state = states_[u];
  if (change.num_dropped == 0 && change.num_grown == 0) return;
  const at::Tensor weight = unit.weight();
  const at::Device device = weight.device();
  const at::Tensor grown = position_mask(state.layout, change.grown).to(device);
  const at::Tensor dropped = position_mask(state.layout, change.dropped).to(device);
  const at::Tensor untouched = state.inactive.logical_or(dropped).logical_not_();
  const at::Tensor changed = grown.logical_or(dropped);

  weight.masked_fill_(changed, 0);
  if (config_.state.weight == GrownWeight::kNormal) {
    const at::Tensor start = normal_numbers(state.layout, weight.scalar_type() == at::kDouble,
                                            draw_key(config_.seed, step, unit.key, UnitDraw::kFill))
                                 .mul_(config_.state.weight_std)
                                 .to(weight.options());
    weight.copy_(at::where(grown, start, weight));
  }
  const GrownSecondMoment policy = config_.state.second_moment;
  at::Tensor gradient;
  if (policy == GrownSecondMoment::kGradient) {
    gradient = state.grad_sum / static_cast<double>(config_.grad_accum);
  }
  for (torch::optim::Optimizer* const optimizer : optimizers_) {
    if (CompressedStates* const compressed = compressed_states(*optimizer);
        compressed != nullptr && compressed->is_compressed(unit.parameter)) {
      compressed->change_mask(unit.parameter, unit.slot, position_bits(state.layout, change.mask),
                              policy, gradient);
      continue;
    }
    const OptimizerStates states = states_of(*optimizer, unit.parameter);
    for (const at::Tensor& momentum : states.momentum) {
      slot_of(momentum, unit.slot).masked_fill_(changed, 0);
    }
    for (const at::Tensor& moments : states.second_moment) {
      const at::Tensor moment = slot_of(moments, unit.slot);
      moment.masked_fill_(changed, 0);
      if (policy == GrownSecondMoment::kMean) {
        moment.masked_fill_(grown, mean_where(moment, untouched));
      } else if (policy == GrownSecondMoment::kGradient) {
        moment.copy_(at::where(grown, gradient.square().to(moment.scalar_type()), moment));
      }
    }
  }
  set_mask(u, change.mask);
}

void Sparsifier::set_mask(size_t u, PackedMask mask) {
  const c10::NoGradGuard no_grad;
  Unit& state = states_[u];
  state.mask = std::move(mask);
  state.ever_active =
      state.ever_active.num_places() == 0 ? state.mask : (state.ever_active | state.mask);
  const at::Tensor weight = units_[u].weight();
  state.inactive = position_mask(state.layout, state.mask).logical_not_().to(weight.device());
  keep_active(state.layout, state.mask, state.inactive, weight);
  if (units_[u].link == nullptr) return;
  UnitLink& link = *units_[u].link;
  link.inactive = state.inactive;
  link.active = position_bits(state.layout, state.mask);
  link.density =
      static_cast<double>(link.active.count()) / static_cast<double>(link.active.num_places());
}

Sparsifier::Unit& Sparsifier::find(const UnitKey& key) {
  return const_cast<Unit&>(std::as_const(*this).find(key));
}
const Sparsifier::Unit& Sparsifier::find(const UnitKey& key) const {
  const auto place = std::lower_bound(
      units_.begin(), units_.end(), key,
      [](const SparseUnit& unit, const UnitKey& wanted) { return unit.key < wanted; });
  if (place == units_.end() || place->key != key) {
    fail("unit", to_string(key), "is not of this Sparsifier");
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
  stats.fingerprint = unit.mask.fingerprint();
  return stats;
}

int64_t Sparsifier::nnz() const {
  int64_t sum = 0;
  for (const Unit& unit : states_) sum += count_positions(unit.layout, unit.mask);
  return sum;
}

void Sparsifier::reset_weights(double gain) {
  require(std::isfinite(gain) && gain >= 0, kSparsifier, "gain", gain,
          "is not a finite number of 0 or more");
  const c10::NoGradGuard no_grad;
  for (size_t u = 0; u < units_.size(); ++u) {
    const at::Tensor weight = units_[u].weight();
    const bool is_double = weight.scalar_type() == at::kDouble;
    const at::Tensor numbers = normal_numbers(
        states_[u].layout, is_double, draw_key(config_.seed, 0, units_[u].key, UnitDraw::kWeights));
    const at::Tensor is_active = position_mask(states_[u].layout, states_[u].mask);
    const at::Tensor fan_in = is_active.sum(1, /*keepdim=*/true).to(numbers.scalar_type());
    // A row without active entries divides by 0, and the mask takes the result away.
    const at::Tensor scaled = numbers.mul_(gain).div_(fan_in.sqrt_());
    weight.copy_(scaled.masked_fill_(is_active.logical_not(), 0));
  }
}

uint64_t Sparsifier::config_hash() const {
  std::ostringstream text;
  text.precision(17);
  text << config_;
  uint64_t hash = 0;
  for (const char c : text.str()) {
    hash = kernels::splitmix64(hash ^ static_cast<unsigned char>(c));
  }
  return hash;
}

SparsifierState Sparsifier::state_dict() const {
  SparsifierState result;
  result.config_hash = config_hash();
  for (size_t u = 0; u < units_.size(); ++u) {
    const Unit& unit = states_[u];
    result.units.push_back({units_[u].key, unit.mask, unit.ever_active, unit.num_rows,
                            unit.num_updates, unit.num_skipped,
                            unit.grad_sum.defined() ? unit.grad_sum.clone() : at::Tensor()});
  }
  return result;
}

void Sparsifier::load(const SparsifierState& state) {
  require(state.version == SparsifierState::kVersion, kSparsifier, "version", state.version,
          "is not " + to_text(SparsifierState::kVersion) + ", which this build reads");
  require(state.config_hash == config_hash(), kSparsifier, "config_hash", state.config_hash,
          "differs from " + to_text(config_hash()) +
              " of this configuration; resume with the one it was saved with");
  std::vector<const UnitState*> found(units_.size(), nullptr);
  for (size_t u = 0; u < units_.size(); ++u) {
    for (const UnitState& saved : state.units) {
      if (saved.key == units_[u].key) found[u] = &saved;
    }
    const std::string& name = units_[u].name;
    if (found[u] == nullptr) {
      fail("state", name, "has no mask in it (" + to_string(units_[u].key) + ")");
    }
    const Unit& mine = states_[u];
    for (const PackedMask* mask : {&found[u]->mask, &found[u]->ever_active}) {
      if (mask->rows() != mine.layout.rows || mask->cols() != mine.layout.cols) {
        fail("mask of " + name, to_text(mask->rows()) + "x" + to_text(mask->cols()),
             "is not of " + to_text(mine.layout.rows) + "x" + to_text(mine.layout.cols) + " atoms");
      }
    }
    std::vector<int64_t> saved_counts(static_cast<size_t>(mine.layout.cells.num_cells));
    std::vector<int64_t> counts = saved_counts;
    kernels::count_atoms(mine.layout.cells, found[u]->mask.data(), saved_counts.data());
    kernels::count_atoms(mine.layout.cells, mine.mask.data(), counts.data());
    if (saved_counts != counts) {
      fail("mask of " + name, to_text(found[u]->mask.count()),
           "active atoms do not keep its budget of " + to_text(mine.mask.count()) +
               " in equal cells");
    }
  }
  for (size_t u = 0; u < units_.size(); ++u) {
    Unit& mine = states_[u];
    mine.ever_active = found[u]->ever_active;
    set_mask(u, found[u]->mask);
    for (torch::optim::Optimizer* const optimizer : optimizers_) {
      CompressedStates* const compressed = compressed_states(*optimizer);
      if (compressed == nullptr || !compressed->is_compressed(units_[u].parameter)) continue;
      compressed->change_mask(units_[u].parameter, units_[u].slot,
                              position_bits(mine.layout, mine.mask), GrownSecondMoment::kMean);
    }
    mine.num_rows = found[u]->num_rows;
    mine.num_updates = found[u]->num_updates;
    mine.num_skipped = found[u]->num_skipped;
    mine.grad_sum = found[u]->grad_sum.defined() ? found[u]->grad_sum.clone() : at::Tensor();
  }
  is_started_ = false;
}

}  // namespace perseid
