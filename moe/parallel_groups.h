#pragma once
#include <cstdint>

#include "comm/group.h"

namespace perseid {

/// The groups of expert parallelism x data parallelism. All ranks hold different tokens, so dense
/// parameters are summed over `world`; expert parameters are complete inside `expert_parallel` and
/// summed over `expert_replicas`, the ranks that hold the same experts.
struct ParallelGroups {
  comm::Group world;
  comm::Group expert_parallel;  ///< ep_size consecutive ranks of world
  comm::Group expert_replicas;  ///< world.size() / ep_size ranks
};

/// Collective over world; all ranks throw if they pass different sizes.
/// @param ep_size  1 .. world.size(), a divisor of it; 0: all ranks
ParallelGroups make_parallel_groups(const comm::Group& world, int64_t ep_size = 0);

}  // namespace perseid
