#pragma once
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
std::string start_table(const ProgramOptions& options, const std::string& folder,
                        const DomainData& data, int num_ranks, int64_t threads);
std::string step_line(const StepReport& report);
std::string result_line(const FinishedRun& run);
/// One row a gate; with several seeds the mean and its standard error.
std::string final_table(const std::vector<FinishedRun>& runs);

JsonObject result_json(const FinishedRun& run, const TrainOptions& options, int num_ranks);
/// Losses of all steps and all weights, as one JSON object.
void write_dump(const std::string& path, const FinishedRun& run, int num_ranks);

}  // namespace perseid::examples
