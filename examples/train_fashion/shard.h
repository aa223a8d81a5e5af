#pragma once
#include <algorithm>
#include <cstdint>

#include "comm/group.h"

namespace perseid::examples {

/// The images of this rank in a batch: contiguous, in rank order, none on the last `idle_ranks`.
struct Shard {
  int64_t begin = 0;
  int64_t size = 0;
};
inline Shard shard_of(int64_t batch_size, const comm::Group& world, int64_t idle_ranks) {
  const int64_t working = world.size() - idle_ranks;
  const int64_t rank = std::min<int64_t>(world.rank(), working);
  const int64_t begin = rank * batch_size / working;
  const int64_t end = std::min(rank + 1, working) * batch_size / working;
  return Shard{begin, end - begin};
}

}  // namespace perseid::examples
