#pragma once
#include <CLI/CLI.hpp>
#include <string>

#include "examples/train_fashion/options.h"

// The flags of the program, by group.

namespace perseid::examples {

/// Values that are words, until they are looked up.
struct Words {
  std::string task = "domains";
  std::string protocol = "small";
  std::string experts;
  std::string gate = "topk";
  std::string input_norm;
  std::string dtype = "float32";
  std::string perm_search = "none";
  std::string perm_scope = "shared";
  std::string dst = "none";
  std::string dst_nm = "1:8";
};

void add_task_flags(CLI::App& app, Words& words);
void add_model_flags(CLI::App& app, ProgramOptions& options, Words& words);
void add_search_flags(CLI::App& app, ProgramOptions& options, Words& words);
void add_sparsity_flags(CLI::App& app, ProgramOptions& options, Words& words);
void add_training_flags(CLI::App& app, ProgramOptions& options);
void add_parallel_flags(CLI::App& app, ProgramOptions& options);
void add_output_flags(CLI::App& app, ProgramOptions& options);

/// Task and protocol, on which the defaults of other flags depend.
void look_up_task(const Words& words, ProgramOptions& options);
/// The other words to values; throws CLI::ValidationError for a flag of the other task, for one of
/// a search over orders without it, and for sparse experts that there are not.
void look_up(const Words& words, const CLI::App& app, ProgramOptions& options);

}  // namespace perseid::examples
