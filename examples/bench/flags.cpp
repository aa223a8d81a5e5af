#include "examples/bench/flags.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <thread>

#include "examples/bench/suites.h"
#include "examples/common/validators.h"

namespace perseid::bench {
namespace {

using examples::in_range;
using examples::one_of;

constexpr int kUsageError = 64;
constexpr int64_t kManyTokens = int64_t{1} << 24;
constexpr const char* kCommands =
    "layer, gates, router, permute, combine, search, swap, sparse, limits or exchange";

/// Values from which cases are made.
struct Words {
  LayerCase shape;
  std::string dtype = "float32", routing = "balanced", suite;
};

const std::map<std::string, at::ScalarType> kDTypes = {
    {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}};
const std::map<std::string, Distribution> kDistributions = {{"balanced", Distribution::kBalanced},
                                                            {"random", Distribution::kRandom},
                                                            {"zipf", Distribution::kZipf}};

// ---- flags --------------------------------------------------------------------------------------
void add_count(CLI::App& app, const std::string& flag, int64_t& value, const std::string& help,
               int64_t low, int64_t high) {
  app.add_option(flag, value, help)->check(in_range(low, high))->capture_default_str();
}

void add_routing_sizes(CLI::App& app, LayerCase& shape) {
  add_count(app, "--tokens", shape.num_tokens, "T, tokens", 1, kManyTokens);
  add_count(app, "--num-experts", shape.num_experts, "E, in layer at most D: see README.md", 1,
            1 << 16);
  add_count(app, "--moe-router-topk,--top-k", shape.top_k, "K, experts per token, at most E", 1,
            1 << 16);
}

void add_width(CLI::App& app, LayerCase& shape) {
  add_count(app, "--hidden-size,--d-model", shape.d_model, "D, width of a token", 1, 1 << 16);
}

void add_dtype(CLI::App& app, Words& words, const std::string& help) {
  app.add_option("--dtype", words.dtype, help)
      ->check(one_of({"float32", "bfloat16", "float16"}))
      ->capture_default_str();
}

void add_layer_sizes(CLI::App& app, Words& words) {
  add_routing_sizes(app, words.shape);
  add_width(app, words.shape);
  add_count(app, "--moe-ffn-hidden-size,--d-ff", words.shape.d_ff, "F, width of one of gate and up",
            1, 1 << 20);
  add_dtype(app, words, "type of tokens and experts; the gate has float32");
}

void add_routing(CLI::App& app, Words& words) {
  app.add_option("--routing", words.routing,
                 "load of the experts: equal, uniform draws, or expert e with 1/(e+1)")
      ->check(one_of({"balanced", "random", "zipf"}))
      ->capture_default_str();
}

void add_suite(CLI::App& app, Words& words, const std::string& help) {
  app.add_option("--suite", words.suite, help + " instead of one; see README.md")
      ->check(one_of(suite_names()));
}

void add_device(CLI::App& app, std::string& device) {
  app.add_option("--device", device, "where it runs")
      ->check(one_of({"cpu", "cuda"}))
      ->capture_default_str();
}

template <typename Options>
void add_time_flags(CLI::App& app, Options& options) {
  app.add_option("--threads", options.threads, "threads of all that is timed on the CPU")
      ->check(in_range<int64_t>(1, 1024))
      ->capture_default_str();
  add_count(app, "--repeats", options.repeats, "rounds; each contender runs once in each round", 1,
            1'000'000);
  app.add_option("--json", options.json, "file, one JSON object per row of the tables");
}

template <typename Options>
void add_run_flags(CLI::App& app, Options& options) {
  add_time_flags(app, options);
  app.add_option("--seed", options.seed, "seed of values and routing")
      ->check(in_range<int64_t>(0, INT64_MAX))
      ->capture_default_str();
}

void add_size(CLI::App& app, const std::string& flag, int64_t& bytes, const std::string& help,
              int64_t low, int64_t high) {
  app.add_option(flag, bytes, help + " (K, M: 1024, 1024^2)")
      ->transform(CLI::AsSizeValue(false).description(""))
      ->check(in_range<int64_t>(low, high))
      ->capture_default_str();
}

void add_layer_flags(CLI::App& app, Program& program, Words& words) {
  add_layer_sizes(app, words);
  add_routing(app, words);
  add_suite(app, words, "the layers of a suite");
  add_count(app, "--draws", program.layer.draws,
            "routings that the rounds go through in turn; 1: each round has the same", 1, 4096);
  add_device(app, program.device);
  add_run_flags(app, program.layer);
}

void add_limits_flags(CLI::App& app, Program& program) {
  LimitsBenchOptions& options = program.limits;
  add_size(app, "--copy-bytes", options.copy_bytes,
           "bytes that the copy reads; 0: 1024M on a GPU, 256M on the CPU", 0, int64_t{1} << 36);
  add_count(app, "--matrix-size", options.matrix_size,
            "rows of the square matrices; 0: 8192 on a GPU, 1024 on the CPU", 0, 1 << 16);
  add_device(app, program.device);
  add_time_flags(app, options);
}

void add_sparse_flags(CLI::App& app, Program& program) {
  SparseBenchOptions& options = program.sparse;
  add_count(app, "--tokens", options.num_rows, "rows of the training step", 1, kManyTokens);
  add_count(app, "--hidden-size,--d-model", options.width, "in and out of the layer of the step", 1,
            1 << 16);
  add_run_flags(app, options);
}

void add_exchange_flags(CLI::App& app, Program& program) {
  ExchangeBenchOptions& options = program.exchange;
  constexpr int64_t kLow = 4, kHigh = int64_t{1} << 28;
  add_size(app, "-b,--min-bytes", options.min_bytes, "smallest size, bytes to each peer", kLow,
           kHigh);
  add_size(app, "-e,--max-bytes", options.max_bytes, "largest size, bytes to each peer", kLow,
           kHigh);
  add_count(app, "-f,--step-factor", options.step_factor, "factor between two sizes", 2, 1 << 20);
  add_count(app, "-n,--iters", options.iterations,
            "exchanges in one timing; fewer above 1 MiB, where they move 20 MiB", 1, 1'000'000);
  add_count(app, "-w,--warmup-iters", options.warmup_rounds, "timings before those that count", 0,
            1'000'000);
  add_count(app, "--repeats", options.repeats, "timings; the contenders take turns", 1, 1'000'000);
  app.add_option("-c,--check", options.check, "1: compare what arrived with what was sent")
      ->check(in_range<int64_t>(0, 1))
      ->capture_default_str();
  add_device(app, program.device);
  app.add_option("--comm", program.session.comm, "how ranks communicate; local: threads as ranks")
      ->check(one_of({"auto", "self", "local", "mpi", "tcp", "nccl"}))
      ->capture_default_str();
  app.add_option("--local-ranks", program.session.local_ranks, "ranks of --comm local")
      ->check(in_range<int64_t>(1, 256))
      ->capture_default_str();
  app.add_option("--launcher", program.session.launcher, "what started this process")
      ->check(one_of({"auto", "mpi", "slurm", "torchrun", "single"}))
      ->capture_default_str();
  app.add_option("--json", options.json, "file, one JSON object per exchange and size");
}

void add_commands(CLI::App& app, Program& program, Words& words) {
  CLI::App& layer = *app.add_subcommand(
      "layer",
      "layer forward + backward beside a dense chain of equal FLOPs, a loop over experts "
      "and at::_grouped_mm");
  CLI::App& gates = *app.add_subcommand(
      "gates",
      "each gate: its share of the layer's time, and what skipping experts of weight 0 saves");
  CLI::App& router = *app.add_subcommand(
      "router", "scores, top-k, weights and sums, forward and backward, beside LibTorch");
  CLI::App& permute =
      *app.add_subcommand("permute", "order of rows, and their gather, beside LibTorch");
  CLI::App& combine = *app.add_subcommand(
      "combine", "sums of rows over experts, and the transpose, beside LibTorch");
  CLI::App& search = *app.add_subcommand(
      "search", "the relaxed permutation of a search, forward and backward, beside LibTorch");
  CLI::App& swap = *app.add_subcommand(
      "swap", "a round of the search over the order of experts beside a training step, each gate");
  CLI::App& sparse = *app.add_subcommand(
      "sparse", "sparse weights beside dense ones: training step, mask updates, products");
  CLI::App& limits =
      *app.add_subcommand("limits", "bandwidth of a copy and speed of large matrix products");
  CLI::App& exchange = *app.add_subcommand(
      "exchange", "comm::exchange_rows beside MPI_Alltoallv, in the manner of nccl-tests");
  for (CLI::App* command :
       {&layer, &gates, &router, &permute, &combine, &search, &swap, &sparse, &limits, &exchange}) {
    command->get_formatter()->column_width(46);
  }
  add_layer_flags(layer, program, words);
  for (CLI::App* command : {&gates, &swap}) {
    add_layer_sizes(*command, words);
    add_run_flags(*command, program.gates);
  }
  for (CLI::App* command : {&router, &permute, &combine}) {
    add_routing_sizes(*command, words.shape);
    if (command != &router) {
      add_width(*command, words.shape);
      add_dtype(*command, words, "type of tokens");
      add_routing(*command, words);
    }
    add_suite(*command, words, "the shapes of a suite");
    add_device(*command, program.device);
    add_run_flags(*command, program.kernel);
  }
  add_device(search, program.device);
  add_run_flags(search, program.kernel);
  add_sparse_flags(sparse, program);
  add_limits_flags(limits, program);
  add_exchange_flags(exchange, program);
}

// ---- what depends on several flags --------------------------------------------------------------
/// CLI11 checks each flag alone.
void require_flags(bool holds, const char* flag, int64_t value, const char* relation,
                   int64_t limit) {
  if (holds) return;
  throw CLI::ValidationError(
      flag, "value " + std::to_string(value) + " " + relation + " " + std::to_string(limit));
}

LayerCase finish_shape(const Words& words) {
  LayerCase shape = words.shape;
  shape.dtype = kDTypes.at(words.dtype);
  shape.routing = kDistributions.at(words.routing);
  require_flags(shape.top_k <= shape.num_experts, "--moe-router-topk", shape.top_k,
                "exceeds --num-experts", shape.num_experts);
  return shape;
}

void finish_cases(Program& program, const Words& words) {
  const LayerCase shape = finish_shape(words);
  if (program.command == "layer" && words.suite.empty()) {
    require_flags(shape.num_experts <= shape.d_model, "--num-experts", shape.num_experts,
                  "exceeds --hidden-size, so router rows cannot be orthogonal; choose at most",
                  shape.d_model);
  }
  std::vector<LayerCase> cases = {shape};
  if (!words.suite.empty()) {
    cases = program.command == "router" ? make_router_suite(words.suite) : make_suite(words.suite);
  }
  if (program.command == "search") cases = search_cases();
  program.layer.cases = cases;
  program.gates.shape = shape;
  program.kernel.bench = program.command;
  program.kernel.cases = cases;
}

void finish_exchange(const Program& program) {
  require_flags(program.exchange.min_bytes <= program.exchange.max_bytes, "--min-bytes",
                program.exchange.min_bytes, "exceeds --max-bytes", program.exchange.max_bytes);
  require_flags(program.session.local_ranks == 1 || program.session.comm == "local",
                "--local-ranks", program.session.local_ranks, "needs --comm local; without it", 1);
}

}  // namespace

CommandLine parse_command_line(int argc, const char* const* argv) {
  CommandLine result;
  Program& program = result.program;
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  for (int* threads : {&program.layer.threads, &program.gates.threads, &program.kernel.threads,
                       &program.sparse.threads, &program.limits.threads}) {
    *threads = cores;
  }
  Words words;
  CLI::App app(
      "Times the mixture-of-experts layer, its gates, kernels and exchange beside "
      "references.",
      "perseid-bench");
  app.require_subcommand(0, 1);
  add_commands(app, program, words);
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) {
      throw CLI::ValidationError("SUBCOMMAND", std::string("is missing; choose ") + kCommands);
    }
    program.command = app.get_subcommands().front()->get_name();
    finish_cases(program, words);
    finish_exchange(program);
    result.run = true;
  } catch (const CLI::CallForHelp&) {
    result.text = app.help();
  } catch (const CLI::ParseError& error) {
    result.exit_code = kUsageError;
    result.text = std::string("[perseid-bench] ") + error.what() +
                  "\nHINT: perseid-bench layer --help lists the flags of layer; subcommands are " +
                  kCommands + "\n";
  }
  return result;
}

}  // namespace perseid::bench
