// NCCL ranks that mpirun has started. With fewer GPUs than ranks they share one, by distinct
// NCCL_HOSTID: slow, but it works for small rows.
#include <mpi.h>

#include <cstdlib>
#include <string>

#include "comm/nccl_group.h"
#include "kernels/device_memory.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

// One communicator for all tests: each costs seconds where ranks share a GPU.
const comm::Group& world() {
  static const comm::Group* group = nullptr;  // never destroyed: CUDA and MPI may have ended before
  if (group != nullptr) return *group;
  const comm::Group control = comm::mpi_group();
  if (control.size() > kernels::device_count()) {
    ::setenv("NCCL_HOSTID", ("perseid-rank-" + std::to_string(control.rank())).c_str(), 1);
    ::setenv("NCCL_SOCKET_IFNAME", "lo", 1);
    ::setenv("NCCL_IB_DISABLE", "1", 1);
  }
  kernels::set_device(control.rank() % kernels::device_count());
  control.set_timeout_ms(60000);
  group = new comm::Group(comm::nccl_group(control));
  return *group;
}

}  // namespace

void run_ranks(const RankBody& body) {
  try {
    body(world());
  } catch (const std::exception& error) {
    ADD_FAILURE() << "body threw: " << error.what();
  }
}

void meet() { MPI_Barrier(MPI_COMM_WORLD); }

}  // namespace perseid::testing
