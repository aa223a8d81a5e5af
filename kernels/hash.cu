// hash_buckets: one thread a key. Reads count * 8 B, writes count * 4 B. Integers only: the same
// buckets as on the CPU.
#include "kernels/cuda_launchers.h"
#include "kernels/launch.cuh"

namespace perseid::kernels {
namespace {

constexpr int kThreads = 256;

/// Registers: 32.
__global__ void __launch_bounds__(kThreads)
    hash_kernel(const int64_t* __restrict__ keys, int64_t count, uint64_t seed, int64_t num_buckets,
                int32_t* __restrict__ buckets) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) buckets[i] = hash_bucket(keys[i], seed, num_buckets);
}

}  // namespace

void cuda::hash_buckets(const int64_t* keys, int64_t count, uint64_t seed, int64_t num_buckets,
                        int32_t* buckets, const Stream& stream) {
  launch("hash_buckets", &hash_kernel, ceil_div(count, kThreads), kThreads, stream, keys, count,
         seed, num_buckets, buckets);
}

}  // namespace perseid::kernels
