#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include "moe/sparse_criteria.h"
#include "moe/sparsifier_unit.h"

// What updates look at beyond the weights: gradients of all entries, of candidates or of active
// entries, and energies of inputs, of the steps before an update.

namespace perseid {

bool Sparsifier::needs_gradient() const {
  return grows_by_score(config_.rule.grow) || drops_by_gradient(config_.rule.drop);
}

/// The update that gradients of this step count for; -1: none.
int64_t Sparsifier::next_update(const Known& unit, int64_t step) const {
  if (!needs_gradient()) return -1;
  for (int64_t ahead = 0; ahead < config_.grad_accum; ++ahead) {
    if (is_due(unit, step + ahead)) return step + ahead;
  }
  return -1;
}

void Sparsifier::forget_sources(Unit& unit) const {
  if (config_.rule.grow != GrowCriterion::kMomentum) unit.grad_sum = at::Tensor();
  unit.active_sum = at::Tensor();
  unit.energy_sum = at::Tensor();
}

void Sparsifier::begin_sources(int64_t step) {
  for (size_t u = 0; u < units_.size(); ++u) {
    Unit& state = states_[u];
    const Known& known = known_[state.place];
    state.link_gradient = at::Tensor();
    state.link_energy = at::Tensor();
    state.update_step = next_update(known, step);
    // Sums that their update did not take, because a step was left out, are of no use.
    const int64_t last = last_step_ < 0 ? -1 : next_update(known, last_step_);
    if (state.update_step < 0 || state.update_step != last) forget_sources(state);
    if (current_.actions[u] == UnitAction::kNone) state.grad_sum = at::Tensor();
    if (config_.rule.grow != GrowCriterion::kSampledGrad || state.update_step < 0) continue;
    if (state.candidates_step != state.update_step) {
      const double time =
          has_token_clock(known) ? known.time : static_cast<double>(state.update_step);
      const kernels::RandomKey key =
          draw_key(config_.seed, state.update_step, known.key, UnitDraw::kCandidates);
      state.candidates = draw_candidates(state.layout, config_.rule, state.mask,
                                         drop_fraction(config_.schedule, time), key);
      state.sampled = position_bits(state.layout, state.candidates);
      state.candidates_step = state.update_step;
    }
    if (state.grad_sum.defined() && state.grad_sum.numel() != state.sampled.count()) {
      fail_sparsifier(
          "grad_sum of " + units_[u].name, to_text(state.grad_sum.numel()),
          "of the loaded state are not its " + to_text(state.sampled.count()) + " candidates");
    }
  }
}

/// What the backward of a layer hands over.
void Sparsifier::take_link(size_t u, const at::Tensor& x, const at::Tensor& delta) {
  const bool is_wanted = is_started_ && current_.actions[u] != UnitAction::kNone;
  if (!is_wanted || !grows_by_score(config_.rule.grow) || !wants_gradient(u)) return;
  const c10::NoGradGuard no_grad;
  Unit& mine = states_[u];
  if (config_.rule.grow == GrowCriterion::kSampledGrad) {
    add_sampled_gradient(mine.sampled, x, delta, mine.link_gradient);
    return;
  }
  const at::Tensor gradient = delta.t().mm(x);
  const at::ScalarType type = gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  mine.link_gradient =
      mine.link_gradient.defined() ? mine.link_gradient.add_(gradient) : gradient.to(type);
  if (config_.rule.grow != GrowCriterion::kGreedyProgress) return;
  const at::Tensor energy = x.to(type).square().sum(0, /*keepdim=*/true, at::kDouble);
  mine.link_energy = mine.link_energy.defined() ? mine.link_energy.add_(energy) : energy;
}

/// Adds to the sum of a window, or to the moving average.
/// @param gradient  of the step; undefined: 0
/// @param is_owned  nobody else changes it
void Sparsifier::add_gradient(size_t u, const at::Tensor& gradient, bool is_owned) {
  at::Tensor& sum = states_[u].grad_sum;
  const bool is_average = config_.rule.grow == GrowCriterion::kMomentum;
  const double decay = config_.rule.momentum_decay;
  if (!gradient.defined()) {
    if (is_average && sum.defined()) sum.mul_(decay);
    return;
  }
  const at::ScalarType type = gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (is_average) {
    if (!sum.defined()) sum = at::zeros(gradient.sizes(), gradient.options().dtype(type));
    sum.mul_(decay).add_(gradient, 1 - decay);
  } else if (sum.defined()) {
    sum.add_(gradient);
  } else {
    sum = gradient.to(type, /*non_blocking=*/false, /*copy=*/!is_owned);
  }
}

/// After the backward, before gradients are masked.
void Sparsifier::add_sources(const comm::CallSite& site) {
  if (grows_by_score(config_.rule.grow)) {
    add_link_gradients(Holders::kAllRanks, site);
    add_link_gradients(Holders::kReplicas, site);
  }
  for (size_t u = 0; u < units_.size(); ++u) {
    const SparseUnit& unit = units_[u];
    Unit& state = states_[u];
    if (current_.actions[u] == UnitAction::kNone || !wants_gradient(u)) continue;
    const at::Tensor& whole = unit.parameter.grad();
    const at::Tensor gradient = whole.defined() ? unit.part_of(whole) : whole;
    if (grows_by_score(config_.rule.grow) && unit.link == nullptr) {
      const bool is_sampled = config_.rule.grow == GrowCriterion::kSampledGrad;
      const bool is_listed = is_sampled && gradient.defined();
      add_gradient(u, is_listed ? listed_values(state.sampled, gradient) : gradient, is_listed);
    }
    const bool is_looked_at = drops_by_gradient(config_.rule.drop) && state.update_step >= 0;
    if (!is_looked_at || !gradient.defined()) continue;
    const at::Tensor active = listed_values(position_bits(state.layout, state.mask), gradient);
    state.active_sum = state.active_sum.defined() ? state.active_sum.add_(active) : active;
  }
}

}  // namespace perseid
