#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "comm/group.h"
#include "examples/common/json_lines.h"
#include "examples/train_fashion/options.h"
#include "examples/train_fashion/train.h"

namespace perseid::examples {

/// One finished run.
struct FinishedRun {
  GateKind gate = GateKind::kTopK;
  uint64_t seed = 0;
  RunResult result;
};

/// "perseid 0.1.0 | LibTorch 2.11.0 | Open MPI 4.1.4 | launcher mpirun, 2 ranks on 1 host"
std::string version_line(const comm::LaunchInfo& launch, const comm::Group& world, int num_hosts);
/// What the table at the start of a run says about its task.
struct TaskFacts {
  std::string task;
  std::string images;      ///< how many there are
  int64_t num_images = 0;  ///< for training
  std::function<ParameterCount(const TrainOptions&)> count;
};
TaskFacts facts_of(const DomainData& data, const ProgramOptions& options);
std::string start_table(const ProgramOptions& options, const std::string& folder,
                        const TaskFacts& facts, int num_ranks, int64_t threads);
std::string step_line(const StepReport& report);
std::string result_line(const FinishedRun& run);
/// One row a gate; with several seeds the mean and its standard error.
std::string final_table(const std::vector<FinishedRun>& runs);

JsonObject result_json(const FinishedRun& run, const TrainOptions& options, int num_ranks);
/// Losses of all steps and all weights, as one JSON object.
void write_dump(const std::string& path, GateKind gate, int num_ranks,
                const std::vector<double>& losses, const std::vector<WeightDump>& weights);

/// "0.8195", or of several values "0.8195 ±0.0003": mean and its standard error.
/// @param format  of one number: "%.4f"
std::string mean_text(const std::vector<double>& values, const char* format);
std::string count_text(int64_t count);  ///< "60,000"

}  // namespace perseid::examples
