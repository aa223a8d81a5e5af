#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/device_memory.h"
#include "kernels/warp.cuh"

// One warp for each token: what the gates of smooth-step switches share. A block of threads takes
// 64 tokens, as the CPU does, and adds up what they give in their order; a second kernel adds up
// the blocks in a fixed order. No atomics: same bits each time, whatever the GPU.

namespace perseid::kernels {

/// The largest of a series and its first place.
template <typename T>
struct LargestOfWarp {
  T value = -std::numeric_limits<T>::infinity();
  int index = std::numeric_limits<int>::max();

  /// A lane's elements in ascending order.
  __device__ __forceinline__ void add(T x, int i) {
    if (x > value) {
      value = x;
      index = i;
    }
  }
  /// That of all lanes.
  __device__ __forceinline__ void join() {
    for (int other = kWarpSize / 2; other > 0; other /= 2) {
      const T y = __shfl_xor_sync(kFullWarp, value, other);
      const int i = __shfl_xor_sync(kFullWarp, index, other);
      if (y > value || (y == value && i < index)) {
        value = y;
        index = i;
      }
    }
  }
};

// ---- sums over tokens --------------------------------------------------------------------------
/// COMET has no penalty. Counts are exact in a double.
enum TokenSum { kEntropy, kPenalty, kRemoved, kSwitches, kSaturated, kNonFinite, kNumTokenSums };
struct TokenSums {
  double of[kNumTokenSums] = {};
};
/// Where the sums over all tokens go, on the device; null: nowhere.
struct TokenSumTargets {
  double* sums[kSwitches] = {};
  int64_t* counts[kNumTokenSums - kSwitches] = {};

  bool any() const {
    return std::any_of(std::begin(sums), std::end(sums), [](auto* p) { return p != nullptr; }) ||
           std::any_of(std::begin(counts), std::end(counts), [](auto* p) { return p != nullptr; });
  }
};

/// Tokens of one block of threads, and of one partial sum: those of the CPU twins.
inline constexpr int kTokensPerBlock = 64;
inline constexpr int kTokenWarpsMax = 8;
inline constexpr int kTokenThreadsMax = kTokenWarpsMax * kWarpSize;
/// Five blocks of that size have room on an SM of 228 KB.
inline constexpr int kTokenBytes = 40 * 1024;
/// With memory for its tokens outside the SM: fewer, so that it stays in the second-level cache.
inline constexpr int kWarpsOutside = 4;
inline constexpr int64_t kBlocksOutside = 264;

struct TokenJob {
  int64_t num_tokens;
  int64_t elements;    ///< of memory for a token
  void* memory;        ///< null: shared memory
  double* block_sums;  ///< [kNumTokenSums, blocks of tokens] or null
};

/// Blocks of one SM at least, which bounds the registers: 4 leave 64 for each thread, 2 leave 128.
template <typename T, bool kIsOutside>
inline constexpr int kBlocksPerSm = sizeof(T) == 4 && !kIsOutside ? 4 : 2;

/// Calls gate(t, memory) for every token t by one warp each, with room for `elements` values.
/// Registers: 128. Shared: 44032. For float32 with memory inside it is 64 registers, and with
/// memory outside 3072 bytes.
template <typename Gate, bool kIsOutside>
__global__ void __launch_bounds__(kTokenThreadsMax,
                                  kBlocksPerSm<typename Gate::Element, kIsOutside>)
    token_kernel(Gate gate, TokenJob job) {
  using T = typename Gate::Element;
  constexpr int kElements = kIsOutside ? 1 : kTokenBytes / static_cast<int>(sizeof(T));
  __shared__ T inside[kElements];
  __shared__ double token_sums[kNumTokenSums][kTokensPerBlock];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  T* const memory = kIsOutside ? static_cast<T*>(job.memory) +
                                     (int64_t{blockIdx.x} * num_warps + warp) * job.elements
                               : inside + warp * static_cast<int>(job.elements);
  const int64_t num_blocks = ceil_div(job.num_tokens, kTokensPerBlock);
  for (int64_t block = blockIdx.x; block < num_blocks; block += gridDim.x) {
    const int64_t first = block * kTokensPerBlock, left = job.num_tokens - first;
    const int count = left < kTokensPerBlock ? static_cast<int>(left) : kTokensPerBlock;
    for (int i = warp; i < count; i += num_warps) {
      if constexpr (Gate::kHasSums) {
        const TokenSums sums = gate(first + i, memory);
        if (TokenWarp::lane() == 0) {
          for (int n = 0; n < kNumTokenSums; ++n) token_sums[n][i] = sums.of[n];
        }
      } else {
        gate(first + i, memory);
      }
      TokenWarp::sync();  // before the next token overwrites the memory
    }
    if (!Gate::kHasSums || job.block_sums == nullptr) continue;
    __syncthreads();
    if (threadIdx.x < kNumTokenSums) {
      double sum = 0;
      for (int i = 0; i < count; ++i) sum += token_sums[threadIdx.x][i];
      job.block_sums[threadIdx.x * num_blocks + block] = sum;
    }
    __syncthreads();
  }
}

template <typename T>
__device__ __forceinline__ void store_sum(T* target, double sum) {
  if (target != nullptr) *target = static_cast<T>(sum);
}

/// Registers: 32. One block, one warp for each sum.
static __global__ void __launch_bounds__(kNumTokenSums* kWarpSize)
    sum_blocks_kernel(const double* __restrict__ block_sums, int64_t num_blocks,
                      TokenSumTargets targets) {
  const int n = static_cast<int>(threadIdx.x) / kWarpSize;
  double sum = 0;
  for (int64_t block = TokenWarp::lane(); block < num_blocks; block += kWarpSize) {
    sum += block_sums[n * num_blocks + block];
  }
  sum = TokenWarp::sum(sum);
  if (TokenWarp::lane() != 0) return;
  switch (n) {
    case kEntropy:
      return store_sum(targets.sums[0], sum);
    case kPenalty:
      return store_sum(targets.sums[1], sum);
    case kRemoved:
      return store_sum(targets.sums[2], sum);
    case kSwitches:
      return store_sum(targets.counts[0], sum);
    case kSaturated:
      return store_sum(targets.counts[1], sum);
    default:
      return store_sum(targets.counts[2], sum);
  }
}

// ---- launch ------------------------------------------------------------------------------------
/// gate(t, memory) for every token. @param elements  of Gate::Element, memory for a token
template <typename Gate>
void for_each_token(const char* operation, const Gate& gate, int64_t num_tokens, int64_t elements,
                    const TokenSumTargets& targets, const Stream& stream) {
  using T = typename Gate::Element;
  require(elements <= std::numeric_limits<int32_t>::max(), operation, "elements of a token",
          elements, "exceed 2147483647 on a GPU");
  const int64_t num_blocks = ceil_div(num_tokens, kTokensPerBlock);
  const bool has_sums = Gate::kHasSums && targets.any();
  DeviceMemory sums;
  if (has_sums) {
    sums = DeviceMemory(num_blocks * kNumTokenSums * int64_t{sizeof(double)}, stream);
  }
  TokenJob job{num_tokens, elements, nullptr, sums.as<double>()};
  const int64_t warps =
      std::min<int64_t>(kTokenWarpsMax, kTokenBytes / (elements * int64_t{sizeof(T)}));
  if (warps > 0) {
    launch(operation, &token_kernel<Gate, false>, num_blocks, static_cast<int>(warps) * kWarpSize,
           stream, gate, job);
  } else {
    const int64_t blocks = std::min(num_blocks, kBlocksOutside);
    const DeviceMemory memory(blocks * kWarpsOutside * elements * int64_t{sizeof(T)}, stream);
    job.memory = memory.data();
    launch(operation, &token_kernel<Gate, true>, blocks, kWarpsOutside * kWarpSize, stream, gate,
           job);
  }
  if (has_sums) {
    launch(operation, &sum_blocks_kernel, 1, kNumTokenSums * kWarpSize, stream, sums.as<double>(),
           num_blocks, targets);
  }
}

}  // namespace perseid::kernels
