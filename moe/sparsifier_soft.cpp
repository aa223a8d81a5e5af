#include <c10/core/GradMode.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "comm/agree.h"
#include "moe/optimizer_states.h"
#include "moe/sparsifier_unit.h"

// Soft methods: dense parameters, masks chosen from them.

namespace perseid {

void Sparsifier::start_soft() {
  choose_first_masks();
  for (size_t u = 0; u < units_.size(); ++u) {
    const SparseUnit& unit = units_[u];
    if (unit.link != nullptr) {
      unit.link->accumulate = [](const at::Tensor&, const at::Tensor&) {};
      unit.link->effective = [this, u](const at::Tensor& weight) {
        return effective_weight(weight, states_[u].soft);
      };
    } else if (unit.row_counts != nullptr) {
      ++unit.row_counts->num_readers;
      states_[u].num_rows_seen = unit.row_counts->rows[unit.row_slot];
    }
    if (unit.link == nullptr && unit.effective_parts != nullptr) {
      unit.effective_parts->set(unit.slot, unit.first_out, unit.num_out,
                                [this, u](const at::Tensor& weight) {
                                  return effective_weight(weight, states_[u].soft);
                                });
    }
  }
}

void Sparsifier::set_soft_mask(size_t u, SoftMask mask) {
  Unit& state = states_[u];
  state.mask = mask.active;
  state.ever_active =
      state.ever_active.num_places() == 0 ? state.mask : (state.ever_active | state.mask);
  state.soft = std::move(mask);
}

void Sparsifier::choose_first_masks() {
  for (Unit& state : states_) state.soft.chosen_step = -1;
  choose_masks(0);
  // Others may change weights before the first step, which chooses anew.
  for (Unit& state : states_) state.soft.chosen_step = -1;
}

void Sparsifier::choose_masks(int64_t step) {
  const c10::NoGradGuard no_grad;
  // All are chosen before any is set: an error leaves everything as it was.
  std::vector<std::optional<SoftMask>> chosen(units_.size());
  comm::agree(groups_.world, {.operation = kSparsifier, .step = step}, [&] {
    for (size_t u = 0; u < units_.size(); ++u) {
      const Unit& state = states_[u];
      if (!is_choice_due(config_.forward, step, state.soft.chosen_step)) continue;
      chosen[u] = choose_soft_mask(config_.forward, state.layout, state.nnz, units_[u].weight(),
                                   step, units_[u].name, units_[u].key.layer);
    }
  });
  for (size_t u = 0; u < units_.size(); ++u) {
    if (chosen[u].has_value()) set_soft_mask(u, std::move(*chosen[u]));
    set_factors(config_.forward, step, states_[u].soft);
  }
}

void Sparsifier::finish_soft_gradient(size_t u) {
  const SparseUnit& unit = units_[u];
  const SoftMask& mask = states_[u].soft;
  add_gradient_term(config_.forward, mask, unit.weight(), unit.part_of(unit.parameter.grad()));
  if (!config_.forward.decoupled) return;
  const auto optimizer =
      std::find_if(optimizers_.begin(), optimizers_.end(),
                   [&](const auto* candidate) { return holds(*candidate, unit.parameter); });
  if (optimizer == optimizers_.end()) {
    fail_sparsifier("decoupled", "true",
                    "needs the learning rate of " + unit.name + "; call attach");
  }
  decay_inactive(config_.forward, mask, learning_rate_of(**optimizer, unit.parameter),
                 unit.weight());
}

at::Tensor Sparsifier::effective(const UnitKey& key) const {
  const Unit& state = find(key);
  const SparseUnit& unit = units_[static_cast<size_t>(&state - states_.data())];
  const at::Tensor weight = unit.part_of(unit.parameter);
  return config_.forward.is_soft() ? effective_weight(weight, state.soft) : weight;
}

}  // namespace perseid
