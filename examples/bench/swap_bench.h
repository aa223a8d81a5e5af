#pragma once
#include <iosfwd>

#include "examples/bench/gates_bench.h"

namespace perseid::bench {

/// Times a search over the order of experts on one held batch of as many tokens as the case has, a
/// round of 8 candidates with its dense pass, beside a training step (forward and backward, all
/// gradients) of the same layer on these tokens, for each gate; and prints the ratios.
void run_swap_bench(const GatesBenchOptions& options, std::ostream& out);

}  // namespace perseid::bench
