#pragma once
#include <string>

#include "comm/session.h"
#include "examples/bench/exchange_bench.h"
#include "examples/bench/gates_bench.h"
#include "examples/bench/kernel_bench.h"
#include "examples/bench/layer_bench.h"
#include "examples/bench/limits_bench.h"
#include "examples/bench/sparse_bench.h"
#include "examples/bench/swap_bench.h"

namespace perseid::bench {

/// What the command line asks for.
struct Program {
  /// layer, gates, router, permute, combine, search, swap, sparse, limits or exchange
  std::string command;
  std::string device = "cpu";
  LayerBenchOptions layer;
  GatesBenchOptions gates;    ///< of swap, too
  KernelBenchOptions kernel;  ///< of router, permute, combine and search
  SparseBenchOptions sparse;
  LimitsBenchOptions limits;
  ExchangeBenchOptions exchange;
  comm::SessionOptions session;  ///< of exchange
};

/// Either a program, or a text and the exit status with which it ends.
struct CommandLine {
  Program program;
  bool run = false;
  int exit_code = 0;  ///< 0 for --help, 64 for a wrong flag or value
  std::string text;
};
CommandLine parse_command_line(int argc, const char* const* argv);

}  // namespace perseid::bench
