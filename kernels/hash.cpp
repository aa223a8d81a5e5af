#include "kernels/hash.h"

#include <limits>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"

namespace perseid::kernels {

void hash_buckets(const int64_t* keys, int64_t count, uint64_t seed, int64_t num_buckets,
                  int32_t* buckets, Stream stream) {
  constexpr const char* kOperation = "hash_buckets";
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require_count(kOperation, "count", count);
  require(num_buckets >= 1 && num_buckets <= kMax, kOperation, "num_buckets", num_buckets,
          "is out of range; choose it in [1, " + to_text(kMax) + "]");
  require_buffer(kOperation, "keys", keys, count);
  require_buffer(kOperation, "buckets", buckets, count);
  if (stream.device == Device::kCuda) {
    return cuda::hash_buckets(keys, count, seed, num_buckets, buckets, stream);
  }
  parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) buckets[i] = hash_bucket(keys[i], seed, num_buckets);
  });
}

}  // namespace perseid::kernels
