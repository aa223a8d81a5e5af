#include "examples/train_fashion/program.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <ostream>
#include <thread>

#include "comm/collectives.h"
#include "comm/launcher.h"
#include "comm/session.h"
#include "examples/common/console.h"
#include "examples/common/json_lines.h"
#include "examples/train_fashion/report.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

/// Runs `body` on each rank, and lets all ranks throw if one did: the others would wait for it in
/// the next collective.
template <typename Body>
void agreed(const comm::Group& world, const char* operation, Body&& body) {
  std::exception_ptr failure;
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  int64_t first_failed = failure ? world.rank() : world.size();
  comm::all_reduce(&first_failed, 1, comm::ReduceOp::kMin, world, {operation});
  if (failure) std::rethrow_exception(failure);
  if (first_failed < world.size()) {
    throw IoError(ErrorDetail{operation, "rank", std::to_string(first_failed),
                              "failed; its own message says why", world.rank(),
                              static_cast<int>(first_failed)});
  }
}

}  // namespace

const DomainData& SharedImages::load(const ProgramOptions& options, const comm::Group& world) {
  agreed(world, "load_data", [&] {
    const std::lock_guard lock(mutex_);
    if (images_) return;
    const DataSet set = fashion_mnist_set();
    folder_ = find_data_folder(set, data_places(set, options.data, comm::process_environment()));
    images_ = make_domains(load_fashion_mnist(folder_), options.data_seed);
    if (options.validation_images > 0) {
      images_ = validation_split(*images_, options.validation_images);
    }
  });
  return *images_;
}

void run_program(const ProgramOptions& options, SharedImages& images, const comm::Group& world,
                 std::ostream& out) {
  const bool speaks = world.rank() == 0;
  world.set_config_hash(config_hash(options));
  const int num_hosts = comm::count_hosts(world);
  if (speaks) {
    out << version_line(
               comm::detect_launcher(comm::process_environment(), options.session.launcher), world,
               num_hosts)
        << std::endl;
  }
  const int64_t cores = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
  const int64_t ranks_per_host = (world.size() + num_hosts - 1) / num_hosts;
  const int64_t threads =
      options.threads > 0 ? options.threads : std::max<int64_t>(cores / ranks_per_host, 1);
  at::set_num_threads(static_cast<int>(threads));

  const DomainData& data = images.load(options, world);
  std::unique_ptr<JsonLines> json;
  agreed(world, "open_files",
         [&] { json = std::make_unique<JsonLines>(speaks ? options.json : std::string()); });
  Progress progress(out, speaks && !options.plain ? progress_columns() : 0);
  if (speaks) out << start_table(options, images.folder(), data, world.size(), threads);

  std::vector<FinishedRun> runs;
  for (const GateKind gate : options.gates) {
    for (const uint64_t seed : options.seeds) {
      TrainOptions train = options.train;
      train.gate = gate;
      train.seed = seed;
      if (speaks) {
        progress.print(std::string("train ") + gate_name(gate) + " seed " + std::to_string(seed));
      }
      FinishedRun run{gate, seed, train_domains(world, data, train, [&](const StepReport& report) {
                        if (speaks) progress.update(step_line(report));
                      })};
      agreed(world, "write_results", [&] {
        if (!speaks) return;
        progress.print(result_line(run));
        json->write(result_json(run, train, world.size()));
        if (!options.dump.empty()) write_dump(options.dump, run, world.size());
      });
      run.result.weights.clear();
      runs.push_back(std::move(run));
    }
  }
  if (speaks) out << final_table(runs) << std::flush;
}

}  // namespace perseid::examples
