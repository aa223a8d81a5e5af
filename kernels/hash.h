#pragma once
#include <cstdint>

#include "kernels/random.h"
#include "kernels/stream.h"

namespace perseid::kernels {

/// Bucket of a key: high 64 bits of splitmix64(key ^ seed * 0x9E3779B97F4A7C15) * num_buckets.
/// Equal on every platform. Keys 0..3, seed 0, 8 buckets: 7 4 4 0.
constexpr int32_t hash_bucket(int64_t key, uint64_t seed, int64_t num_buckets) {
  const uint64_t h = splitmix64(static_cast<uint64_t>(key) ^ (seed * 0x9E3779B97F4A7C15ull));
  return static_cast<int32_t>(multiply_high(h, static_cast<uint64_t>(num_buckets)));
}

/// buckets[i] = hash_bucket(keys[i], seed, num_buckets).
void hash_buckets(const int64_t* keys, int64_t count, uint64_t seed, int64_t num_buckets,
                  int32_t* buckets, Stream stream = {});

}  // namespace perseid::kernels
