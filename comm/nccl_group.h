#pragma once
#include <string>

#include "comm/group.h"

namespace perseid::comm {

/// Is NCCL in this build?
bool has_nccl();
/// "NCCL 2.28.9", or "none" in a build without it.
std::string nccl_version();
/// Throws ConfigError in a build without NCCL, and where this process sees no GPU.
void require_nccl();

/// Ranks with a GPU each, the current device of the calling thread. Collective over `control`, an
/// mpi_group, tcp_group or self_group: headers, verdicts and payload in host memory go over it
/// (over a split of it); payload in device memory goes by NCCL and is queued on the caller's
/// stream. Sums of device memory are NCCL's: the same bits on all ranks, but not those of rank
/// order. All ranks throw ConfigError if one of them has no GPU, if two share one (unless
/// NCCL_HOSTID sets them apart), if NCCL's versions differ or have a known fault (2.28.3
/// to 2.28.8), or if NCCL cannot connect them. The last copy finalises the communicator, which all
/// ranks should do at one point of the program; it waits for at most 5 s. A communicator that has
/// failed is never destroyed: that might hang. Calls of several groups on one device come from one
/// thread, in one order on all ranks.
Group nccl_group(const Group& control);

}  // namespace perseid::comm
