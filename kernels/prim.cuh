#pragma once
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cuda/functional>
#include <cuda/std/functional>

// CUB's collectives under a name that tests/cuda_emulator can give to its own.

namespace perseid::kernels::prim {

using ::cub::BlockReduce;
using ::cub::BlockScan;
using ::cub::WarpReduce;
using Plus = ::cuda::std::plus<>;
using Maximum = ::cuda::maximum<>;
using Minimum = ::cuda::minimum<>;

}  // namespace perseid::kernels::prim
