#include "moe/sparse_presets.h"

#include "kernels/error.h"

namespace perseid::presets {

SparsifierConfig static_mask(const Density& density) {
  SparsifierConfig config;
  config.budget.density = density;
  config.schedule.end = 0;
  return config;
}

SparsifierConfig set(double epsilon, int64_t steps_per_epoch, int64_t num_epochs, double zeta) {
  require(steps_per_epoch >= 1, "presets_set", "steps_per_epoch", steps_per_epoch, "is below 1");
  require(num_epochs >= 1, "presets_set", "num_epochs", num_epochs, "is below 1");
  SparsifierConfig config;
  config.budget.distribution = Distribution::kEpsilon;
  config.budget.epsilon = epsilon;
  config.rule.drop = DropCriterion::kSetSigned;
  config.rule.grow = GrowCriterion::kRandom;
  config.schedule.begin = steps_per_epoch - 1;
  config.schedule.end = steps_per_epoch * num_epochs - 1;
  config.schedule.every = steps_per_epoch;
  config.schedule.alpha = zeta;
  config.schedule.anneal = Anneal::kConstant;
  config.state.weight = GrownWeight::kNormal;
  config.order = UpdateOrder::kAfterStep;
  return config;
}

SparsifierConfig rigl(const Density& density, int64_t total_steps, int64_t every) {
  SparsifierConfig config;
  config.budget.density = density;
  config.rule.grow = GrowCriterion::kGrad;
  config.schedule.total_steps = total_steps;
  config.schedule.every = every;
  config.order = UpdateOrder::kInsteadOfStep;
  return config;
}

}  // namespace perseid::presets
