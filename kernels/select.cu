// select_k: radix select on ordered integer keys, 11 bits a pass, highest first: 3 passes over
// float32, 6 over float64, of two launches each: blocks count digits in shared memory and add them
// up, then one block finds the digit of the limit. Two more launches count each block's values at
// the limit and mark, so that of those the first ones are taken. Reads the values once a launch,
// writes count bytes. Integer sums only: deterministic, equal to the twin. The host does not wait.
#include <algorithm>

#include "kernels/cuda_launchers.h"
#include "kernels/device_memory.h"
#include "kernels/launch.cuh"
#include "kernels/ordered_key.h"
#include "kernels/prim.cuh"

namespace perseid::kernels {
namespace {

constexpr const char* kOperation = "select_k";
constexpr int kThreads = 256;
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kDigitsPerThread = kDigits / kThreads;
constexpr int kValuesPerThread = 4;
constexpr int64_t kTileValues = kThreads * kValuesPerThread;
constexpr int64_t kBlocksMax = 1024;
using Count = unsigned long long;

/// Keys whose high bits are above `prefix` are kept, and `num_needed` of those that have it.
struct Limit {
  uint64_t prefix;
  int64_t num_needed;
};

/// Blocks have consecutive values. In device memory: limit, histograms of the passes, ties.
template <typename T>
struct SelectJob {
  const T* values;
  int64_t count;
  int64_t block_values;
  int64_t num_blocks;
  Limit* limit;
  int64_t* ties;  ///< [num_blocks] values of a block at the limit
  uint8_t* is_kept;
};

template <typename T>
PERSEID_INLINE int64_t end_of_block(const SelectJob<T>& job, int64_t begin) {
  return begin + job.block_values < job.count ? begin + job.block_values : job.count;
}

// ---- kernels -----------------------------------------------------------------------------------
/// Registers: 32. Shared: 8192. Digits of the keys that have the limit's prefix.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_digits_kernel(const SelectJob<T> job, int shift, int bits, bool is_first,
                        Count* __restrict__ histogram) {
  __shared__ int digits[kDigits];
  for (int d = threadIdx.x; d < kDigits; d += kThreads) digits[d] = 0;
  __syncthreads();
  const UnsignedKey<T> prefix = is_first ? 0 : static_cast<UnsignedKey<T>>(job.limit->prefix);
  const UnsignedKey<T> mask = (UnsignedKey<T>{1} << bits) - 1;
  const int64_t begin = blockIdx.x * job.block_values, end = end_of_block(job, begin);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const UnsignedKey<T> key = unsigned_key(job.values[i]) >> shift;
    if (is_first || key >> bits == prefix) atomicAdd(&digits[static_cast<int>(key & mask)], 1);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < kDigits; d += kThreads) {
    if (digits[d] != 0) atomicAdd(&histogram[d], static_cast<Count>(digits[d]));
  }
}

/// Registers: 48. Shared: 2336. One block. A thread has consecutive digits, the highest first.
__global__ void __launch_bounds__(kThreads)
    find_digit_kernel(const Count* __restrict__ histogram, int bits, bool is_first, int64_t k,
                      Limit* limit) {
  using Scan = prim::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const Limit old = is_first ? Limit{0, k} : *limit;
  const int highest = kDigits - 1 - static_cast<int>(threadIdx.x) * kDigitsPerThread;
  int64_t counts[kDigitsPerThread], sum = 0, above = 0;
  for (int i = 0; i < kDigitsPerThread; ++i) {
    counts[i] = static_cast<int64_t>(histogram[highest - i]);
    sum += counts[i];
  }
  Scan(storage).ExclusiveSum(sum, above);  // its barrier is behind every read of the old limit
  for (int i = 0; i < kDigitsPerThread; ++i) {
    if (above < old.num_needed && old.num_needed <= above + counts[i]) {
      *limit = {(old.prefix << bits) | static_cast<uint64_t>(highest - i), old.num_needed - above};
    }
    above += counts[i];
  }
}

/// Registers: 32. Shared: 80.
template <typename T>
__global__ void __launch_bounds__(kThreads) count_ties_kernel(const SelectJob<T> job) {
  using Reduce = prim::BlockReduce<int64_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const auto limit = static_cast<UnsignedKey<T>>(job.limit->prefix);
  const int64_t begin = blockIdx.x * job.block_values, end = end_of_block(job, begin);
  int64_t mine = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    mine += unsigned_key(job.values[i]) == limit ? 1 : 0;
  }
  const int64_t total = Reduce(storage).Sum(mine);
  if (threadIdx.x == 0) job.ties[blockIdx.x] = total;
}

/// Registers: 40. Shared: 1272. A thread has consecutive values of each tile.
template <typename T>
__global__ void __launch_bounds__(kThreads) mark_kernel(const SelectJob<T> job) {
  using Reduce = prim::BlockReduce<int64_t, kThreads>;
  using Scan = prim::BlockScan<int, kThreads>;
  __shared__ typename Reduce::TempStorage reduce_storage;
  __shared__ typename Scan::TempStorage scan_storage;
  __shared__ int64_t ties_before;
  int64_t mine = 0;
  for (int64_t block = threadIdx.x; block < blockIdx.x; block += kThreads) mine += job.ties[block];
  const int64_t all = Reduce(reduce_storage).Sum(mine);
  if (threadIdx.x == 0) ties_before = all;
  __syncthreads();
  const auto limit = static_cast<UnsignedKey<T>>(job.limit->prefix);
  int64_t num_left = job.limit->num_needed - ties_before;
  const int64_t block_begin = blockIdx.x * job.block_values, end = end_of_block(job, block_begin);
  for (int64_t begin = block_begin; begin < end; begin += kTileValues) {
    const int64_t first = begin + int64_t{threadIdx.x} * kValuesPerThread;
    UnsignedKey<T> keys[kValuesPerThread];
    int num_ties = 0, before = 0, total = 0;
    for (int i = 0; i < kValuesPerThread; ++i) {
      const bool is_value = first + i < end;
      keys[i] = is_value ? unsigned_key(job.values[first + i]) : 0;
      num_ties += is_value && keys[i] == limit ? 1 : 0;
    }
    Scan(scan_storage).ExclusiveSum(num_ties, before, total);
    for (int i = 0; i < kValuesPerThread; ++i) {
      if (first + i >= end) continue;
      const bool is_tie = keys[i] == limit;
      job.is_kept[first + i] =
          static_cast<uint8_t>(keys[i] > limit || (is_tie && before < num_left));
      before += is_tie ? 1 : 0;
    }
    num_left -= total;
    __syncthreads();  // the next tile uses the storage of the scan
  }
}

// ---- launch ------------------------------------------------------------------------------------
template <typename T>
void select_values(const T* values, int64_t count, int64_t k, uint8_t* is_kept,
                   const Stream& stream) {
  constexpr int kKeyBits = 8 * static_cast<int>(sizeof(T));
  constexpr int64_t kPasses = ceil_div(kKeyBits, kDigitBits);
  const int64_t block_values = ceil_div(ceil_div(count, kTileValues), kBlocksMax) * kTileValues;
  const int64_t num_blocks = ceil_div(count, block_values);
  const DeviceMemory limit(sizeof(Limit), stream);
  const DeviceMemory histograms(kPasses * kDigits * int64_t{sizeof(Count)}, stream);
  const DeviceMemory ties(num_blocks * int64_t{sizeof(int64_t)}, stream);
  fill_zero(histograms.data(), histograms.bytes(), stream);
  const SelectJob<T> job{
      values, count, block_values, num_blocks, limit.as<Limit>(), ties.as<int64_t>(), is_kept};
  int shift = kKeyBits;
  for (int64_t pass = 0; pass < kPasses; ++pass) {
    const int bits = std::min(kDigitBits, shift);
    shift -= bits;
    Count* const histogram = histograms.as<Count>() + pass * kDigits;
    launch(kOperation, &count_digits_kernel<T>, num_blocks, kThreads, stream, job, shift, bits,
           pass == 0, histogram);
    launch(kOperation, &find_digit_kernel, 1, kThreads, stream, histogram, bits, pass == 0, k,
           limit.as<Limit>());
  }
  launch(kOperation, &count_ties_kernel<T>, num_blocks, kThreads, stream, job);
  launch(kOperation, &mark_kernel<T>, num_blocks, kThreads, stream, job);
}

}  // namespace

void cuda::select_k(const void* values, int64_t count, int64_t k, DType dtype, uint8_t* is_kept,
                    const Stream& stream) {
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    if (k == 0 || count == 0) return fill_zero(is_kept, count, stream);
    select_values(static_cast<const T*>(values), count, std::min(k, count), is_kept, stream);
  });
}

}  // namespace perseid::kernels
