#include "examples/bench/layer_bench.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>

#include <memory>
#include <ostream>

#include "examples/bench/contenders.h"
#include "examples/bench/timing.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::bench {
namespace {

using examples::format_text;

constexpr int64_t kWarmupRounds = 2;
constexpr size_t kLayer = 0, kDense = 1;  // places among the contenders
constexpr double kAuxLossCoeff = 1e-2;    // default of TopKGateOptions

struct Entrants {
  std::vector<LayerProblem> problems;
  std::unique_ptr<LayerContender> layer;
  std::unique_ptr<DenseContender> dense;
  std::vector<PeerForward> forwards;
  std::vector<std::unique_ptr<PeerContender>> peers;

  std::vector<Contender*> all() const {
    std::vector<Contender*> contenders = {layer.get(), dense.get()};
    for (const auto& peer : peers) contenders.push_back(peer.get());
    return contenders;
  }
};

struct Result {
  LayerCase shape;
  double max_over_mean = 0;             ///< load of the experts
  std::vector<std::string> names;       ///< of the contenders
  std::vector<std::vector<double>> ms;  ///< [contender][round]

  double ratio(size_t contender) const { return median_ratio(ms[contender], ms[kDense]); }
  double min_ratio(size_t contender) const { return minimum(ms[contender]) / minimum(ms[kDense]); }
};

Entrants make_entrants(const LayerCase& shape, const LayerBenchOptions& options,
                       const Place& place) {
  Entrants entrants;
  for (int64_t draw = 0; draw < options.draws; ++draw) {
    entrants.problems.push_back(
        make_problem(shape, options.seed, static_cast<uint64_t>(draw), place.tensors()));
  }
  entrants.layer = std::make_unique<LayerContender>(entrants.problems);
  entrants.dense = std::make_unique<DenseContender>(shape, place);
  entrants.forwards = {loop_forward, grouped_mm_forward};
  const GroupedMLP& experts = entrants.layer->experts();
  std::vector<PeerInput> inputs;
  for (const LayerProblem& problem : entrants.problems) {
    const at::Tensor weights =
        plain_gate(problem.tokens, problem.router, problem.expert_idx, kAuxLossCoeff).weights;
    inputs.push_back({problem.tokens, problem.expert_idx, weights.to(shape.dtype), experts.up_proj,
                      experts.down_proj, problem.grad_out});
  }
  entrants.peers.push_back(std::make_unique<PeerContender>("loop", loop_forward, inputs));
  entrants.peers.push_back(
      std::make_unique<PeerContender>("grouped_mm", grouped_mm_forward, inputs));
  return entrants;
}

// ---- checks -------------------------------------------------------------------------------------
/// Compares what contenders of one case computed: the error relative to the largest value.
class Comparison {
 public:
  explicit Comparison(at::ScalarType dtype)
      : tolerance_(tolerance_of(dtype)),
        wide_(at::isReducedFloatingType(dtype) ? at::kFloat : at::kDouble) {}

  void require_equal(const Outcome& actual, const Outcome& expected, const std::string& name,
                     const std::vector<std::string>& grad_names) const {
    require_equal(actual.out, expected.out, name + ".out");
    for (size_t i = 0; i < grad_names.size(); ++i) {
      require_equal(actual.grads[i], expected.grads[i], name + ".grad_" + grad_names[i]);
    }
  }

 private:
  void require_equal(const at::Tensor& actual, const at::Tensor& expected,
                     const std::string& what) const {
    const at::Tensor want = expected.to(wide_);
    const double error = (actual.to(wide_) - want).abs().max().item<double>();
    const double limit = tolerance_ * want.abs().max().item<double>();
    if (error <= limit) return;
    throw InternalError(
        ErrorDetail{"perseid-bench layer", what + ".error", to_text(error),
                    format_text("exceeds %g: two contenders compute different values", limit)});
  }

  double tolerance_;
  at::ScalarType wide_;  ///< of the comparison
};

/// Output and gradients of a peer behind a gate of LibTorch operations: all that the layer does.
Outcome with_plain_gate(const LayerProblem& problem, PeerForward forward,
                        const GroupedMLP& experts) {
  const auto leaf = [](const at::Tensor& values) { return values.detach().requires_grad_(); };
  const at::Tensor tokens = leaf(problem.tokens), up = leaf(experts.up_proj),
                   down = leaf(experts.down_proj), router = leaf(problem.router);
  const PlainGateOutput gate = plain_gate(tokens, router, problem.expert_idx, kAuxLossCoeff);
  const at::Tensor out =
      forward({tokens, problem.expert_idx, gate.weights.to(tokens.scalar_type()), up, down, {}});
  return {out, torch::autograd::grad({out, gate.loss}, {tokens, up, down, router},
                                     {problem.grad_out, at::ones_like(gate.loss)})};
}

/// The dense chain as one expert with weight 1 for all its rows.
Outcome dense_reference(const DenseContender& dense) {
  const int64_t A = dense.rows().size(0);
  PeerContender one("one_expert", loop_forward,
                    {{dense.rows(), at::zeros({A, 1}, dense.rows().options().dtype(at::kLong)),
                      at::ones({A}, dense.rows().options()), dense.up().unsqueeze(0),
                      dense.down().unsqueeze(0), dense.grad_out()}});
  Outcome outcome = one.run();
  outcome.grads = {outcome.grads[0], outcome.grads[1].squeeze(0), outcome.grads[2].squeeze(0)};
  return outcome;
}

/// Largest load over mean load, after comparing the load with what was drawn.
double check_load(const Entrants& entrants) {
  const at::Tensor drawn = entrants.problems.front().expert_idx.cpu().reshape(-1).bincount(
      {}, entrants.problems.front().shape.num_experts);
  const at::Tensor& load = entrants.layer->last_stats().tokens_per_expert;
  if (!at::equal(load, drawn)) {
    throw InternalError(ErrorDetail{"perseid-bench layer", "tokens_per_expert", to_text(load),
                                    "of the layer differ from those drawn: " + to_text(drawn)});
  }
  const at::Tensor counts = drawn.to(at::kDouble);
  return (counts.max() / counts.mean()).item<double>();
}

double check_entrants(const Entrants& entrants) {
  const Comparison comparison(entrants.problems.front().shape.dtype);
  const Outcome layer = entrants.layer->run();
  const double max_over_mean = check_load(entrants);
  for (size_t i = 0; i < entrants.peers.size(); ++i) {
    const std::string& name = entrants.peers[i]->name();
    comparison.require_equal(
        with_plain_gate(entrants.problems.front(), entrants.forwards[i], entrants.layer->experts()),
        layer, name + " with a gate", {"tokens", "up", "down", "router"});
    // As it is timed, with given weights: gradients of its tokens lack the way through the gate.
    const Outcome timed = entrants.peers[i]->run();
    comparison.require_equal({timed.out, {timed.grads[1], timed.grads[2]}},
                             {layer.out, {layer.grads[1], layer.grads[2]}}, name, {"up", "down"});
  }
  comparison.require_equal(entrants.dense->run(), dense_reference(*entrants.dense), "dense",
                           {"rows", "up", "down"});
  return max_over_mean;
}

// ---- measurement and report ---------------------------------------------------------------------
Result measure(const LayerCase& shape, const LayerBenchOptions& options, const Place& place) {
  const Entrants entrants = make_entrants(shape, options, place);
  Result result;
  result.shape = shape;
  result.max_over_mean = check_entrants(entrants);
  std::vector<std::function<void()>> runs;
  for (Contender* contender : entrants.all()) {
    result.names.push_back(contender->name());
    runs.emplace_back([contender] { contender->run(); });
  }
  result.ms = time_calls(place, runs, kWarmupRounds, options.repeats);
  return result;
}

std::string case_name(const LayerCase& shape) {
  const auto number = [](int64_t value) { return static_cast<long long>(value); };
  return format_text("%s%s(%lld, %lld, %lld, %lld, %lld) %s %s", shape.name.c_str(),
                     shape.name.empty() ? "" : ": ", number(shape.num_tokens),
                     number(shape.d_model), number(shape.d_ff), number(shape.num_experts),
                     number(shape.top_k), name_of(shape.dtype), name_of(shape.routing));
}

void print(const Result& result, std::ostream& out) {
  out << format_text("\n%s, load max/mean %.2f\n", case_name(result.shape).c_str(),
                     result.max_over_mean)
      << format_text("%-12s %10s %10s %10s %10s %10s\n", "", "ms median", "ms min", "ratio",
                     "ratio min", "GFLOP/s");
  for (size_t i = 0; i < result.names.size(); ++i) {
    const double ms = median(result.ms[i]);
    out << format_text("%-12s %10.2f %10.2f %10.3f %10.3f %10.1f\n", result.names[i].c_str(), ms,
                       minimum(result.ms[i]), result.ratio(i), result.min_ratio(i),
                       result.shape.flops() / ms / 1e6);
  }
  out << std::flush;
}

void write(const Result& result, const LayerBenchOptions& options, const Place& place,
           examples::JsonLines& json) {
  const LayerCase& shape = result.shape;
  for (size_t i = 0; i < result.names.size(); ++i) {
    const double ms = median(result.ms[i]);
    json.write({{"bench", std::string("layer")},
                {"name", result.names[i]},
                {"case", shape.name},
                {"shape", std::vector<int64_t>{shape.num_tokens, shape.d_model, shape.d_ff,
                                               shape.num_experts, shape.top_k}},
                {"dtype", std::string(name_of(shape.dtype))},
                {"routing", std::string(name_of(shape.routing))},
                {"load_max_over_mean", result.max_over_mean},
                {"device", std::string(place.name())},
                {"threads", int64_t{options.threads}},
                {"repeats", options.repeats},
                {"draws", options.draws},
                {"ms_median", ms},
                {"ms_min", minimum(result.ms[i])},
                {"ratio_to_dense", result.ratio(i)},
                {"ratio_to_dense_min", result.min_ratio(i)},
                {"gflops", shape.flops() / ms / 1e6}});
  }
}

void print_summary(const std::vector<Result>& results, std::ostream& out) {
  std::vector<double> ratios;
  size_t worst = 0;
  std::vector<size_t> wins(results.front().names.size(), 0);
  for (size_t i = 0; i < results.size(); ++i) {
    ratios.push_back(results[i].ratio(kLayer));
    if (ratios[i] > ratios[worst]) worst = i;
    for (size_t peer = 0; peer < wins.size(); ++peer) {
      wins[peer] += median_ratio(results[i].ms[kLayer], results[i].ms[peer]) < 1 ? 1 : 0;
    }
  }
  out << format_text("\nlayer / dense: median of %zu cases %.3f, largest %.3f at %s\n",
                     ratios.size(), median(ratios), ratios[worst],
                     case_name(results[worst].shape).c_str());
  for (size_t peer = kDense + 1; peer < wins.size(); ++peer) {
    out << format_text("layer ahead of %s in %zu of %zu cases\n",
                       results.front().names[peer].c_str(), wins[peer], results.size());
  }
}

}  // namespace

void run_layer_bench(const LayerBenchOptions& options, std::ostream& out) {
  examples::JsonLines json(options.json);
  const Place place(options.device);
  use_threads(options.threads);
  out << format_text(
             "%s, %d threads, %lld rounds in which each contender runs once, %lld routings\n",
             place.name(), options.threads, static_cast<long long>(options.repeats),
             static_cast<long long>(options.draws))
      << "(T, D, F, E, K), forward + backward = 18*A*D*F FLOPs with A = T*K; ratio = time / time "
         "of dense in the same round, median of the rounds;\nratio min = shortest / shortest; "
         "layer includes its gate and load-balance loss, the others do not; dense neither orders "
         "nor weights rows\n";
  std::vector<Result> results;
  for (const LayerCase& shape : options.cases) {
    place.release_memory();
    try {
      results.push_back(measure(shape, options, place));
    } catch (const c10::OutOfMemoryError&) {
      out << "\n" << case_name(shape) << ": left out, the memory of the GPU is too small\n";
      continue;
    } catch (const OutOfMemory&) {
      out << "\n" << case_name(shape) << ": left out, the memory of the GPU is too small\n";
      continue;
    }
    print(results.back(), out);
    write(results.back(), options, place, json);
  }
  if (results.size() > 1) print_summary(results, out);
}

}  // namespace perseid::bench
