#include <mpi.h>

#include <string_view>
#include <vector>

#include "examples/bench/plain_alltoall.h"
#include "kernels/error.h"

namespace perseid::bench {

bool PlainAllToAll::available(const comm::Group& world) {
  return std::string_view(world.backend_name()) == "mpi";
}

void PlainAllToAll::operator()(const float* send, float* recv, int64_t floats_per_peer,
                               int num_ranks) const {
  const auto size = static_cast<size_t>(num_ranks);
  const std::vector<int> counts(size, static_cast<int>(floats_per_peer));
  std::vector<int> places(size);
  for (size_t p = 0; p < size; ++p) places[p] = static_cast<int>(p) * counts[p];
  const int status = MPI_Alltoallv(send, counts.data(), places.data(), MPI_FLOAT, recv,
                                   counts.data(), places.data(), MPI_FLOAT, MPI_COMM_WORLD);
  PERSEID_INVARIANT(status == MPI_SUCCESS);
}

}  // namespace perseid::bench
