#pragma once
#include <cstdint>
#include <string>

#include "comm/group.h"
#include "comm/launcher.h"

namespace perseid::comm {

/// Where the ranks of a job meet.
struct TcpAddress {
  std::string host;  ///< of rank 0: a name or an address
  int port = 0;
  uint64_t job = 0;  ///< the same on all ranks of a job: keeps others out by mistake, not by intent
};

/// A pure function of launch and environment. Host: MASTER_ADDR, else the first host of Slurm's
/// node list. Port: PERSEID_PORT, else MASTER_PORT + 1 (torchrun itself listens on MASTER_PORT),
/// else one made from SLURM_JOB_ID. Throws ConfigError that names the variable to set.
TcpAddress tcp_address(const LaunchInfo& launch, const Environment& environment);

/// Ranks are processes that are connected by TCP, each with each; for CPU ranks without MPI and for
/// what NCCL ranks tell each other on the host. Rank 0 listens at the address, the others on ports
/// that the system chooses; on the loopback device only if the host is "localhost" or an address of
/// it. Data is neither encrypted nor authenticated: for private networks only.
/// Returns when all ranks have come. Throws PeerLost that names those that have not after
/// `timeout_ms`, ConfigError if the port is taken or the host has no address.
Group tcp_group(const TcpAddress& address, int rank, int size, int64_t timeout_ms = 60000);

}  // namespace perseid::comm
