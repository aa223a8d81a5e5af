#include "moe/parallel_groups.h"

#include <vector>

#include "comm/collectives.h"
#include "kernels/error.h"
#include "moe/ranks_agree.h"

namespace perseid {
namespace {
constexpr const char* kMakeParallelGroups = "make_parallel_groups";
}  // namespace

ParallelGroups make_parallel_groups(const comm::Group& world, int64_t ep_size) {
  // Compared before it is checked: a rank that throws alone leaves the others waiting.
  std::vector<int64_t> sizes(static_cast<size_t>(world.size()));
  comm::all_gather(&ep_size, sizeof(ep_size), sizes.data(), world,
                   {.operation = kMakeParallelGroups});
  require_same_on_ranks(sizes, "ep_size", world.rank(), {.operation = kMakeParallelGroups});

  const int64_t size = ep_size == 0 ? world.size() : ep_size;
  require(size > 0 && world.size() % size == 0, kMakeParallelGroups, "ep_size", ep_size,
          "does not divide world size " + to_text(world.size()) +
              "; choose a divisor, or 0 for all ranks");
  const int group = static_cast<int>(world.rank() / size);
  const int place = static_cast<int>(world.rank() % size);
  ParallelGroups groups;
  groups.world = world;
  groups.expert_parallel = world.split(group, place);
  groups.expert_replicas = world.split(place, group);
  return groups;
}

}  // namespace perseid
