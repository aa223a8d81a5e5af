#pragma once
#include <functional>

#include "comm/group.h"
#include "comm/launcher.h"

namespace perseid::comm {

/// Whether body gets an nccl_group over the group of the processes.
enum class UseNccl {
  kNo,
  kIfOneGpuEach,  ///< if there are several ranks and each has a GPU of its own
  kYes
};

/// run_session with processes that MPI has started. Returns the exit status.
int run_mpi(UseNccl use, const LaunchInfo& launch, const std::function<void(const Group&)>& body);

/// run_session with processes that meet at tcp_address(launch).
int run_tcp(UseNccl use, const LaunchInfo& launch, const std::function<void(const Group&)>& body);

}  // namespace perseid::comm
