#pragma once
#include <cstdint>
#include <iosfwd>
#include <string>

#include "examples/bench/layer_problem.h"

namespace perseid::bench {

struct SearchBenchOptions {
  LayerCase shape;  ///< of the held tokens and of the training step; its routing is not used
  int threads = 1;
  int64_t repeats = 7;  ///< rounds of measuring; in each one everything runs once
  uint64_t seed = 0;
  std::string json;  ///< file; empty: none
};

/// Times a search over the order of experts on one held batch, a round of 8 candidates with its
/// dense pass, beside a training step (forward and backward, all gradients) of the same layer on as
/// many tokens, for each gate; and prints a table of the ratios.
void run_search_bench(const SearchBenchOptions& options, std::ostream& out);

}  // namespace perseid::bench
