#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "comm/session.h"
#include "examples/train_fashion/multi_train.h"
#include "examples/train_fashion/train.h"

namespace perseid::examples {

enum class Task : uint8_t { kDomains, kMulti };

/// What the command line asks for.
struct ProgramOptions {
  Task task = Task::kDomains;
  std::vector<GateKind> gates;  ///< one run for each gate and seed
  std::vector<uint64_t> seeds;
  TrainOptions train;                     ///< its gate and seed are those of the run
  Protocol protocol = Protocol::kSmall;   ///< of task multi
  ExpertKind experts = ExpertKind::kMlp;  ///< of task multi
  std::string data;                       ///< folder; empty: see data_places
  uint64_t data_seed = 0;                 ///< of domains and pixel permutation, of splits and pairs
  int64_t validation_images = 0;  ///< tested on instead of the test images, see validation_split
  int64_t threads = 1;            ///< of this rank; 0: the cores of the host / its ranks
  std::string device = "auto";    ///< auto, cpu or cuda; train.device is what it comes to
  bool plain = false;             ///< no line that is written over
  std::string json;               ///< file for the results; empty: none
  std::string dump;               ///< file for losses and weights; empty: none
  comm::SessionOptions session;
};

/// Either options, or a text and the exit status with which the program ends.
struct CommandLine {
  ProgramOptions options;
  bool run = false;
  int exit_code = 0;  ///< 0 for --help, 64 for a wrong flag or value
  std::string text;
};
CommandLine parse_command_line(int argc, const char* const* argv);

/// Settings that all ranks must share, as one number: see comm::Group::set_config_hash.
uint32_t config_hash(const ProgramOptions& options);

}  // namespace perseid::examples
