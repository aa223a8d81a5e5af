#include "examples/bench/gates_bench.h"

#include <ATen/ATen.h>

#include <functional>
#include <ostream>
#include <vector>

#include "examples/bench/gate_entrants.h"
#include "examples/bench/place.h"
#include "examples/bench/timing.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::bench {
namespace {

using examples::format_text;

constexpr int64_t kWarmupRounds = 1;

struct Entrant {
  NamedGate gate;
  std::shared_ptr<MoELayer> sparse, all;
  double experts_per_token = 0;
};

struct Result {
  std::string name;
  double experts_per_token = 0;
  std::vector<double> gate_ms, layer_ms, all_ms;  ///< [round]

  double gate_share() const { return median_ratio(gate_ms, layer_ms); }
  double speedup() const { return median_ratio(all_ms, layer_ms); }
};

void require_equal(const at::Tensor& actual, const at::Tensor& expected, double tolerance,
                   const std::string& what) {
  // A gradient that one of them does not have is zero in the other.
  const at::Tensor& shape_of = actual.defined() ? actual : expected;
  if (!shape_of.defined()) return;
  const auto values = [&](const at::Tensor& t) {
    return t.defined() ? t.to(at::kDouble) : at::zeros_like(shape_of, at::kDouble);
  };
  const at::Tensor want = values(expected);
  const double error = (values(actual) - want).abs().max().item<double>();
  const double limit = tolerance * want.abs().max().item<double>();
  if (error <= limit) return;
  throw InternalError(ErrorDetail{
      "perseid-bench gates", what, to_text(error),
      "differs from the layer that executes all experts by more than " + to_text(limit)});
}

/// Compares the sparse layer with the one that executes all, and counts what it executed.
void check(Entrant& entrant, const GateProblem& problem) {
  const Step sparse = run_layer(*entrant.sparse, problem);
  const Step all = run_layer(*entrant.all, problem);
  const double tolerance = tolerance_of(problem.tokens.scalar_type());
  require_equal(sparse.out, all.out, tolerance, entrant.gate.name + ".out");
  for (size_t i = 0; i < sparse.grads.size(); ++i) {
    require_equal(sparse.grads[i], all.grads[i], tolerance,
                  entrant.gate.name + ".grads[" + std::to_string(i) + "]");
  }
  entrant.experts_per_token = static_cast<double>(sparse.stats.rows_processed) /
                              static_cast<double>(sparse.stats.num_tokens);
}

std::vector<Entrant> make_entrants(const LayerCase& shape, const GateProblem& problem,
                                   uint64_t seed) {
  const auto experts =
      std::make_shared<GroupedMLP>(GroupedMLPOptions(shape.d_model, shape.d_ff),
                                   ExpertPlacement::contiguous(shape.num_experts, 1), 0);
  experts->to(shape.dtype);
  std::vector<Entrant> entrants;
  for (const NamedGate& gate : make_gates(shape, seed)) {
    entrants.push_back(
        {gate, make_layer(gate.gate, experts, shape.num_experts),
         make_layer(std::make_shared<AllExpertsGate>(gate.gate), experts, shape.num_experts)});
    check(entrants.back(), problem);
  }
  return entrants;
}

std::vector<Result> measure(const std::vector<Entrant>& entrants, const GateProblem& problem,
                            int64_t repeats) {
  std::vector<std::function<void()>> runs;
  for (const Entrant& entrant : entrants) {
    runs.emplace_back([&] { run_gate(*entrant.gate.gate, problem); });
    runs.emplace_back([&] { run_layer(*entrant.sparse, problem); });
    runs.emplace_back([&] { run_layer(*entrant.all, problem); });
  }
  const std::vector<std::vector<double>> ms = time_in_turns(runs, kWarmupRounds, repeats);
  std::vector<Result> results;
  for (size_t i = 0; i < entrants.size(); ++i) {
    results.push_back({entrants[i].gate.name, entrants[i].experts_per_token, ms[3 * i],
                       ms[3 * i + 1], ms[3 * i + 2]});
  }
  return results;
}

void print(const LayerCase& shape, const std::vector<Result>& results, std::ostream& out) {
  const auto number = [](int64_t value) { return static_cast<long long>(value); };
  out << format_text("\n(T, D, F, E, K) = (%lld, %lld, %lld, %lld, %lld) %s\n",
                     number(shape.num_tokens), number(shape.d_model), number(shape.d_ff),
                     number(shape.num_experts), number(shape.top_k), name_of(shape.dtype))
      << format_text("%-10s %13s %9s %9s %11s %15s %8s\n", "gate", "experts/token", "gate ms",
                     "layer ms", "gate share", "all experts ms", "speed-up");
  for (const Result& result : results) {
    out << format_text("%-10s %13.2f %9.2f %9.1f %10.1f%% %15.1f %7.2fx\n", result.name.c_str(),
                       result.experts_per_token, median(result.gate_ms), median(result.layer_ms),
                       100 * result.gate_share(), median(result.all_ms), result.speedup());
  }
}

void write(const GatesBenchOptions& options, const std::vector<Result>& results,
           examples::JsonLines& json) {
  const LayerCase& shape = options.shape;
  for (const Result& result : results) {
    json.write({{"bench", std::string("gates")},
                {"name", result.name},
                {"shape", std::vector<int64_t>{shape.num_tokens, shape.d_model, shape.d_ff,
                                               shape.num_experts, shape.top_k}},
                {"dtype", std::string(name_of(shape.dtype))},
                {"threads", int64_t{options.threads}},
                {"repeats", options.repeats},
                {"experts_per_token", result.experts_per_token},
                {"gate_ms_median", median(result.gate_ms)},
                {"ms_median", median(result.layer_ms)},
                {"ms_min", minimum(result.layer_ms)},
                {"all_experts_ms_median", median(result.all_ms)},
                {"gate_share", result.gate_share()},
                {"speedup_over_all_experts", result.speedup()}});
  }
}

}  // namespace

void run_gates_bench(const GatesBenchOptions& options, std::ostream& out) {
  examples::JsonLines json(options.json);
  use_threads(options.threads);
  out << format_text("%d threads, %lld rounds in which each runs once; forward + backward\n",
                     options.threads, static_cast<long long>(options.repeats))
      << "gate share = gate alone / layer with its gate; speed-up = the same gate and layer with "
         "every expert executed / layer;\nboth in the same round, median of the rounds; switches "
         "of dselectk and comet are saturated\n";
  const GateProblem problem = make_gate_problem(options.shape, options.seed);
  const std::vector<Entrant> entrants = make_entrants(options.shape, problem, options.seed);
  const std::vector<Result> results = measure(entrants, problem, options.repeats);
  print(options.shape, results, out);
  write(options, results, json);
}

}  // namespace perseid::bench
