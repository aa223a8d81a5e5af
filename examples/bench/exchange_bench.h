#pragma once
#include <cstdint>
#include <iosfwd>
#include <string>

#include "comm/group.h"
#include "kernels/stream.h"

namespace perseid::bench {

/// Sizes are bytes that a rank sends to each peer; 4 at least, rounded down to whole floats.
struct ExchangeBenchOptions {
  kernels::Device device = kernels::Device::kCpu;  ///< of the rows; a GPU: the current one
  int64_t min_bytes = 8;
  int64_t max_bytes = int64_t{4} << 20;
  int64_t step_factor = 2;
  int64_t iterations = 20;  ///< exchanges in one timing; fewer for sizes above 1 MiB
  int64_t warmup_rounds = 2;
  int64_t repeats = 11;  ///< timings of each contender, taken in turns
  bool check = true;     ///< compare what arrived with what was sent
  std::string json;      ///< file, written by rank 0; empty: none
};

/// Collective. comm::exchange_rows beside plain MPI_Alltoallv of the same bytes, which is for rows
/// in host memory. Rank 0 prints.
/// Throws InternalError if an element arrives wrong.
void run_exchange_bench(const ExchangeBenchOptions& options, const comm::Group& world,
                        std::ostream& out);

}  // namespace perseid::bench
