// counting_sort: up to 1023 buckets in three launches, more by passes over digits of 9 bits, lowest
// first. A block takes consecutive tiles of 2048 keys. (1) Each block counts its keys by bin; (2)
// one block a bin sums the counts of the blocks before; (3) each block sums the totals of the bins
// before and gives every key its row, ranks inside a tile being those of CUB's stable match. Keys
// out of range have a bin of their own, the last. Reads the keys twice, writes num_keys * 4 B.
// Integers only: deterministic, and equal to the twin. More than 1023 buckets also take num_keys *
// 8 B of scratch, and each offset is found by binary search.
#include <algorithm>
#include <bit>

#include "kernels/cuda_launchers.h"
#include "kernels/device_memory.h"
#include "kernels/launch.cuh"
#include "kernels/prim.cuh"
#include "kernels/prim_rank.cuh"

namespace perseid::kernels {
namespace {

constexpr const char* kOperation = "counting_sort";
constexpr int kThreads = 256;
constexpr int kKeysPerThread = 8;
constexpr int kTileKeys = kThreads * kKeysPerThread;
constexpr int kBinBitsMax = 10;
constexpr int kBinsMax = 1 << kBinBitsMax;
/// Bits of one digit where there are several: its values and the bin of lost keys fit kBinsMax.
constexpr int kDigitBits = 9;
/// Each thread of the second launch sums this many blocks.
constexpr int kBlocksPerThread = 2;
constexpr int64_t kBlocksMax = kThreads * kBlocksPerThread;

/// One stable pass: key i of the pass is keys[order_in[i]], or keys[i] without order_in.
struct Pass {
  const int32_t* keys;
  const int32_t* order_in;
  int64_t num_keys;
  int64_t block_keys;  ///< a multiple of kTileKeys
  int num_blocks;
  unsigned num_buckets;
  int shift;
  unsigned mask;
  int num_bins;  ///< the last takes the keys that are out of range
  int* counts;   ///< [num_bins, num_blocks]; after the second launch those of the blocks before
  int* totals;   ///< [num_bins]
};

PERSEID_INLINE int key_place(const Pass& pass, int64_t i) {
  return pass.order_in == nullptr ? static_cast<int>(i) : pass.order_in[i];
}
PERSEID_INLINE unsigned bin_of(const Pass& pass, int place) {
  const auto key = static_cast<unsigned>(pass.keys[place]);  // negative keys become large ones
  return key < pass.num_buckets ? (key >> pass.shift) & pass.mask
                                : static_cast<unsigned>(pass.num_bins - 1);
}
PERSEID_INLINE int64_t end_of_block(const Pass& pass, int64_t begin) {
  return begin + pass.block_keys < pass.num_keys ? begin + pass.block_keys : pass.num_keys;
}

/// For CUB, whose keys are the bins themselves.
struct WholeKey {
  __device__ uint32_t Digit(uint32_t key) const { return key; }
};

// ---- kernels -----------------------------------------------------------------------------------
/// Registers: 32. Shared: 4096.
__global__ void __launch_bounds__(kThreads) count_kernel(const Pass pass) {
  __shared__ int count[kBinsMax];
  for (int bin = threadIdx.x; bin < pass.num_bins; bin += kThreads) count[bin] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * pass.block_keys, end = end_of_block(pass, begin);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    atomicAdd(&count[bin_of(pass, key_place(pass, i))], 1);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < pass.num_bins; bin += kThreads) {
    pass.counts[int64_t{bin} * pass.num_blocks + blockIdx.x] = count[bin];
  }
}

/// Registers: 32. Shared: 1184. One block a bin: counts of the blocks before, and the bin's total.
__global__ void __launch_bounds__(kThreads) scan_blocks_kernel(const Pass pass) {
  using Scan = prim::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  int* const counts = pass.counts + int64_t{blockIdx.x} * pass.num_blocks;
  const int first = static_cast<int>(threadIdx.x) * kBlocksPerThread;
  int mine[kBlocksPerThread], sum = 0, before = 0, total = 0;
  for (int i = 0; i < kBlocksPerThread; ++i) {
    mine[i] = first + i < pass.num_blocks ? counts[first + i] : 0;
    sum += mine[i];
  }
  Scan(storage).ExclusiveSum(sum, before, total);
  for (int i = 0; i < kBlocksPerThread; ++i) {
    if (first + i < pass.num_blocks) counts[first + i] = before;
    before += mine[i];
  }
  if (threadIdx.x == 0) pass.totals[blockIdx.x] = total;
}

/// Registers: 48. Shared: 42208. With 10 bits. Rows of the keys; the first block writes the
/// offsets. Bins of a thread are consecutive, as those of CUB. A null order_out: only offsets, of
/// one block.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    rank_kernel(const Pass pass, int64_t* __restrict__ offsets, int32_t* __restrict__ order_out,
                bool keeps_lost) {
  using Rank = prim::BlockRadixRankMatchEarlyCounts<kThreads, kBits, false>;
  using Scan = prim::BlockScan<int, kThreads>;
  constexpr int kBinsPerThread = Rank::BINS_TRACKED_PER_THREAD;
  __shared__ typename Rank::TempStorage rank_storage;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ int first_row[1 << kBits];  // of a bin in this tile, less the keys of the bins before
  const int first_bin = static_cast<int>(threadIdx.x) * kBinsPerThread;

  int row[kBinsPerThread], sum = 0, before = 0;
  for (int i = 0; i < kBinsPerThread; ++i) {
    row[i] = first_bin + i < pass.num_bins ? pass.totals[first_bin + i] : 0;
    sum += row[i];
  }
  Scan(scan_storage).ExclusiveSum(sum, before);
  for (int i = 0; i < kBinsPerThread; ++i) {
    const int bin = first_bin + i, total = row[i];
    row[i] = before;
    before += total;
    if (bin >= pass.num_bins) continue;
    if (offsets != nullptr && blockIdx.x == 0) offsets[bin] = row[i];
    row[i] += pass.counts[int64_t{bin} * pass.num_blocks + blockIdx.x];
  }
  if (order_out == nullptr) return;

  const int64_t block_begin = blockIdx.x * pass.block_keys, end = end_of_block(pass, block_begin);
  const auto lost = static_cast<unsigned>(pass.num_bins - 1);
  for (int64_t begin = block_begin; begin < end; begin += kTileKeys) {
    uint32_t bins[kKeysPerThread];
    int place[kKeysPerThread], ranks[kKeysPerThread];
    const int64_t mine =
        begin + threadIdx.x / kWarpSize * (kWarpSize * kKeysPerThread) + threadIdx.x % kWarpSize;
    for (int k = 0; k < kKeysPerThread; ++k) {
      const int64_t i = mine + k * kWarpSize;
      place[k] = i < end ? key_place(pass, i) : -1;
      // Only the last tile has an end: there they rank behind the keys of whatever bin.
      bins[k] = i < end ? bin_of(pass, place[k]) : lost;
    }
    int counts[kBinsPerThread], in_tile[kBinsPerThread];
    Rank(rank_storage)
        .RankKeys(bins, ranks, WholeKey{}, in_tile, [&](const int(&found)[kBinsPerThread]) {
          for (int i = 0; i < kBinsPerThread; ++i) counts[i] = found[i];
        });
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (first_bin + i < (1 << kBits)) first_row[first_bin + i] = row[i] - in_tile[i];
      row[i] += counts[i];
    }
    __syncthreads();
    for (int k = 0; k < kKeysPerThread; ++k) {
      if (place[k] < 0 || (bins[k] == lost && !keeps_lost)) continue;
      order_out[first_row[bins[k]] + ranks[k]] = place[k];
    }
    __syncthreads();  // the next tile writes first_row and the storage of the ranks
  }
}

/// Registers: 32. offsets[b] = keys below b among the sorted ones, by binary search.
__global__ void __launch_bounds__(kThreads)
    search_offsets_kernel(const int32_t* __restrict__ keys, const int32_t* __restrict__ order,
                          int64_t num_keys, const int* __restrict__ num_lost, int64_t num_buckets,
                          int64_t* __restrict__ offsets) {
  const int64_t bucket = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (bucket > num_buckets) return;
  int64_t low = 0, high = num_keys - *num_lost;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[order[middle]] < bucket) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  offsets[bucket] = low;
}

// ---- launch ------------------------------------------------------------------------------------
void launch_pass(const Pass& pass, int64_t* offsets, int32_t* order_out, bool keeps_lost,
                 const Stream& stream) {
  launch(kOperation, &count_kernel, pass.num_blocks, kThreads, stream, pass);
  launch(kOperation, &scan_blocks_kernel, pass.num_bins, kThreads, stream, pass);
  const int64_t blocks = order_out == nullptr ? 1 : pass.num_blocks;
  const auto rank = [&](auto* kernel) {
    launch(kOperation, kernel, blocks, kThreads, stream, pass, offsets, order_out, keeps_lost);
  };
  if (pass.num_bins <= 64) return rank(&rank_kernel<6>);
  if (pass.num_bins <= 256) return rank(&rank_kernel<8>);
  if (pass.num_bins <= 512) return rank(&rank_kernel<9>);
  rank(&rank_kernel<10>);
}

/// Passes by digit; lost keys stay at the end until the last pass leaves them out.
void sort_by_digits(Pass pass, int64_t num_buckets, int64_t* offsets, int32_t* order,
                    const Stream& stream) {
  const int64_t bytes = pass.num_keys * int64_t{sizeof(int32_t)};
  const DeviceMemory even(bytes, stream), odd(bytes, stream);
  const DeviceMemory sorted(order == nullptr ? bytes : 0, stream);
  int32_t* const last = order == nullptr ? sorted.as<int32_t>() : order;
  const int num_bits = std::bit_width(static_cast<uint64_t>(num_buckets - 1));
  pass.mask = (1u << kDigitBits) - 1;
  pass.num_bins = (1 << kDigitBits) + 1;
  for (pass.shift = 0; pass.shift < num_bits; pass.shift += kDigitBits) {
    const bool is_last = pass.shift + kDigitBits >= num_bits;
    const bool is_odd = pass.shift / kDigitBits % 2 != 0;
    int32_t* const target = is_last ? last : (is_odd ? odd : even).as<int32_t>();
    launch_pass(pass, nullptr, target, !is_last, stream);
    pass.order_in = target;
  }
  launch(kOperation, &search_offsets_kernel, ceil_div(num_buckets + 1, kThreads), kThreads, stream,
         pass.keys, last, pass.num_keys, pass.totals + (pass.num_bins - 1), num_buckets, offsets);
}

}  // namespace

void cuda::counting_sort(const int32_t* keys, int64_t num_keys, int64_t num_buckets,
                         int64_t* offsets, int32_t* order, const Stream& stream) {
  if (num_keys == 0) {
    return fill_zero(offsets, (num_buckets + 1) * int64_t{sizeof(int64_t)}, stream);
  }
  const int64_t num_tiles = ceil_div(num_keys, kTileKeys);
  const int64_t block_tiles = ceil_div(num_tiles, kBlocksMax);
  const auto num_blocks = static_cast<int>(ceil_div(num_tiles, block_tiles));
  const bool has_one_pass = num_buckets < kBinsMax;
  const int num_bins = has_one_pass ? static_cast<int>(num_buckets + 1) : (1 << kDigitBits) + 1;
  const DeviceMemory counts(int64_t{num_bins} * (num_blocks + 1) * int64_t{sizeof(int)}, stream);
  const Pass pass{keys,
                  nullptr,
                  num_keys,
                  block_tiles * kTileKeys,
                  num_blocks,
                  static_cast<unsigned>(num_buckets),
                  0,
                  ~0u,
                  num_bins,
                  counts.as<int>(),
                  counts.as<int>() + int64_t{num_bins} * num_blocks};
  if (has_one_pass) return launch_pass(pass, offsets, order, false, stream);
  sort_by_digits(pass, num_buckets, offsets, order, stream);
}

}  // namespace perseid::kernels
