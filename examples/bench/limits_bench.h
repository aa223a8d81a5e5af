#pragma once
#include <cstdint>
#include <iosfwd>
#include <string>

#include "examples/bench/place.h"

namespace perseid::bench {

struct LimitsBenchOptions {
  kernels::Device device = kernels::Device::kCpu;
  int64_t copy_bytes = 0;   ///< 0: 1 GiB on a GPU, 256 MiB on the CPU
  int64_t matrix_size = 0;  ///< 0: 8192 on a GPU, 1024 on the CPU
  int threads = 1;
  int64_t repeats = 15;  ///< rounds; in each one everything runs once
  std::string json;      ///< file; empty: none
};

/// Bytes read and written in a second by a copy inside the memory of the place, in GB/s: what an
/// operation that only moves data can reach. Memory to memory on a GPU, memcpy by all threads on
/// the CPU; median.
/// @param bytes  0: the default of LimitsBenchOptions
double copy_limit(const Place& place, int64_t repeats, int64_t bytes = 0);

/// Measures the copy and large products of bfloat16 and of float32 matrices, and prints a table.
void run_limits_bench(const LimitsBenchOptions& options, std::ostream& out);

}  // namespace perseid::bench
