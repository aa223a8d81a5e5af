#include <ostream>

#include "moe/sparsifier.h"

namespace perseid {
namespace {

const char* name_of(Distribution distribution) {
  switch (distribution) {
    case Distribution::kUniform:
      return "uniform";
    case Distribution::kEr:
      return "er";
    case Distribution::kErk:
      return "erk";
    case Distribution::kEpsilon:
      return "epsilon";
    case Distribution::kCustom:
      return "custom";
    case Distribution::kGlobal:
      return "global";
    case Distribution::kLoad:
      return "load";
  }
  return "?";
}
const char* name_of(Cell cell) {
  switch (cell) {
    case Cell::kUnit:
      return "unit";
    case Cell::kRow:
      return "row";
    case Cell::kGroup:
      return "group";
    case Cell::kNeuron:
      return "neuron";
  }
  return "?";
}
const char* name_of(DropCriterion drop) {
  switch (drop) {
    case DropCriterion::kMagnitude:
      return "magnitude";
    case DropCriterion::kSetSigned:
      return "set_signed";
    case DropCriterion::kMest:
      return "mest";
    case DropCriterion::kTaylor:
      return "taylor";
  }
  return "?";
}
const char* name_of(GrowCriterion grow) {
  switch (grow) {
    case GrowCriterion::kRandom:
      return "random";
    case GrowCriterion::kGrad:
      return "grad";
    case GrowCriterion::kUnfired:
      return "unfired";
    case GrowCriterion::kMomentum:
      return "momentum";
    case GrowCriterion::kSampledGrad:
      return "sampled_grad";
    case GrowCriterion::kGreedyProgress:
      return "greedy_progress";
    case GrowCriterion::kNone:
      return "none";
  }
  return "?";
}
const char* name_of(Anneal anneal) {
  switch (anneal) {
    case Anneal::kConstant:
      return "constant";
    case Anneal::kCosine:
      return "cosine";
    case Anneal::kPoly:
      return "poly";
    case Anneal::kLinear:
      return "linear";
    case Anneal::kStages:
      return "stages";
  }
  return "?";
}
const char* name_of(UpdateOrder order) {
  return order == UpdateOrder::kBeforeStep      ? "before_step"
         : order == UpdateOrder::kInsteadOfStep ? "instead_of_step"
                                                : "after_step";
}
const char* name_of(GrownSecondMoment policy) {
  switch (policy) {
    case GrownSecondMoment::kZero:
      return "zero";
    case GrownSecondMoment::kMean:
      return "mean";
    case GrownSecondMoment::kAge:
      return "age";
    case GrownSecondMoment::kGradient:
      return "gradient";
  }
  return "?";
}

/// Budgets that change.
void write_targets(std::ostream& out, const Budget& budget, const Schedule& schedule) {
  const auto ratio = [&](const Density& density) -> std::ostream& {
    return out << density.numerator() << "/" << density.denominator();
  };
  if (budget.distribution == Distribution::kLoad) {
    out << " load_power=" << budget.load_power << " realloc_every=" << budget.realloc_every;
  }
  if (budget.floor.has_value()) {
    out << " floor=";
    ratio(*budget.floor);
  }
  out << " ceiling=";
  ratio(budget.ceiling);
  for (const DropStage& stage : schedule.stages) {
    out << " stage=" << stage.share << "@" << stage.from;
  }
  if (schedule.density_ramp.has_value()) {
    const DensityRamp& ramp = *schedule.density_ramp;
    out << " ramp_initial=";
    ratio(ramp.initial) << " ramp_begin=" << ramp.begin << " ramp_end=" << ramp.end
                        << " ramp_power=" << ramp.power;
  }
  if (schedule.nm_ramp.has_value()) {
    for (const NmRampFrame& frame : schedule.nm_ramp->frames) {
      out << " frame=" << frame.n << ":" << frame.m << "@" << frame.from;
    }
  }
  out << " grow_first=" << schedule.grow_first;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const SparsifierConfig& config) {
  const auto& [budget, structure, rule, schedule, forward, state, order, grad_accum, min_rows, seed,
               units, ablation, neurons] = config;
  out << "budget=" << name_of(budget.distribution) << " density=" << budget.density.numerator()
      << "/" << budget.density.denominator() << " power=" << budget.power
      << " epsilon=" << budget.epsilon;
  for (const CustomDensity& custom : budget.custom) {
    out << " " << custom.pattern << "=" << custom.density.numerator() << "/"
        << custom.density.denominator();
  }
  out << " cell=" << name_of(structure.cell) << " atom=" << structure.atom_rows << "x"
      << structure.atom_cols << " group=" << structure.group_keep << ":" << structure.group
      << " pad=" << structure.pad << " drop=" << name_of(rule.drop)
      << " grow=" << name_of(rule.grow) << " random_share=" << rule.random_share
      << " exclude_just_dropped=" << rule.exclude_just_dropped
      << " mest_lambda=" << rule.mest_lambda << " momentum_decay=" << rule.momentum_decay
      << " candidates_per_grown=" << rule.candidates_per_grown << " begin=" << schedule.begin
      << " end=" << schedule.end_step() << " every=" << schedule.every
      << " alpha=" << schedule.alpha << " anneal=" << name_of(schedule.anneal)
      << " power=" << schedule.power << " alpha_min=" << schedule.alpha_min
      << " stagger=" << schedule.stagger
      << " clock=" << (schedule.clock == Clock::kStep ? "step" : "tokens")
      << " mean_rows=" << schedule.mean_rows
      << " grown=" << (state.weight == GrownWeight::kZero ? "zero" : "normal")
      << " weight_std=" << state.weight_std << " second_moment=" << name_of(state.second_moment)
      << " order=" << name_of(order) << " grad_accum=" << grad_accum << " min_rows=" << min_rows
      << " seed=" << seed;
  write_targets(out, budget, schedule);
  out << forward;
  if (ablation.is_on()) {
    out << " gamma=" << ablation.gamma
        << " free_columns=" << (ablation.free_columns == FreeColumns::kAtEnd ? "at_end" : "now")
        << " loses_rest=" << ablation.loses_rest;
    for (const std::string& pattern : ablation.kept) out << " kept=" << pattern;
  }
  if (structure.cell == Cell::kNeuron) out << " candidates=" << neurons.candidates;
  for (const NeuronLink& link : neurons.links) {
    const auto add = [&out](const UnitKey& key) {
      out << key.layer << "." << key.expert << "." << static_cast<int>(key.matrix);
    };
    out << " link=";
    add(link.rows_of);
    out << ">";
    add(link.columns_of);
  }
  return out;
}

}  // namespace perseid
