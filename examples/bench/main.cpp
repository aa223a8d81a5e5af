// Measures the layer, the gates and the exchange beside what they cannot beat and what they should.
//   perseid-bench layer --suite cpu --threads 2
//   perseid-bench gates --threads 2
//   mpirun -np 2 perseid-bench exchange -b 256K -e 256K
#include <malloc.h>
#include <torch/headeronly/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <functional>
#include <iostream>
#include <map>
#include <thread>

#include "comm/collectives.h"
#include "comm/session.h"
#include "examples/bench/exchange_bench.h"
#include "examples/bench/gates_bench.h"
#include "examples/bench/layer_bench.h"
#include "examples/common/text.h"
#include "examples/common/validators.h"

namespace perseid::bench {
namespace {

using examples::format_text;
using examples::in_range;
using examples::one_of;

constexpr int kUsageError = 64;
constexpr int64_t kManyTokens = int64_t{1} << 24;

struct Program {
  LayerBenchOptions layer;
  LayerCase shape;
  std::string dtype = "float32", routing = "balanced", suite;
  GatesBenchOptions gates;
  ExchangeBenchOptions exchange;
  comm::SessionOptions session;
};

const std::map<std::string, Distribution> kDistributions = {{"balanced", Distribution::kBalanced},
                                                            {"random", Distribution::kRandom},
                                                            {"zipf", Distribution::kZipf}};

void add_count(CLI::App& app, const std::string& flag, int64_t& value, const std::string& help,
               int64_t low, int64_t high) {
  app.add_option(flag, value, help)->check(in_range(low, high))->capture_default_str();
}

void add_shape_flags(CLI::App& app, Program& program) {
  LayerCase& shape = program.shape;
  add_count(app, "--tokens", shape.num_tokens, "T, tokens", 1, kManyTokens);
  add_count(app, "--hidden-size,--d-model", shape.d_model, "D, width of a token", 1, 1 << 16);
  add_count(app, "--moe-ffn-hidden-size,--d-ff", shape.d_ff, "F, width of one of gate and up", 1,
            1 << 20);
  add_count(app, "--num-experts", shape.num_experts, "E, in layer at most D: see README.md", 1,
            1 << 16);
  add_count(app, "--moe-router-topk,--top-k", shape.top_k, "K, experts per token, at most E", 1,
            1 << 16);
  app.add_option("--dtype", program.dtype, "type of tokens and experts; the gate has float32")
      ->check(one_of({"float32", "bfloat16"}))
      ->capture_default_str();
}

template <typename Options>
void add_run_flags(CLI::App& app, Options& options) {
  app.add_option("--threads", options.threads, "threads of all that is timed")
      ->check(in_range<int64_t>(1, 1024))
      ->capture_default_str();
  add_count(app, "--repeats", options.repeats, "rounds; each contender runs once in each round", 1,
            1'000'000);
  app.add_option("--seed", options.seed, "seed of tokens and routing")
      ->check(in_range<int64_t>(0, INT64_MAX))
      ->capture_default_str();
  app.add_option("--json", options.json, "file, one JSON object per row of the tables");
}

void add_layer_flags(CLI::App& app, Program& program) {
  add_shape_flags(app, program);
  app.add_option("--routing", program.routing,
                 "load of the experts: equal, uniform draws, or expert e with 1/(e+1)")
      ->check(one_of({"balanced", "random", "zipf"}))
      ->capture_default_str();
  app.add_option("--suite", program.suite,
                 "twelve cases (three shapes, two types, balanced and zipf) instead of one")
      ->check(one_of({"cpu"}));
  add_count(app, "--draws", program.layer.draws,
            "routings that the rounds go through in turn; 1: each round has the same", 1, 4096);
  add_run_flags(app, program.layer);
}

void add_size(CLI::App& app, const std::string& flag, int64_t& bytes, const std::string& help) {
  app.add_option(flag, bytes, help + " (K, M: 1024, 1024^2)")
      ->transform(CLI::AsSizeValue(false).description(""))
      ->check(in_range<int64_t>(4, int64_t{1} << 28))
      ->capture_default_str();
}

void add_exchange_flags(CLI::App& app, Program& program) {
  ExchangeBenchOptions& options = program.exchange;
  add_size(app, "-b,--min-bytes", options.min_bytes, "smallest size, bytes to each peer");
  add_size(app, "-e,--max-bytes", options.max_bytes, "largest size, bytes to each peer");
  add_count(app, "-f,--step-factor", options.step_factor, "factor between two sizes", 2, 1 << 20);
  add_count(app, "-n,--iters", options.iterations,
            "exchanges in one timing; fewer above 1 MiB, where they move 20 MiB", 1, 1'000'000);
  add_count(app, "-w,--warmup-iters", options.warmup_rounds, "timings before those that count", 0,
            1'000'000);
  add_count(app, "--repeats", options.repeats, "timings; the contenders take turns", 1, 1'000'000);
  app.add_option("-c,--check", options.check, "1: compare what arrived with what was sent")
      ->check(in_range<int64_t>(0, 1))
      ->capture_default_str();
  app.add_option("--comm", program.session.comm, "how ranks communicate; local: threads as ranks")
      ->check(one_of({"auto", "self", "local", "mpi"}))
      ->capture_default_str();
  app.add_option("--local-ranks", program.session.local_ranks, "ranks of --comm local")
      ->check(in_range<int64_t>(1, 256))
      ->capture_default_str();
  app.add_option("--launcher", program.session.launcher, "what started this process")
      ->check(one_of({"auto", "mpi", "slurm", "torchrun", "single"}))
      ->capture_default_str();
  app.add_option("--json", options.json, "file, one JSON object per exchange and size");
}

/// What depends on two flags; CLI11 checks each flag alone.
void require_flags(bool holds, const char* flag, int64_t value, const char* relation,
                   int64_t limit) {
  if (holds) return;
  throw CLI::ValidationError(
      flag, "value " + std::to_string(value) + " " + relation + " " + std::to_string(limit));
}

void finish_shape(Program& program) {
  LayerCase& shape = program.shape;
  shape.dtype = program.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  require_flags(shape.top_k <= shape.num_experts, "--moe-router-topk", shape.top_k,
                "exceeds --num-experts", shape.num_experts);
}

void finish_layer(Program& program) {
  finish_shape(program);
  LayerCase& shape = program.shape;
  shape.routing = kDistributions.at(program.routing);
  program.layer.cases = program.suite == "cpu" ? cpu_suite() : std::vector<LayerCase>{shape};
  if (program.suite == "cpu") return;
  require_flags(shape.num_experts <= shape.d_model, "--num-experts", shape.num_experts,
                "exceeds --hidden-size, so router rows cannot be orthogonal; choose at most",
                shape.d_model);
}

void finish_exchange(const Program& program) {
  require_flags(program.exchange.min_bytes <= program.exchange.max_bytes, "--min-bytes",
                program.exchange.min_bytes, "exceeds --max-bytes", program.exchange.max_bytes);
  require_flags(program.session.local_ranks == 1 || program.session.comm == "local",
                "--local-ranks", program.session.local_ranks, "needs --comm local; without it", 1);
}

/// Keeps freed memory. By default glibc gives large blocks back to the system at each free, and the
/// next operation pays for zeroed pages again, several times per forward, in every contender.
void keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
  mallopt(M_ARENA_MAX, 1);
}

std::string version_line() {
  return format_text("perseid-bench %s | LibTorch %d.%d.%d | %s\n", PERSEID_VERSION,
                     TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH,
                     comm::mpi_version().c_str());
}

int run_alone(const std::function<void()>& body) {
  comm::SessionOptions one_process;
  one_process.comm = "self";
  return comm::run_session(one_process, [&body](const comm::Group&) {
    std::cout << version_line() << "glibc keeps freed memory (mallopt), for all contenders\n";
    body();
  });
}

int run_exchange(const Program& program) {
  return comm::run_session(program.session, [&program](const comm::Group& world) {
    if (world.rank() == 0) std::cout << version_line();
    run_exchange_bench(program.exchange, world, std::cout);
  });
}

/// Once for all ranks, not once for each; and no rank ends before rank 0 has spoken.
int end_with(int exit_code, const std::string& text) {
  comm::run_session({}, [&](const comm::Group& world) {
    if (world.rank() == 0) (exit_code == 0 ? std::cout : std::cerr) << text;
    comm::barrier(world);
  });
  return exit_code;
}

int main_of(int argc, char** argv) {
  keep_freed_memory();
  Program program;
  program.layer.threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  program.gates.threads = program.layer.threads;
  CLI::App app("Times the mixture-of-experts layer, its gates and its exchange beside references.",
               "perseid-bench");
  app.require_subcommand(0, 1);
  CLI::App& layer = *app.add_subcommand(
      "layer",
      "layer forward + backward beside a dense chain of equal FLOPs, a loop over experts "
      "and at::_grouped_mm");
  CLI::App& gates = *app.add_subcommand(
      "gates",
      "each gate: its share of the layer's time, and what skipping experts of weight 0 saves");
  CLI::App& exchange = *app.add_subcommand(
      "exchange", "comm::exchange_rows beside MPI_Alltoallv, in the manner of nccl-tests");
  for (CLI::App* command : {&layer, &gates, &exchange}) command->get_formatter()->column_width(46);
  add_layer_flags(layer, program);
  add_shape_flags(gates, program);
  add_run_flags(gates, program.gates);
  add_exchange_flags(exchange, program);
  try {
    app.parse(argc, argv);
    if (layer.parsed()) finish_layer(program);
    if (gates.parsed()) {
      finish_shape(program);
      program.gates.shape = program.shape;
    }
    if (exchange.parsed()) finish_exchange(program);
    if (app.get_subcommands().empty()) {
      throw CLI::ValidationError("SUBCOMMAND", "is missing; choose layer, gates or exchange");
    }
  } catch (const CLI::CallForHelp&) {
    return end_with(0, app.help());
  } catch (const CLI::ParseError& error) {
    return end_with(kUsageError, std::string("[perseid-bench] ") + error.what() +
                                     "\nHINT: perseid-bench layer --help, gates --help and "
                                     "exchange --help list the flags\n");
  }
  if (layer.parsed()) return run_alone([&] { run_layer_bench(program.layer, std::cout); });
  if (gates.parsed()) return run_alone([&] { run_gates_bench(program.gates, std::cout); });
  return run_exchange(program);
}

}  // namespace
}  // namespace perseid::bench

int main(int argc, char** argv) { return perseid::bench::main_of(argc, argv); }
