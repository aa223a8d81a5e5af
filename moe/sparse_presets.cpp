#include "moe/sparse_presets.h"

#include <utility>

#include "kernels/error.h"

namespace perseid::presets {
namespace {

SparsifierConfig n_of_m(int64_t n, int64_t m) {
  require(m >= 1 && n >= 1 && n <= m, "presets", "n:m", to_text(n) + ":" + to_text(m),
          "is not 1 <= N <= M");
  SparsifierConfig config;
  config.structure = Structure::n_of_m(n, m);
  config.budget.density = Density::ratio(n, m);
  config.schedule.end = 0;
  return config;
}

SparsifierConfig frames(int64_t n, int64_t m, std::vector<NmFrame> list, int64_t total_steps,
                        int64_t dense_steps) {
  SparsifierConfig config = n_of_m(n, m);
  config.forward.method = ForwardMethod::kStructureDecay;
  config.forward.frames = std::move(list);
  config.forward.total_steps = total_steps;
  config.forward.dense_steps = dense_steps;
  return config;
}

}  // namespace

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

SparsifierConfig set_official(double epsilon, int64_t steps_per_epoch, int64_t num_epochs,
                              double zeta) {
  SparsifierConfig config = set(epsilon, steps_per_epoch, num_epochs, zeta);
  config.rule.exclude_just_dropped = false;
  return config;
}
SparsifierConfig rigl_official(const Density& density, int64_t total_steps, int64_t every) {
  SparsifierConfig config = rigl(density, total_steps, every);
  config.rule.exclude_just_dropped = false;
  return config;
}

SparsifierConfig snfs(const Density& density, int64_t total_steps, int64_t every) {
  SparsifierConfig config = rigl(density, total_steps, every);
  config.rule.grow = GrowCriterion::kMomentum;
  config.order = UpdateOrder::kBeforeStep;
  return config;
}

SparsifierConfig rigl_itop(const Density& density, int64_t total_steps, int64_t every) {
  SparsifierConfig config = rigl(density, total_steps, every);
  config.schedule.end = total_steps;
  config.schedule.alpha = 0.5;
  config.schedule.alpha_min = 0.005;
  config.order = UpdateOrder::kAfterStep;
  return config;
}
SparsifierConfig dsl(int64_t total_steps, int64_t every, const Density& density) {
  SparsifierConfig config = rigl_itop(density, total_steps, every);
  config.budget.distribution = Distribution::kUniform;
  return config;
}

SparsifierConfig sampled(const Density& density, int64_t total_steps, int64_t every) {
  SparsifierConfig config = rigl(density, total_steps, every);
  config.budget.distribution = Distribution::kUniform;
  config.rule.grow = GrowCriterion::kSampledGrad;
  config.order = UpdateOrder::kBeforeStep;
  return config;
}

SparsifierConfig rigl_block(const Density& density, int64_t total_steps, int64_t block,
                            int64_t every) {
  SparsifierConfig config = rigl(density, total_steps, every);
  config.budget.distribution = Distribution::kUniform;
  config.structure = Structure::blocks(block, block);
  config.schedule.stagger = true;
  config.order = UpdateOrder::kBeforeStep;
  return config;
}
SparsifierConfig greedy_block(const Density& density, int64_t total_steps, int64_t block,
                              int64_t every) {
  SparsifierConfig config = rigl_block(density, total_steps, block, every);
  config.rule.grow = GrowCriterion::kGreedyProgress;
  return config;
}

SparsifierConfig srigl(const Density& density, int64_t total_steps, double gamma, int64_t every) {
  SparsifierConfig config = rigl(density, total_steps, every);
  config.structure = Structure::constant_fan_in();
  config.ablation.gamma = gamma;
  config.order = UpdateOrder::kAfterStep;
  return config;
}

SparsifierConfig neuron(const Density& density, int64_t total_steps, int64_t every) {
  SparsifierConfig config = rigl(density, total_steps, every);
  config.budget.distribution = Distribution::kUniform;
  config.structure = Structure::coupled_neurons();
  config.schedule.alpha = 0.1;
  config.order = UpdateOrder::kBeforeStep;
  return config;
}

SparsifierConfig gmp(const Density& density, int64_t total_steps, int64_t every) {
  SparsifierConfig config;
  config.budget.distribution = Distribution::kGlobal;
  config.budget.density = density;
  config.rule.grow = GrowCriterion::kNone;
  config.schedule.total_steps = total_steps;
  config.schedule.every = every;
  config.schedule.density_ramp.emplace();
  config.order = UpdateOrder::kAfterStep;
  return config;
}

SparsifierConfig granet(const Density& density, int64_t total_steps, int64_t every,
                        const Density& initial) {
  SparsifierConfig config = gmp(density, total_steps, every);
  config.rule.grow = GrowCriterion::kGrad;
  config.schedule.alpha = 0.5;
  config.schedule.density_ramp->initial = initial;
  return config;
}

SparsifierConfig mest(const Density& density, int64_t total_steps, int64_t every, double mutation,
                      bool grow_first) {
  SparsifierConfig config;
  config.budget.distribution = Distribution::kUniform;
  config.budget.density = density;
  config.rule.drop = DropCriterion::kMest;
  config.schedule.total_steps = total_steps;
  config.schedule.every = every;
  config.schedule.alpha = mutation;
  config.schedule.anneal = Anneal::kStages;
  config.schedule.stages = {{0, 1}, {1.0 / 3, 0.5}, {2.0 / 3, 0.25}};
  config.schedule.grow_first = grow_first;
  return config;
}

SparsifierConfig nm_dst(int64_t n, int64_t m, int64_t total_steps, int64_t every) {
  const SparsifierConfig cells = n_of_m(n, m);  // checks n and m first
  SparsifierConfig config = rigl(cells.budget.density, total_steps, every);
  config.structure = cells.structure;
  return config;
}

SparsifierConfig nm_ramp(int64_t n, int64_t m, int64_t total_steps, int64_t every) {
  SparsifierConfig config = nm_dst(n, m, total_steps, every);
  const std::vector<NmFrame> frames = stepwise_frames(n, m);
  config.schedule.nm_ramp.emplace();
  for (size_t i = 0; i < frames.size(); ++i) {
    const double from = static_cast<double>(i) / static_cast<double>(frames.size());
    config.schedule.nm_ramp->frames.push_back({from, frames[i].n, frames[i].m});
  }
  return config;
}

SparsifierConfig srste(int64_t n, int64_t m, double lambda) {
  SparsifierConfig config = n_of_m(n, m);
  config.forward.method = ForwardMethod::kSrSte;
  config.forward.lambda = lambda;
  return config;
}

SparsifierConfig mdgf_lin(int64_t n, int64_t m, double rate) {
  SparsifierConfig config = mdgf_exp(n, m, rate);
  config.forward.decay = MaskDecay::kLinear;
  return config;
}
SparsifierConfig mdgf_exp(int64_t n, int64_t m, double rate) {
  SparsifierConfig config = n_of_m(n, m);
  config.forward.method = ForwardMethod::kMaskDecay;
  config.forward.decay_rate = rate;
  return config;
}

SparsifierConfig sdgf_step(int64_t n, int64_t m, int64_t total_steps, int64_t dense_steps) {
  return frames(n, m, stepwise_frames(n, m), total_steps, dense_steps);
}
SparsifierConfig sdgf_geo(int64_t n, int64_t m, int64_t total_steps, int64_t dense_steps) {
  return frames(n, m, geometric_frames(n, m), total_steps, dense_steps);
}

SparsifierConfig topkast(const Density& density, const Density& backward_extra, int64_t every) {
  SparsifierConfig config;
  config.budget.distribution = Distribution::kUniform;
  config.budget.density = density;
  config.schedule.end = 0;
  config.forward.method = ForwardMethod::kTopKast;
  config.forward.backward_extra = backward_extra;
  config.forward.every = every;
  return config;
}

}  // namespace perseid::presets
