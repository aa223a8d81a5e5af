#pragma once
#include <cstdint>
#include <iosfwd>
#include <string>

#include "examples/bench/layer_problem.h"

namespace perseid::bench {

struct GatesBenchOptions {
  LayerCase shape;  ///< its routing is not used: each gate chooses
  int threads = 1;
  int64_t repeats = 15;  ///< rounds; in each one everything runs once
  uint64_t seed = 0;
  std::string json;  ///< file; empty: none
};

/// Times the layer behind each gate, the gate alone, and the same layer and gate with every expert
/// executed for every token, and prints a table. Switches of COMET and DSelect-k are saturated, as
/// at the end of a training. Before it measures, output and gradients of the sparse layer are
/// compared with those of the layer that executes all: InternalError if they differ.
void run_gates_bench(const GatesBenchOptions& options, std::ostream& out);

}  // namespace perseid::bench
