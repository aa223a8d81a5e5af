#pragma once
#include "kernels/launch.cuh"

/// Before a loop whose body is long: unrolled it takes registers, of which other warps make more.
#if defined(__CUDACC__)
#define PERSEID_ROLLED _Pragma("unroll 1")
#else
#define PERSEID_ROLLED
#endif

namespace perseid::kernels {

/// A warp's collectives; every lane calls them and gets the result. Sums in a fixed order.
struct TokenWarp {
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
  static __device__ __forceinline__ bool any(bool x) { return __any_sync(kFullWarp, x) != 0; }
  template <typename T>
  static __device__ __forceinline__ T sum(T x) {
    for (int other = kWarpSize / 2; other > 0; other /= 2) {
      x += __shfl_xor_sync(kFullWarp, x, other);
    }
    return x;
  }
  template <typename T>
  static __device__ __forceinline__ T max(T x) {
    for (int other = kWarpSize / 2; other > 0; other /= 2) {
      const T y = __shfl_xor_sync(kFullWarp, x, other);
      x = y > x ? y : x;
    }
    return x;
  }
};

}  // namespace perseid::kernels
