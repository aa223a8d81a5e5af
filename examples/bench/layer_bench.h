#pragma once
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "examples/bench/layer_problem.h"
#include "examples/bench/place.h"

namespace perseid::bench {

struct LayerBenchOptions {
  std::vector<LayerCase> cases;
  kernels::Device device = kernels::Device::kCpu;
  int threads = 1;
  int64_t repeats = 15;  ///< rounds; in each one every contender runs once
  int64_t draws = 1;     ///< routings that the rounds go through; 1: the same one each time
  uint64_t seed = 0;
  std::string json;  ///< file; empty: none
};

/// Measures each case and prints a table. Before it measures, all contenders' outputs and gradients
/// are compared and the load of the experts is compared with what was drawn: InternalError if they
/// differ. A case that does not fit into the memory of a GPU is named and left out.
void run_layer_bench(const LayerBenchOptions& options, std::ostream& out);

}  // namespace perseid::bench
