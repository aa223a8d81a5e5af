#include <mpi.h>

#include "ranks.h"

namespace perseid::testing {

void run_ranks(const RankBody& body) {
  const comm::Group group = comm::mpi_group();
  group.set_timeout_ms(20000);
  try {
    body(group);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "body threw: " << error.what();
  }
}

void meet() { MPI_Barrier(MPI_COMM_WORLD); }

}  // namespace perseid::testing
