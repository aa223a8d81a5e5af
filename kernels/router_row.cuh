#pragma once
#include <cstdint>
#include <limits>

#include "kernels/router_select.cuh"
#include "kernels/vector.cuh"

// A token's row of logits in the registers of its kWidth lanes, kPerLane consecutive ones in each.
// Private to this folder.

namespace perseid::kernels {

/// Reads a lane's logits; -inf past the end of the row, which lies behind every expert's.
/// @param kIsWhole  the row has kWidth * kPerLane logits, and its address allows wide accesses
template <bool kIsWhole, int kPerLane>
__device__ __forceinline__ void read_lane(const float* row, int num_experts, int first,
                                          float (&logits)[kPerLane]) {
  if constexpr (kIsWhole) {
    constexpr int kPack = kPerLane < 4 ? kPerLane : 4;
    using Packed = Pack<float, kPack>;
#pragma unroll
    for (int i = 0; i < kPerLane; i += kPack) {
      const Packed pack = *reinterpret_cast<const Packed*>(row + first + i);
#pragma unroll
      for (int j = 0; j < kPack; ++j) logits[i + j] = pack.values[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      logits[i] =
          first + i < num_experts ? row[first + i] : -std::numeric_limits<float>::infinity();
    }
  }
}

/// Sum over kLanes neighbouring lanes of a token, in all of them; the order is that of a tree.
template <int kLanes, typename T>
__device__ __forceinline__ T sum_of_lanes(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset, kLanes);
  }
  return value;
}

}  // namespace perseid::kernels
