// counting_sort: histogram of each fixed block of keys, prefix over (bucket, block), then each
// block writes its keys to its own rows. Reads the keys twice, writes num_keys * 4 B. Blocks depend
// on the sizes alone, so the result does not depend on the number of threads.
#include "kernels/sort.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kKeysPerBlock = int64_t{1} << 14;
constexpr int64_t kBlocksMax = 64;

void check(const int32_t* keys, int64_t num_keys, int64_t num_buckets, const int64_t* offsets) {
  constexpr const char* kOperation = "counting_sort";
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require_count(kOperation, "num_keys", num_keys);
  require(num_keys <= kMax, kOperation, "num_keys", num_keys, "exceeds " + to_text(kMax));
  require_count(kOperation, "num_buckets", num_buckets);
  require(num_buckets <= kMax, kOperation, "num_buckets", num_buckets, "exceeds " + to_text(kMax));
  require_buffer(kOperation, "keys", keys, num_keys);
  require_buffer(kOperation, "offsets", offsets, num_buckets + 1);
}

bool is_in_range(int32_t key, int64_t num_buckets) { return key >= 0 && key < num_buckets; }

}  // namespace

void counting_sort(const int32_t* keys, int64_t num_keys, int64_t num_buckets, int64_t* offsets,
                   int32_t* order, Stream stream) {
  check(keys, num_keys, num_buckets, offsets);
  if (stream.device == Device::kCuda) {
    return cuda::counting_sort(keys, num_keys, num_buckets, offsets, order, stream);
  }
  // No more blocks than keep the histograms smaller than the keys.
  const int64_t num_blocks =
      std::clamp<int64_t>(num_keys / std::max(kKeysPerBlock, num_buckets), 1, kBlocksMax);
  const int64_t block_keys = ceil_div(num_keys, num_blocks);
  const auto first_key = [&](int64_t block) { return std::min(block * block_keys, num_keys); };

  // next_row[block, bucket]: first the count, then the next free row. The slot after the last
  // bucket takes the keys that are out of range, so counting needs no branch.
  const int64_t stride = num_buckets + 1;
  std::vector<int32_t> next_row(static_cast<size_t>(num_blocks * stride), 0);
  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int32_t* const count = next_row.data() + block * stride;
      for (int64_t i = first_key(block); i < first_key(block + 1); ++i) {
        const auto key = static_cast<uint32_t>(keys[i]);  // negative keys become large ones
        ++count[std::min<int64_t>(key, num_buckets)];
      }
    }
  });

  int64_t row = 0;
  for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
    offsets[bucket] = row;
    for (int64_t block = 0; block < num_blocks; ++block) {
      int32_t& slot = next_row[static_cast<size_t>(block * stride + bucket)];
      const int32_t count = slot;
      slot = static_cast<int32_t>(row);
      row += count;
    }
  }
  offsets[num_buckets] = row;
  if (order == nullptr) return;

  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int32_t* const next = next_row.data() + block * stride;
      for (int64_t i = first_key(block); i < first_key(block + 1); ++i) {
        if (is_in_range(keys[i], num_buckets)) order[next[keys[i]]++] = static_cast<int32_t>(i);
      }
    }
  });
}

void counting_sort_reference(const int32_t* keys, int64_t num_keys, int64_t num_buckets,
                             int64_t* offsets, int32_t* order) {
  check(keys, num_keys, num_buckets, offsets);
  int64_t row = 0;
  for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
    offsets[bucket] = row;
    for (int64_t i = 0; i < num_keys; ++i) {
      if (keys[i] != bucket) continue;
      if (order != nullptr) order[row] = static_cast<int32_t>(i);
      ++row;
    }
  }
  offsets[num_buckets] = row;
}

}  // namespace perseid::kernels
