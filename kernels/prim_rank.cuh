#pragma once
#include <cub/block/block_radix_rank.cuh>
#include <cub/block/radix_rank_sort_operations.cuh>

// CUB's stable ranking of keys inside a block, see kernels/prim.cuh. Apart, as it takes seconds
// more to compile.

namespace perseid::kernels::prim {

using ::cub::BlockRadixRankMatchEarlyCounts;

}  // namespace perseid::kernels::prim
