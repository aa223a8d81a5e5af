#include "examples/train_fashion/sparsity.h"

#include <cmath>

#include "moe/sparse_presets.h"

namespace perseid::examples {

bool keeps_n_of_m(SparseMethod method) { return method >= SparseMethod::kNmDst; }
bool moves_masks(SparseMethod method) {
  return method == SparseMethod::kSet || method == SparseMethod::kRigl ||
         method == SparseMethod::kNmDst;
}

namespace {

/// Decays that reach 0 at the half, or 1 % at the end; the last tenth of the steps is N:M.
SparsifierConfig mask_decay(const SparsityOptions& sparsity, int64_t num_steps) {
  const auto [n, m] = sparsity.n_of_m;
  const double steps = static_cast<double>(num_steps);
  SparsifierConfig config = sparsity.method == SparseMethod::kMdGfLin
                                ? presets::mdgf_lin(n, m, 2 / steps)
                                : presets::mdgf_exp(n, m, 4.6 / steps);
  config.forward.total_steps = num_steps;
  config.forward.fine_tune = 0.1;
  return config;
}

/// Exact: 1 - 0.9 in floating point is not 0.1.
Density density_of(const SparsityOptions& sparsity) {
  const Density zeros(sparsity.sparsity);
  return Density::ratio(zeros.denominator() - zeros.numerator(), zeros.denominator());
}

SparsifierConfig preset_of(const SparsityOptions& sparsity, int64_t num_steps) {
  const auto [n, m] = sparsity.n_of_m;
  switch (sparsity.method) {
    case SparseMethod::kNmDst:
      return presets::nm_dst(n, m, num_steps, sparsity.every);
    case SparseMethod::kSrSte:
      return presets::srste(n, m);
    case SparseMethod::kMdGfLin:
    case SparseMethod::kMdGfExp:
      return mask_decay(sparsity, num_steps);
    case SparseMethod::kSdGfStep:
      return presets::sdgf_step(n, m, num_steps);
    case SparseMethod::kSdGfGeo:
      return presets::sdgf_geo(n, m, num_steps);
    case SparseMethod::kNone:
    case SparseMethod::kStatic:
      return presets::static_mask(density_of(sparsity));
    case SparseMethod::kSet:
    case SparseMethod::kRigl:
      break;
  }
  return presets::rigl(density_of(sparsity), num_steps, sparsity.every);
}

}  // namespace

SparsifierConfig sparsifier_config(const TrainOptions& options, int64_t num_steps) {
  const SparsityOptions& sparsity = options.sparsity;
  SparsifierConfig config = preset_of(sparsity, num_steps);
  config.seed = options.seed;
  if (!moves_masks(sparsity.method)) return config;
  // The first update comes after as many steps as the others, so that its rows have come.
  config.schedule.begin = sparsity.every;
  config.schedule.alpha = sparsity.alpha;
  if (sparsity.method == SparseMethod::kSet) {
    config.rule.drop = DropCriterion::kSetSigned;
    config.rule.grow = GrowCriterion::kRandom;
    config.schedule.anneal = Anneal::kConstant;
    config.order = UpdateOrder::kAfterStep;
  }
  return config;
}

SparseExperts::SparseExperts(const MoELayer& layer, GateAdam& optimizer,
                             const TrainOptions& options, int64_t num_steps) {
  if (options.sparsity.method == SparseMethod::kNone) return;
  sparsifier_ = std::make_unique<Sparsifier>(layer.experts()->sparse_units(0),
                                             sparsifier_config(options, num_steps), layer.groups());
  sparsifier_->attach(optimizer.optimizer());
}

void SparseExperts::before_step(int64_t step) {
  if (sparsifier_) sparsifier_->begin_step(step);
}
void SparseExperts::after_backward(int64_t step) {
  if (sparsifier_) sparsifier_->end_backward(step);
}
void SparseExperts::after_step(int64_t step) {
  if (sparsifier_) sparsifier_->end_step(step);
}

SparsityResult SparseExperts::result() const {
  if (!sparsifier_) return {};
  const SparsityTotals totals = sparsifier_->totals();
  return {totals.nnz,         totals.size,  totals.num_updates,
          totals.num_skipped, totals.churn, totals.itop_rate()};
}

void SparseExperts::add_masks(std::vector<WeightDump>& dumps) const {
  if (!sparsifier_) return;
  for (const UnitState& unit : sparsifier_->state_dict().units) {
    WeightDump dump{"mask of " + to_string(unit.key), {unit.mask.rows(), unit.mask.cols()}, {}};
    for (int64_t place = 0; place < unit.mask.num_places(); ++place) {
      dump.values.push_back(unit.mask.test(place) ? 1 : 0);
    }
    dumps.push_back(std::move(dump));
  }
}

}  // namespace perseid::examples
