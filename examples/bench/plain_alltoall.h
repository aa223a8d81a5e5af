#pragma once
#include <cstdint>

#include "comm/group.h"

namespace perseid::bench {

/// One MPI_Alltoallv and nothing else: the limit that an exchange is measured against.
class PlainAllToAll {
 public:
  /// False for groups that are not all of MPI_COMM_WORLD, and in builds without MPI.
  static bool available(const comm::Group& world);

  /// Block p of `send` becomes this rank's block in rank p's `recv`; all blocks have
  /// `floats_per_peer` elements. Collective.
  void operator()(const float* send, float* recv, int64_t floats_per_peer, int num_ranks) const;
};

}  // namespace perseid::bench
