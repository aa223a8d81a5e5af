#include <ATen/ops/empty.h>
#include <ATen/ops/masked_select.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "comm/agree.h"
#include "moe/optimizer_states.h"
#include "moe/sparse_criteria.h"
#include "moe/sparse_optimizer.h"
#include "moe/sparsifier_unit.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

/// [out, in] standard normal numbers of a key, on the host.
at::Tensor normal_numbers(const AtomLayout& layout, bool is_double, kernels::RandomKey key) {
  const at::Tensor result =
      at::empty({layout.out, layout.in}, is_double ? at::kDouble : at::kFloat);
  kernels::fill_normal(result.mutable_data_ptr(), result.numel(),
                       is_double ? kernels::DType::kFloat64 : kernels::DType::kFloat32, key);
  return result;
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

/// Scores of atoms whose sign does not count: of single positions the values themselves, which are
/// read where they lie if they can be.
at::Tensor signed_scores(const AtomLayout& layout, const at::Tensor& values) {
  if (!layout.is_elementwise()) return atom_scores(layout, values);
  return values.to(at::kCPU, at::kFloat).contiguous();
}

}  // namespace

UpdateReport Sparsifier::update(int64_t step) {
  UpdateReport report;
  report.step = step;
  if (due_.empty()) return report;  // of all ranks
  const comm::CallSite site{.operation = kSparsifier, .step = step};
  if (config_.schedule.clock == Clock::kStep) sum_rows(site);
  choose_targets(step, site);
  // All are proposed and compared before any is made: an error leaves everything as it was.
  std::vector<Proposal> proposals;
  if (config_.budget.distribution == Distribution::kGlobal) {
    proposals = propose_global(step, site);
  } else {
    comm::agree(groups_.world, site, [&] {
      if (config_.structure.cell == Cell::kNeuron) {
        proposals = propose_neurons(step);
        return;
      }
      for (size_t u = 0; u < units_.size(); ++u) {
        if (current_.actions[u] != UnitAction::kUpdate) continue;
        proposals.push_back(propose(u, step, proposals));
      }
    });
  }
  std::vector<size_t> units;
  std::vector<uint64_t> fingerprints;
  for (const Proposal& proposal : proposals) {
    const bool is_skipped = proposal.report.skipped != SkipReason::kNotSkipped;
    units.push_back(proposal.unit);
    // With the one before: a fixed budget would mend a bit that flipped, but others see its weight.
    const uint64_t before = kernels::splitmix64(states_[proposal.unit].mask.fingerprint());
    const uint64_t after = proposal.change.mask.fingerprint();
    fingerprints.push_back(kernels::splitmix64(before ^ after ^ (is_skipped ? 1 : 0)));
  }
  require_same_fingerprints(units, fingerprints, "mask", site);

  for (const size_t i : due_) {
    Known& unit = known_[i];
    if (has_token_clock(unit)) {
      unit.window = update_window(config_.schedule, unit.time, unit.offset);
    }
  }
  for (size_t i = 0; i < loads_now_.size(); ++i) {
    known_[i].load = loads_now_[i];
    known_[i].load_rows = known_[i].total_rows;
  }
  for (const Proposal& proposal : proposals) {
    Unit& state = states_[proposal.unit];
    report.units.push_back(proposal.report);
    const int64_t num_active = state.mask.count();
    state.layout = proposal.layout;
    state.frame = proposal.frame;
    state.nnz = proposal.nnz;
    apply(proposal.unit, step, proposal.change);
    if (proposal.report.skipped != SkipReason::kNotSkipped) {
      forget_sources(state);
      ++state.num_skipped;
      continue;
    }
    forget_sources(state);
    state.num_rows = 0;
    ++state.num_updates;
    if (num_active > 0) {
      state.churn_sum +=
          static_cast<double>(proposal.report.num_dropped) / static_cast<double>(num_active);
    }
  }
  return report;
}

at::Tensor Sparsifier::drop_scores_of(size_t u) const {
  const Unit& state = states_[u];
  const at::Tensor weight = units_[u].weight();
  if (!drops_by_gradient(config_.rule.drop)) return signed_scores(state.layout, weight);
  const at::Tensor gradient = state.active_sum.defined()
                                  ? state.active_sum / static_cast<double>(config_.grad_accum)
                                  : state.active_sum;
  return drop_scores(state.layout, config_.rule, state.mask, weight, gradient);
}

/// Undefined where none are needed.
at::Tensor Sparsifier::grow_scores_of(size_t u) const {
  const Unit& state = states_[u];
  switch (config_.rule.grow) {
    case GrowCriterion::kRandom:
    case GrowCriterion::kUnfired:
    case GrowCriterion::kNone:
      return {};
    case GrowCriterion::kSampledGrad:
      return listed_scores(state.layout, state.candidates, state.grad_sum);
    case GrowCriterion::kGreedyProgress:
      return progress_scores(state.layout, state.grad_sum, state.energy_sum);
    case GrowCriterion::kGrad:
    case GrowCriterion::kMomentum:
      break;
  }
  return signed_scores(state.layout, state.grad_sum);
}

SkipReason Sparsifier::skip_reason(size_t u) const {
  const Unit& state = states_[u];
  if (known_[state.place].counts_rows && state.num_rows < config_.min_rows) {
    return SkipReason::kFewRows;
  }
  const bool has_gradient = !grows_by_score(config_.rule.grow) || state.grad_sum.defined();
  return has_gradient ? SkipReason::kNotSkipped : SkipReason::kNoGradient;
}

/// Scores and keys of a unit that is not skipped.
Sparsifier::Scores Sparsifier::scores_of(size_t u, int64_t step) const {
  const UnitKey& key = units_[u].key;
  const Unit& state = states_[u];
  const Known& known = known_[state.place];
  Scores scores;
  scores.drop = drop_scores_of(u);
  scores.grow = grow_scores_of(u);
  UpdateInput& input = scores.input;
  input.active = &state.mask;
  input.ever_active = &state.ever_active;
  input.drop_scores = scores.drop.const_data_ptr<float>();
  if (scores.grow.defined()) input.grow_scores = scores.grow.const_data_ptr<float>();
  if (config_.rule.grow == GrowCriterion::kSampledGrad) input.candidates = &state.candidates;
  if (!is_freeing_step(known, step)) input.fraction = drop_fraction(config_.schedule, known.time);
  input.drop_key = draw_key(config_.seed, step, key, UnitDraw::kDrop);
  input.grow_key = draw_key(config_.seed, step, key, UnitDraw::kGrow);
  input.random_key = draw_key(config_.seed, step, key, UnitDraw::kRandomGrow);
  return scores;
}

void Sparsifier::fail_diverged(size_t u, int64_t num_non_finite, int64_t step) const {
  const SparseUnit& unit = units_[u];
  ErrorDetail detail{kSparsifier, "scores of " + unit.name, to_text(num_non_finite),
                     "are NaN or infinite; the training has diverged"};
  detail.layer = static_cast<int>(unit.key.layer);
  detail.step = step;
  throw Diverged(detail);
}

/// What is skipped takes part in a change of its budget all the same.
MaskUpdate Sparsifier::skipped_change(size_t u, const Goal& goal, int64_t step) const {
  const Unit& state = states_[u];
  if (goal.frame == state.frame && goal.base == state.nnz) {
    const PackedMask none(state.mask.rows(), state.mask.cols());
    return {state.mask, none, none};
  }
  const at::Tensor magnitudes = atom_scores(goal.layout, units_[u].weight());
  UpdateInput input;
  input.active = &state.mask;
  input.drop_scores = magnitudes.const_data_ptr<float>();
  input.target = goal.base / goal.layout.atom_size();
  input.drop_key = draw_key(config_.seed, step, units_[u].key, UnitDraw::kDrop);
  input.random_key = draw_key(config_.seed, step, units_[u].key, UnitDraw::kRandomGrow);
  UpdateRule rule;
  rule.grow = GrowCriterion::kNone;
  return update_mask(goal.layout, rule, input);
}

/// @param earlier  of units before it in the same step
Sparsifier::Proposal Sparsifier::propose(size_t u, int64_t step,
                                         const std::vector<Proposal>& earlier) {
  const Goal goal = goal_of(u, step);
  const Unit& state = states_[u];
  Proposal result;
  result.unit = u;
  result.layout = goal.layout;
  result.frame = goal.frame;
  result.nnz = goal.nnz;
  result.report.key = units_[u].key;
  result.report.skipped = skip_reason(u);
  if (result.report.skipped == SkipReason::kNotSkipped) {
    Scores scores = scores_of(u, step);
    UpdateInput& input = scores.input;
    RowsLeft rows;
    if (has_ablation(u)) {
      const at::Tensor drop_sizes = scores.drop.abs(), grow_sizes = scores.grow.abs();
      rows = ablate_rows(config_.ablation, {&state.mask, drop_sizes.const_data_ptr<float>(),
                                            grow_sizes.const_data_ptr<float>(), input.fraction,
                                            input.drop_key, input.grow_key});
      input.cell_targets = &rows.counts;
    } else {
      input.target = goal.nnz / goal.layout.atom_size();
      input.num_grow = goal.num_grow;
    }
    const PackedMask barred = barred_columns(u, step, earlier);
    if (barred.num_places() > 0) input.barred = &barred;
    result.change = update_mask(goal.layout, config_.rule, input);
    result.change.num_non_finite = std::max(result.change.num_non_finite, rows.num_non_finite);
    if (result.change.has_no_gradient) result.report.skipped = SkipReason::kNoGradient;
  }
  if (result.report.skipped != SkipReason::kNotSkipped) {
    result.nnz = goal.base;
    result.change = skipped_change(u, goal, step);
  }
  if (result.change.num_non_finite > 0) fail_diverged(u, result.change.num_non_finite, step);
  result.report.num_dropped = result.change.num_dropped;
  result.report.num_grown = result.change.num_grown;
  return result;
}

void Sparsifier::apply(size_t u, int64_t step, const MaskUpdate& change) {
  const SparseUnit& unit = units_[u];
  const Unit& state = states_[u];
  if (change.num_dropped == 0 && change.num_grown == 0) return;
  const at::Tensor weight = unit.weight();
  const auto flags_of = [&](const PackedMask& atoms) {
    return position_mask(state.layout, atoms).to(weight.device());
  };
  at::Tensor grown;  // flags are made where they are needed: bits are enough for most
  zero_at(position_bits(state.layout, change.grown | change.dropped), weight);
  if (config_.state.weight == GrownWeight::kNormal) {
    grown = flags_of(change.grown);
    const at::Tensor start = normal_numbers(state.layout, weight.scalar_type() == at::kDouble,
                                            draw_key(config_.seed, step, unit.key, UnitDraw::kFill))
                                 .mul_(config_.state.weight_std)
                                 .to(weight.options());
    weight.copy_(at::where(grown, start, weight));
  }
  if (config_.structure.cell == Cell::kNeuron && state.row_layer >= 0) {
    start_grown_rows(u, step, change.mask);
  }
  const GrownSecondMoment policy = config_.state.second_moment;
  at::Tensor gradient;
  if (policy == GrownSecondMoment::kGradient) {
    // None under a ramp where the update was skipped: what comes then counts as without gradient.
    gradient = state.grad_sum.defined() ? state.grad_sum / static_cast<double>(config_.grad_accum)
                                        : at::zeros_like(weight);
  }
  change_compressed(u, change.mask, policy, gradient);
  for (torch::optim::Optimizer* const optimizer : optimizers_) {
    const CompressedStates* const compressed = compressed_states(*optimizer);
    if (compressed != nullptr && compressed->is_compressed(unit.parameter)) continue;
    const OptimizerStates states = states_of(*optimizer, unit.parameter);
    const PackedMask changed = position_bits(state.layout, change.grown | change.dropped);
    for (const at::Tensor& momentum : states.momentum) zero_at(changed, unit.part_of(momentum));
    if (states.second_moment.empty()) continue;
    if (!grown.defined()) grown = flags_of(change.grown);
    const at::Tensor untouched = flags_of(without(state.mask, change.dropped));
    for (const at::Tensor& moments : states.second_moment) {
      const at::Tensor moment = unit.part_of(moments);
      zero_at(changed, moment);
      if (policy == GrownSecondMoment::kMean) {
        moment.masked_fill_(grown, mean_where(moment, untouched));
      } else if (policy == GrownSecondMoment::kGradient) {
        moment.copy_(at::where(grown, gradient.square().to(moment.scalar_type()), moment));
      }
    }
  }
  set_mask(u, change.mask);
}

/// Values of inactive positions of the unit become 0.
void Sparsifier::keep_active(size_t u, const at::Tensor& values) const {
  const Unit& state = states_[u];
  zero_inactive(state.positions(), state.inactive, values);
}

/// Active positions of the whole matrix that the unit is a part of, with `mask` for the unit itself
/// and all of what belongs to no unit.
PackedMask Sparsifier::slot_positions(size_t u, const PackedMask& mask) const {
  const SparseUnit& unit = units_[u];
  if (unit.num_out < 0) return position_bits(states_[u].layout, mask);
  PackedMask whole = PackedMask::full(unit.parameter.size(-2), unit.parameter.size(-1));
  for (size_t other = 0; other < units_.size(); ++other) {
    const SparseUnit& part = units_[other];
    if (!part.parameter.is_same(unit.parameter) || part.slot != unit.slot) continue;
    whole.set_rows(part.first_out,
                   position_bits(states_[other].layout, other == u ? mask : states_[other].mask));
  }
  return whole;
}

/// States that some optimizer keeps for active entries only, for a new mask of the unit.
/// @param gradient  [as the unit] read under kGradient
void Sparsifier::change_compressed(size_t u, const PackedMask& mask, GrownSecondMoment policy,
                                   const at::Tensor& gradient) {
  const SparseUnit& unit = units_[u];
  for (torch::optim::Optimizer* const optimizer : optimizers_) {
    CompressedStates* const compressed = compressed_states(*optimizer);
    if (compressed == nullptr || !compressed->is_compressed(unit.parameter)) continue;
    StateChange change;
    change.positions = slot_positions(u, mask);
    change.policy = policy;
    change.first_row = unit.num_out < 0 ? 0 : unit.first_out;
    change.num_rows = unit.num_out;
    change.gradient = gradient;
    compressed->change_mask(unit.parameter, unit.slot, std::move(change));
  }
}

void Sparsifier::set_mask(size_t u, PackedMask mask) {
  const c10::NoGradGuard no_grad;
  Unit& state = states_[u];
  state.mask = std::move(mask);
  state.ever_active =
      state.ever_active.num_places() == 0 ? state.mask : (state.ever_active | state.mask);
  const at::Tensor weight = units_[u].weight();
  if (!state.layout.is_elementwise()) state.blocks = position_bits(state.layout, state.mask);
  if (!weight.is_cpu()) {
    state.inactive = position_mask(state.layout, state.mask).logical_not_().to(weight.device());
  }
  keep_active(u, weight);
  if (config_.structure.cell == Cell::kNeuron && state.column_layer >= 0) {
    hidden_[static_cast<size_t>(state.column_layer)].active = active_columns(state.mask);
  }
  set_link(u);
}

/// What the layer computes with: the mask, and rows of candidates.
void Sparsifier::set_link(size_t u) {
  if (units_[u].link == nullptr) return;
  const Unit& state = states_[u];
  UnitLink& link = *units_[u].link;
  link.inactive = state.inactive;
  link.active = state.positions();
  link.density =
      static_cast<double>(link.active.count()) / static_cast<double>(link.active.num_places());
  if (state.row_layer < 0) return;
  const std::vector<int64_t>& candidates = hidden_[static_cast<size_t>(state.row_layer)].candidates;
  if (candidates.empty()) return;
  // The density stays: it chooses the kernel, and with it the rounding of sums.
  const PackedMask columns = active_columns(state.mask);
  for (const int64_t row : candidates) link.active.set_rows(row, columns);
  if (!state.inactive.defined()) return;
  link.inactive =
      position_mask(state.layout, link.active).logical_not_().to(state.inactive.device());
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
    // Under a soft method all weights are drawn, then the masks are chosen among them.
    const at::Tensor is_active =
        position_mask(states_[u].layout, config_.forward.is_soft()
                                             ? PackedMask::full(weight.size(0), weight.size(1))
                                             : states_[u].mask);
    const at::Tensor fan_in = is_active.sum(1, /*keepdim=*/true).to(numbers.scalar_type());
    // A row without active entries divides by 0, and the mask takes the result away.
    const at::Tensor scaled = numbers.mul_(gain).div_(fan_in.sqrt_());
    weight.copy_(scaled.masked_fill_(is_active.logical_not(), 0));
  }
  if (config_.forward.is_soft()) choose_first_masks();
}

}  // namespace perseid
