#include "examples/train_fashion/program.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <ostream>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "comm/collectives.h"
#include "comm/launcher.h"
#include "comm/session.h"
#include "examples/common/console.h"
#include "examples/common/device.h"
#include "examples/common/json_lines.h"
#include "examples/train_fashion/multi_report.h"
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

/// What a run prints to, on rank 0, and writes.
struct Output {
  bool speaks = false;
  Progress& progress;
  JsonLines& json;
};

/// Every gate and seed of the options, one after the other.
/// @param run     (options of this run) -> finished run; collective
/// @param report  (finished run, options of this run): called on rank 0, may throw
template <typename Run, typename Report>
auto run_all(const ProgramOptions& options, const comm::Group& world, const Output& output,
             Run&& run, Report&& report) {
  std::vector<std::invoke_result_t<Run, const TrainOptions&>> runs;
  for (const GateKind gate : options.gates) {
    for (const uint64_t seed : options.seeds) {
      TrainOptions train = options.train;
      train.gate = gate;
      train.seed = seed;
      if (output.speaks) {
        output.progress.print(std::string("train ") + gate_name(gate) + " seed " +
                              std::to_string(seed));
      }
      runs.push_back(run(train));
      agreed(world, "write_results", [&] {
        if (output.speaks) report(runs.back(), train);
      });
      runs.back().result.weights.clear();
    }
  }
  return runs;
}

OnReport step_lines(const Output& output) {
  return [&output](const StepReport& report) {
    if (output.speaks) output.progress.update(step_line(report));
  };
}

/// Returns the table at the end.
std::string run_domains(const ProgramOptions& options, const DomainData& data,
                        const comm::Group& world, const Output& output) {
  return final_table(run_all(
      options, world, output,
      [&](const TrainOptions& train) {
        return FinishedRun{train.gate, train.seed,
                           train_domains(world, data, train, step_lines(output))};
      },
      [&](const FinishedRun& run, const TrainOptions& train) {
        output.progress.print(result_line(run));
        output.json.write(result_json(run, train, world.size()));
        if (options.dump.empty()) return;
        write_dump(options.dump, run.gate, world.size(), run.result.losses, run.result.weights);
      }));
}

std::string run_multi(const ProgramOptions& options, const MultiData& data,
                      const comm::Group& world, const Output& output) {
  return final_table(run_all(
      options, world, output,
      [&](const TrainOptions& train) {
        return FinishedMulti{train.gate, train.seed,
                             train_multi(world, data, {train, options.experts}, step_lines(output),
                                         [&](const EpochScore& epoch) {
                                           if (output.speaks)
                                             output.progress.print(epoch_line(epoch));
                                         })};
      },
      [&](const FinishedMulti& run, const TrainOptions& train) {
        output.progress.print(result_line(run));
        output.json.write(result_json(run, {train, options.experts}, world.size()));
        if (options.dump.empty()) return;
        write_dump(options.dump, run.gate, world.size(), run.result.losses, run.result.weights);
      }));
}

}  // namespace

template <typename Data, typename Make>
const Data& SharedImages::load(std::optional<Data>& data, const ProgramOptions& options,
                               const comm::Group& world, Make&& make) {
  agreed(world, "load_data", [&] {
    const std::lock_guard lock(mutex_);
    if (data) return;
    const DataSet set = fashion_mnist_set();
    folder_ = find_data_folder(set, data_places(set, options.data, comm::process_environment()));
    data = make(load_fashion_mnist(folder_));
  });
  return *data;
}

const DomainData& SharedImages::domains(const ProgramOptions& options, const comm::Group& world) {
  return load(domains_, options, world, [&](const FashionMnist& images) {
    DomainData data = make_domains(images, options.data_seed);
    return options.validation_images > 0 ? validation_split(data, options.validation_images)
                                         : std::move(data);
  });
}

const MultiData& SharedImages::multi(const ProgramOptions& options, const comm::Group& world) {
  return load(multi_, options, world, [&](FashionMnist images) {
    return make_multi(std::move(images), options.protocol, options.data_seed);
  });
}

void run_program(const ProgramOptions& asked, SharedImages& images, const comm::Group& world,
                 std::ostream& out) {
  const bool speaks = world.rank() == 0;
  ProgramOptions options = asked;
  agreed(world, "choose_device", [&] {
    options.train.device = find_device(asked.device, "train_fashion");
    use_device(options.train.device, world, asked.session.launcher);
  });
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

  const bool is_multi = options.task == Task::kMulti;
  const TaskFacts facts = is_multi ? facts_of(images.multi(options, world), options)
                                   : facts_of(images.domains(options, world), options);
  std::unique_ptr<JsonLines> json;
  agreed(world, "open_files",
         [&] { json = std::make_unique<JsonLines>(speaks ? options.json : std::string()); });
  Progress progress(out, speaks && !options.plain ? progress_columns() : 0);
  if (speaks) out << start_table(options, images.folder(), facts, world.size(), threads);

  const Output output{speaks, progress, *json};
  const std::string table =
      is_multi ? run_multi(options, images.multi(options, world), world, output)
               : run_domains(options, images.domains(options, world), world, output);
  if (speaks) out << table << std::flush;
}

}  // namespace perseid::examples
