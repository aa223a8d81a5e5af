#pragma once
#include <string>
#include <vector>

#include "examples/common/json_lines.h"
#include "examples/train_fashion/multi_train.h"
#include "examples/train_fashion/options.h"
#include "examples/train_fashion/report.h"

namespace perseid::examples {

/// One finished run of task multi.
struct FinishedMulti {
  GateKind gate = GateKind::kTopK;
  uint64_t seed = 0;
  MultiResult result;
};

TaskFacts facts_of(const MultiData& data, const ProgramOptions& options);
std::string epoch_line(const EpochScore& epoch);
std::string result_line(const FinishedMulti& run);
/// Two rows a gate, one for each task; with several seeds the mean and its standard error.
std::string final_table(const std::vector<FinishedMulti>& runs);
/// Test figures with one number for each task, and curves with one number for each epoch.
JsonObject result_json(const FinishedMulti& run, const MultiOptions& options, int num_ranks);

}  // namespace perseid::examples
