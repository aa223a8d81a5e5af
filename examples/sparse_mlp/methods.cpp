#include "examples/sparse_mlp/methods.h"

#include "kernels/error.h"
#include "moe/sparse_presets.h"

namespace perseid::examples {
namespace {

constexpr double kEpsilon = 13, kZeta = 0.3;  // the tutorial's
/// Active weights of SET's budget in all layers, and the share of all that they are.
constexpr int64_t kActive = 81492, kAll = 2794000;
/// The widest dense network of no more weights: 784 * 84 + 2 * 84 * 84 + 84 * 10 = 80 808.
constexpr int64_t kSmallHidden = 84;
/// Groups of 8 weights, the longest that fit all layers, keep one.
constexpr int64_t kKept = 1, kGroup = 8;
/// Batches of 40 images make poor gradients: updates are rarer and look at more of them.
constexpr int64_t kUpdateEvery = 200, kGradients = 10;

}  // namespace

const std::vector<Method>& all_methods() {
  static const std::vector<Method> methods = {{"static"},
                                              {"set"},
                                              {"rigl"},
                                              {"srigl"},
                                              {"sampled"},
                                              {"neuron"},
                                              {"topkast"},
                                              {"nm_dst"},
                                              {"srste"},
                                              {"mdgf_lin"},
                                              {"mdgf_exp"},
                                              {"sdgf_step"},
                                              {"small_dense", kSmallHidden, false},
                                              {"dense", kHidden, false}};
  return methods;
}

const Method& method_of(const std::string& name) {
  for (const Method& method : all_methods()) {
    if (method.name == name) return method;
  }
  throw ConfigError(ErrorDetail{"sparse_mlp", "dst", name, "is not a method"});
}

SparsifierConfig method_config(const Method& method, int64_t epochs, int64_t steps_per_epoch,
                               uint64_t seed) {
  const int64_t total_steps = epochs * steps_per_epoch;
  const auto total = static_cast<double>(total_steps);
  const std::string& name = method.name;
  const Density density = Density::ratio(kActive, kAll);
  SparsifierConfig config = presets::set(kEpsilon, steps_per_epoch, epochs, kZeta);
  const Budget budget = config.budget;
  if (name == "static") config = presets::static_mask(density);
  if (name == "rigl") config = presets::rigl(density, total_steps, kUpdateEvery);
  if (name == "srigl") {
    config = presets::srigl(density, total_steps, 0.3, kUpdateEvery);
    config.ablation.kept = {"layer 3,*"};
  }
  if (name == "sampled") config = presets::sampled(density, total_steps, kUpdateEvery);
  if (name == "neuron") {
    // Of each hidden layer; its square between two of them: 85 of 1000 make 81 940 weights.
    config = presets::neuron(0.085, total_steps, kUpdateEvery);
    for (int64_t layer = 0; layer < 3; ++layer) {
      config.neurons.links.push_back({UnitKey{layer}, UnitKey{layer + 1}});
    }
  }
  if (name == "topkast") config = presets::topkast(density, 0.1, steps_per_epoch);
  if (name == "nm_dst") config = presets::nm_dst(kKept, kGroup, total_steps, kUpdateEvery);
  if (name == "srste") config = presets::srste(kKept, kGroup);
  if (name == "mdgf_lin") config = presets::mdgf_lin(kKept, kGroup, 2 / total);  // 0 at the half
  if (name == "mdgf_exp") config = presets::mdgf_exp(kKept, kGroup, 5 / total);
  if (name == "sdgf_step") config = presets::sdgf_step(kKept, kGroup, total_steps);
  if (config.forward.method == ForwardMethod::kMaskDecay) {
    config.forward.total_steps = total_steps;
    config.forward.fine_tune = 0.1;  // so that it ends with 1:8
  }
  if (config.rule.grow == GrowCriterion::kGrad || config.rule.grow == GrowCriterion::kSampledGrad) {
    config.schedule.begin = kUpdateEvery;  // the first steps have no 10 gradients yet
    config.grad_accum = kGradients;
  }
  const bool has_own_budget = config.structure.cell == Cell::kGroup ||
                              config.structure.cell == Cell::kNeuron || config.forward.is_soft();
  if (!has_own_budget) config.budget = budget;  // equal for all others
  config.seed = seed;
  return config;
}

}  // namespace perseid::examples
