#pragma once
#include "kernels/device_memory.h"
#include "kernels/launch.cuh"

// An expert map turned around, for kernels that add up by expert. Private to this folder.

namespace perseid::kernels {

inline constexpr int kChainThreads = 128;

/// Registers: 32. The outputs of each expert in ascending order without a write of two threads to
/// one place: chain[m] is the first output of expert m, chain[E + x] the next one of output x's
/// expert; num_outputs: there is none. One thread an entry, which walks over the map.
static __global__ void __launch_bounds__(kChainThreads)
    expert_chain_kernel(const int32_t* __restrict__ map, int32_t* __restrict__ chain,
                        int num_experts, int num_outputs) {
  const int n = static_cast<int>(blockIdx.x) * kChainThreads + static_cast<int>(threadIdx.x);
  if (n >= num_experts + num_outputs) return;
  const bool is_first = n < num_experts;
  const int32_t expert = is_first ? n : map[n - num_experts];
  int output = is_first ? 0 : n - num_experts + 1;
  while (output < num_outputs && map[output] != expert) ++output;
  chain[n] = output;
}

/// @param map  [num_parts, E] on the device
inline DeviceMemory expert_chain(const char* operation, const int32_t* map, int num_parts,
                                 int num_experts, const Stream& stream) {
  const int64_t count = int64_t{num_experts} * (num_parts + 1);
  DeviceMemory chain(count * int64_t{sizeof(int32_t)}, stream);
  launch(operation, &expert_chain_kernel, ceil_div(count, kChainThreads), kChainThreads, stream,
         map, chain.as<int32_t>(), num_experts, num_experts * num_parts);
  return chain;
}

}  // namespace perseid::kernels
