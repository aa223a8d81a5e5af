#include "examples/bench/swap_bench.h"

#include <ATen/ATen.h>

#include <functional>
#include <ostream>
#include <vector>

#include "examples/bench/gate_entrants.h"
#include "examples/bench/place.h"
#include "examples/bench/timing.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "moe/permutation_search.h"

namespace perseid::bench {
namespace {

using examples::format_text;

constexpr int64_t kWarmupRounds = 1;
constexpr int64_t kCandidates = 8;

struct Entrant {
  NamedGate gate;
  std::shared_ptr<MoELayer> layer;
  PermutationReport report = {};
};

std::vector<Entrant> make_entrants(const LayerCase& shape, uint64_t seed) {
  const auto placement = ExpertPlacement::contiguous(shape.num_experts, 1);
  const auto experts =
      std::make_shared<GroupedMLP>(GroupedMLPOptions(shape.d_model, shape.d_ff), placement, 0);
  experts->to(shape.dtype);
  MoELayerOptions options;
  options.permutation.search(gates::PermSearch::kSwap);
  std::vector<Entrant> entrants;
  for (const NamedGate& gate : make_gates(shape, seed)) {
    entrants.push_back({gate, std::make_shared<MoELayer>(
                                  std::vector<std::shared_ptr<gates::Gate>>{gate.gate}, experts,
                                  placement, make_parallel_groups(comm::self_group()), options)});
  }
  return entrants;
}

/// A search from the identity. With no candidates it is the dense pass and one evaluation.
void search_once(Entrant& entrant, const GateProblem& problem, const at::Tensor& target,
                 int64_t candidates) {
  gates::ExpertPermutation& permutation = *entrant.layer->permutations().front();
  permutation.set_map(at::arange(permutation.num_experts()).unsqueeze(0));
  PermutationSearchOptions options;
  options.candidates_per_round = kCandidates;
  options.max_evaluations = 1 + candidates;
  options.exhaustive_up_to = 0;
  MoEInput input(problem.tokens.detach());
  input.keys = problem.keys;
  entrant.report = PermutationSearch(*entrant.layer, options).search_now(1, [&](size_t) {
    return (entrant.layer->forward(input).output().to(at::kFloat) - target).square().mean();
  });
}

}  // namespace

void run_swap_bench(const GatesBenchOptions& options, std::ostream& out) {
  use_threads(options.threads);
  const LayerCase& shape = options.shape;
  const GateProblem problem = make_gate_problem(shape, options.seed);
  const at::Tensor target = at::randn({shape.num_tokens, shape.d_model});
  std::vector<Entrant> entrants = make_entrants(shape, options.seed);
  std::vector<std::function<void()>> runs;
  for (Entrant& entrant : entrants) {
    runs.emplace_back([&] { run_layer(*entrant.layer, problem); });
    runs.emplace_back([&] { search_once(entrant, problem, target, 0); });
    runs.emplace_back([&] { search_once(entrant, problem, target, kCandidates); });
  }
  const std::vector<std::vector<double>> ms = time_in_turns(runs, kWarmupRounds, options.repeats);

  const auto number = [](int64_t value) { return static_cast<long long>(value); };
  out << format_text(
             "\n(T, D, F, E, K) = (%lld, %lld, %lld, %lld, %lld) %s, %d threads, %lld "
             "candidates\n",
             number(shape.num_tokens), number(shape.d_model), number(shape.d_ff),
             number(shape.num_experts), number(shape.top_k), name_of(shape.dtype), options.threads,
             number(kCandidates))
      << format_text("%-10s %14s %14s %18s %11s\n", "gate", "training step", "dense pass",
                     "pass and round", "round/step");
  examples::JsonLines json(options.json);
  for (size_t i = 0; i < entrants.size(); ++i) {
    const std::vector<double>&step = ms[3 * i], &pass = ms[3 * i + 1], &round = ms[3 * i + 2];
    const double ratio = median_ratio(round, step);
    out << format_text("%-10s %11.1f ms %11.1f ms %15.1f ms %10.2fx\n",
                       entrants[i].gate.name.c_str(), median(step), median(pass), median(round),
                       ratio);
    json.write({{"bench", std::string("swap")},
                {"name", entrants[i].gate.name},
                {"shape", std::vector<int64_t>{shape.num_tokens, shape.d_model, shape.d_ff,
                                               shape.num_experts, shape.top_k}},
                {"dtype", std::string(name_of(shape.dtype))},
                {"threads", int64_t{options.threads}},
                {"repeats", options.repeats},
                {"evaluations", entrants[i].report.evaluations},
                {"step_ms_median", median(step)},
                {"dense_pass_ms_median", median(pass)},
                {"round_ms_median", median(round)},
                {"round_over_step", ratio}});
  }
}

}  // namespace perseid::bench
