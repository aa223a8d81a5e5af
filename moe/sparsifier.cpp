#include "moe/sparsifier.h"

#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

#include "moe/optimizer_states.h"
#include "moe/sparsifier_unit.h"

namespace perseid {
namespace {

void check_unit(const SparseUnit& unit) {
  if (!unit.parameter.defined())
    fail_sparsifier("parameter of " + unit.name, "undefined", "is missing");
  const int64_t wanted = unit.slot < 0 ? 2 : 3;
  if (unit.parameter.dim() != wanted) {
    fail_sparsifier("parameter of " + unit.name, to_text(unit.parameter.sizes()),
                    unit.slot < 0 ? "is not [out, in]" : "is not [experts, out, in]");
  }
  if (unit.slot >= 0 && unit.slot >= unit.parameter.size(0)) {
    fail_sparsifier("slot of " + unit.name, to_text(unit.slot),
                    "is outside its parameter of " + to_text(unit.parameter.size(0)) + " experts");
  }
  if (!at::isFloatingType(unit.parameter.scalar_type())) {
    fail_sparsifier("parameter of " + unit.name, to_text(unit.parameter.scalar_type()),
                    "is not a floating-point type");
  }
}

}  // namespace

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
      fail_sparsifier("units", unit.name,
                      "has the key of " + units_[u - 1].name + " (" + to_string(unit.key) + ")");
    }
    for (size_t other = 0; other < u; ++other) {
      if (units_[other].parameter.is_same(unit.parameter) && units_[other].slot == unit.slot) {
        fail_sparsifier("units", unit.name, "is the same weight as " + units_[other].name);
      }
    }
    if (config_.order == UpdateOrder::kInsteadOfStep && config_.schedule.stagger &&
        unit.slot >= 0) {
      fail_sparsifier("order", "instead_of_step",
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
    if (place == all.end())
      fail_sparsifier("all_units", to_string(keys[u]), "is missing; list all units");
    states_[u].offset = offsets[static_cast<size_t>(place - all.begin())];
    if (units_[u].link != nullptr && units_[u].link->accumulate) {
      fail_sparsifier("units", units_[u].name, "belongs to another Sparsifier");
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
  if (!is_used && !units_.empty())
    fail_sparsifier("optimizer", "given", "holds no parameter of a unit");
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
  if (!is_started_)
    fail_sparsifier("step", to_text(step), std::string("of ") + call + " was not begun");
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
      slot_of(gradient, units_[u].slot).masked_fill_(states_[u].inactive, 0);
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
      units_[u].weight().masked_fill_(states_[u].inactive, 0);
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
  stats.fingerprint = unit.mask.fingerprint();
  return stats;
}

int64_t Sparsifier::nnz() const {
  int64_t sum = 0;
  for (const Unit& unit : states_) sum += count_positions(unit.layout, unit.mask);
  return sum;
}

}  // namespace perseid
