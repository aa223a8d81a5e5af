#pragma once
#include <cstdint>
#include <iosfwd>
#include <string>

namespace perseid::bench {

struct SparseBenchOptions {
  int64_t num_rows = 256;  ///< of the training step
  int64_t width = 1024;    ///< in and out of its layer
  int threads = 1;
  int64_t repeats = 15;  ///< rounds; in each one everything runs once
  uint64_t seed = 0;
  std::string json;  ///< file; empty: none
};

/// What sparse weights save on the CPU, in float32, each beside its dense twin in the same rounds:
/// a training step of a layer and the bytes it holds, updates of masks, products of a weight of
/// density 0.03 in rows of active elements, products of block-sparse experts. Results were compared
/// with the dense ones: InternalError if they differ.
void run_sparse_bench(const SparseBenchOptions& options, std::ostream& out);

}  // namespace perseid::bench
