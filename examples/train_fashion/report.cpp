#include "examples/train_fashion/report.h"

#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <functional>

#include "comm/session.h"
#include "examples/common/console.h"
#include "examples/common/device.h"
#include "examples/common/text.h"
#include "examples/train_fashion/metrics.h"
#include "examples/train_fashion/search_report.h"
#include "examples/train_fashion/sparsity_report.h"

namespace perseid::examples {
namespace {

std::string gate_text(GateKind gate, const TrainOptions& train) {
  const auto experts = static_cast<long long>(train.num_experts);
  switch (gate) {
    case GateKind::kSingle:
      return format_text("single  (expert 0 of %lld for all)", experts);
    case GateKind::kHash:
      return format_text("hash  (floor(1000 * sum of pixels) mod %lld)", experts);
    case GateKind::kOracle:
      return format_text("oracle  (the domain, mod %lld)", experts);
    case GateKind::kDSelectK:
      return format_text("dselectk  (at most k=%lld of %lld, one a selector; gamma %g%s)",
                         static_cast<long long>(train.top_k), experts, train.gamma,
                         train.hard_eval ? ", hard in the test" : "");
    case GateKind::kComet:
      return format_text("comet  (at most k=%lld of %lld, one a tree; gamma %g%s)",
                         static_cast<long long>(train.top_k), experts, train.gamma,
                         train.hard_eval ? ", hard in the test" : "");
    case GateKind::kDense:
      return format_text("dense  (all %lld, softmax)", experts);
    case GateKind::kTopK:
      break;
  }
  return format_text("topk  (k=%lld of %lld, top-k -> softmax)",
                     static_cast<long long>(train.top_k), experts);
}

std::string mean_of_runs(const std::vector<FinishedRun>& runs, const char* format,
                         const std::function<double(const RunResult&)>& value) {
  std::vector<double> values;
  for (const FinishedRun& run : runs) values.push_back(value(run.result));
  return mean_text(values, format);
}

/// At the end of the training.
double final_experts(const RunResult& result) {
  return result.curve.empty() ? 0 : result.curve.back().experts_per_token;
}

/// Six digits behind the point: what a picture needs.
std::vector<double> shortened(std::vector<double> values) {
  for (double& value : values) value = std::round(value * 1e6) / 1e6;
  return values;
}

void add_curve(JsonObject& object, const std::vector<StepReport>& curve) {
  std::vector<int64_t> steps;
  std::vector<double> cross_entropy, experts_per_token, max_vio;
  for (const StepReport& point : curve) {
    steps.push_back(point.step);
    cross_entropy.push_back(point.cross_entropy);
    experts_per_token.push_back(point.experts_per_token);
    max_vio.push_back(point.max_vio);
  }
  object.push_back({"curve_step", steps});
  object.push_back({"curve_cross_entropy", shortened(cross_entropy)});
  object.push_back({"curve_experts_per_token", shortened(experts_per_token)});
  object.push_back({"curve_max_vio", shortened(max_vio)});
}

}  // namespace

std::string count_text(int64_t count) { return with_commas(static_cast<long long>(count)); }

std::string mean_text(const std::vector<double>& values, const char* format) {
  const MeanAndError mean = mean_and_error(values);
  const auto number = [format](double x) {
    std::array<char, 64> text{};
    std::snprintf(text.data(), text.size(), format, x);
    return std::string(text.data());
  };
  return values.size() == 1 ? number(mean.mean)
                            : number(mean.mean) + " ±" + number(mean.standard_error);
}

TaskFacts facts_of(const DomainData& data, const ProgramOptions& options) {
  const auto pixels = static_cast<long long>(options.train.image_pixels());
  const auto d_ff = static_cast<long long>(options.train.d_ff);
  const std::string experts = d_ff > 0 ? format_text("experts %lld -> %lld -> 10", pixels, d_ff)
                                       : format_text("linear experts %lld -> 10", pixels);
  return {"domains  (4 transforms, " + experts + ")",
          count_text(data.train.size()) + " training, " + count_text(data.test.size()) +
              (options.validation_images > 0 ? " held out of them as test" : " test"),
          data.train.size(), [](const TrainOptions& train) { return count_parameters(train); }};
}

std::string version_line(const comm::LaunchInfo& launch, const comm::Group& world, int num_hosts) {
  return format_text("perseid %s | LibTorch %d.%d.%d | %s | %s", PERSEID_VERSION,
                     TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH,
                     comm::mpi_version().c_str(), comm::describe(launch, world, num_hosts).c_str());
}

std::string start_table(const ProgramOptions& options, const std::string& folder,
                        const TaskFacts& facts, int num_ranks, int64_t threads) {
  const TrainOptions& train = options.train;
  std::vector<Setting> settings;
  settings.push_back({"task", facts.task});
  for (const GateKind gate : options.gates) settings.push_back({"gate", gate_text(gate, train)});
  for (const GateKind gate : options.gates) {
    TrainOptions run = train;
    run.gate = gate;
    const ParameterCount count = facts.count(run);
    settings.push_back(
        {std::string("parameters ") + gate_name(gate),
         count_text(count.total) + " total, " + count_text(count.active) + " active per image"});
  }
  settings.push_back({"input of gates", train.input_norm ? "LayerNorm(x) / sqrt(D)" : "pixels"});
  settings.push_back(
      {"aux loss, z-loss", format_text("%g, %g", train.aux_loss_coeff, train.z_loss_coeff)});
  settings.push_back({"balance", format_text("%g", train.balance_coeff)});
  settings.push_back({"entropy of switches", format_text("%g, from 0 over %g of the run",
                                                         train.entropy_coeff, train.entropy_ramp)});
  settings.push_back({"capacity factor", train.capacity_factor > 0
                                             ? format_text("%g", train.capacity_factor)
                                             : std::string("0 (dropless)")});
  const std::string search = search_text(train, options.gates);
  if (!search.empty()) settings.push_back({"order of experts", search});
  const std::string sparsity = sparsity_text(train);
  if (!sparsity.empty()) settings.push_back({"sparse experts", sparsity});
  const std::string dtype = train.dtype == kernels::DType::kFloat64    ? "float64"
                            : train.dtype == kernels::DType::kBFloat16 ? "bfloat16"
                                                                       : "float32";
  settings.push_back({"dtype", dtype});
  settings.push_back({"device", device_text(train.device)});
  settings.push_back({"data", folder});
  settings.push_back({"images", facts.images});
  settings.push_back({"data seed", std::to_string(options.data_seed)});
  std::string seeds;
  for (const uint64_t seed : options.seeds) {
    if (!seeds.empty()) seeds += ' ';
    seeds += std::to_string(seed);
  }
  settings.push_back({"seeds", seeds});
  settings.push_back(
      {"optimizer", format_text("Adam, lr %g (gate %g), down to 0 over the last %g", train.lr,
                                train.lr * train.gate_lr_factor, train.lr_decay)});
  settings.push_back({"global batch", count_text(train.global_batch_size) + " images"});
  const int64_t steps = num_steps(train, facts.num_images);
  settings.push_back(
      {"steps", count_text(steps) +
                    (train.train_iters > 0
                         ? std::string("  (--train-iters)")
                         : format_text("  (%lld epoch%s)", static_cast<long long>(train.epochs),
                                       train.epochs == 1 ? "" : "s"))});
  const int64_t ep_size = train.ep_size > 0 ? train.ep_size : num_ranks;
  settings.push_back(
      {"ranks", format_text("%d, experts over %lld", num_ranks, static_cast<long long>(ep_size)) +
                    (train.idle_ranks > 0 ? format_text(", %lld without images",
                                                        static_cast<long long>(train.idle_ranks))
                                          : "")});
  settings.push_back({"threads", format_text("%lld a rank", static_cast<long long>(threads))});
  return settings_table(settings);
}

std::string step_line(const StepReport& report) {
  const std::string total = std::to_string(report.num_steps);
  std::string line =
      format_text("step %*lld/%s | loss %.4f", static_cast<int>(total.size()),
                  static_cast<long long>(report.step), total.c_str(), report.cross_entropy);
  for (const NamedValue& loss : report.gate_losses) {
    const std::string name = loss.name.substr(0, loss.name.find("_loss"));  // "aux_loss": aux
    line += format_text(" | %s %.3f", name.c_str(), loss.value);
  }
  line += format_text(" | experts/token %.2f | maxvio %.2f | dead %lld/%zu",
                      report.experts_per_token, report.max_vio,
                      static_cast<long long>(num_dead_experts(report.tokens_per_expert)),
                      report.tokens_per_expert.size());
  if (report.num_dropped > 0) {
    line += format_text(" | drop %lld", static_cast<long long>(report.num_dropped));
  }
  return line + search_part(report.search) +
         format_text(" | %.2f ms | %s tok/s", report.step_ms,
                     short_count(report.tokens_per_second).c_str());
}

std::string result_line(const FinishedRun& run) {
  const RunResult& result = run.result;
  return format_text(
             "test %s seed %llu | accuracy %.4f | loss %.4f | experts/token %.2f | maxvio %.2f"
             " | NMI %.2f | %.1f s\nload %s",
             gate_name(run.gate), static_cast<unsigned long long>(run.seed), result.accuracy,
             result.cross_entropy, result.experts_per_token, result.max_vio, result.domain_nmi,
             result.seconds, load_bars(result.tokens_per_expert).c_str()) +
         sparsity_line(result.sparsity) + search_lines(result.search);
}

std::string final_table(const std::vector<FinishedRun>& runs) {
  struct Column {
    const char* name;
    const char* format;
    std::function<double(const RunResult&)> value;
  };
  const std::vector<Column> columns = {
      {"accuracy", "%.4f", [](const RunResult& r) { return r.accuracy; }},
      {"cross-entropy", "%.4f", [](const RunResult& r) { return r.cross_entropy; }},
      {"experts, training", "%.2f", [](const RunResult& r) { return final_experts(r); }},
      {"experts, test", "%.2f", [](const RunResult& r) { return r.experts_per_token; }},
      {"max_vio", "%.2f", [](const RunResult& r) { return r.max_vio; }},
      {"NMI", "%.2f", [](const RunResult& r) { return r.domain_nmi; }},
      {"s/epoch", "%.2f", [](const RunResult& r) { return r.seconds_per_epoch; }},
      {"rows/image", "%.2f", [](const RunResult& r) { return r.rows_per_token; }}};
  const bool has_search = std::any_of(
      runs.begin(), runs.end(), [](const FinishedRun& run) { return run.result.search.is_used(); });
  std::vector<std::string> header{"gate"};
  for (const Column& column : columns) header.emplace_back(column.name);
  const bool is_sparse = std::any_of(runs.begin(), runs.end(), [](const FinishedRun& run) {
    return run.result.sparsity.is_used();
  });
  if (is_sparse) add_sparsity_header(header);
  if (has_search) add_search_header(header);
  std::vector<std::vector<std::string>> rows;
  for (auto first = runs.begin(); first != runs.end();) {
    const auto last = std::find_if(first, runs.end(),
                                   [&](const FinishedRun& run) { return run.gate != first->gate; });
    const std::vector<FinishedRun> same(first, last);
    rows.push_back({gate_name(first->gate)});
    for (const Column& column : columns) {
      rows.back().push_back(mean_of_runs(same, column.format, column.value));
    }
    if (is_sparse) {
      std::vector<SparsityResult> results;
      for (const FinishedRun& run : same) results.push_back(run.result.sparsity);
      add_sparsity_cells(results, rows.back());
    }
    if (has_search) {
      std::vector<SearchResult> searches;
      for (const FinishedRun& run : same) searches.push_back(run.result.search);
      add_search_cells(searches, rows.back());
    }
    first = last;
  }
  return results_table(header, rows);
}

JsonObject result_json(const FinishedRun& run, const TrainOptions& options, int num_ranks) {
  const RunResult& result = run.result;
  JsonObject object{{"gate", std::string(gate_name(run.gate))},
                    {"seed", static_cast<int64_t>(run.seed)},
                    {"ranks", int64_t{num_ranks}},
                    {"num_experts", options.num_experts},
                    {"top_k", options.top_k},
                    {"d_ff", options.d_ff},
                    {"parameters", count_parameters(options).total},
                    {"active_parameters", count_parameters(options).active},
                    {"aux_loss_coeff", options.aux_loss_coeff},
                    {"balance_coeff", options.balance_coeff},
                    {"gamma", options.gamma},
                    {"entropy_coeff", options.entropy_coeff},
                    {"entropy_ramp", options.entropy_ramp},
                    {"hard_eval", int64_t{options.hard_eval}},
                    {"lr", options.lr},
                    {"gate_lr_factor", options.gate_lr_factor},
                    {"lr_decay", options.lr_decay},
                    {"steps", result.num_steps},
                    {"accuracy", result.accuracy},
                    {"cross_entropy", result.cross_entropy},
                    {"training_experts_per_token", final_experts(result)},
                    {"experts_per_token", result.experts_per_token},
                    {"max_vio", result.max_vio},
                    {"domain_nmi", result.domain_nmi},
                    {"rows_per_token", result.rows_per_token},
                    {"tokens_per_expert", result.tokens_per_expert},
                    {"seconds", result.seconds},
                    {"seconds_per_epoch", result.seconds_per_epoch},
                    {"domains", std::vector<std::string>(kDomainNames.begin(), kDomainNames.end())},
                    {"domain_expert", shortened(result.domain_expert)}};
  add_sparsity(object, options, result.sparsity);
  add_search(object, options, result.search);
  add_curve(object, result.curve);
  if (result.trees.num_trees > 0) {
    object.push_back({"tree_reached", result.trees.reached});
    object.push_back({"tree_left", result.trees.left});
    object.push_back({"tree_right", result.trees.right});
  }
  return object;
}

void write_dump(const std::string& path, GateKind gate, int num_ranks,
                const std::vector<double>& losses, const std::vector<WeightDump>& weights) {
  JsonObject object{
      {"gate", std::string(gate_name(gate))}, {"ranks", int64_t{num_ranks}}, {"losses", losses}};
  for (const WeightDump& weight : weights) {
    object.push_back({weight.name + ".shape", weight.shape});
    object.push_back({weight.name, weight.values});
  }
  JsonLines(path).write(object);
}

}  // namespace perseid::examples
