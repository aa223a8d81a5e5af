// fill_uniform: one thread an element. fill_normal: one thread a pair of numbers, which share a
// logarithm. Writes count elements, reads nothing; arithmetic in double. Deterministic: an element
// depends on the key and its number alone. This file is compiled without fused multiply-add, so
// that uniform elements have the bits of the CPU.
#include <cmath>

#include "kernels/cuda_launchers.h"
#include "kernels/launch.cuh"

namespace perseid::kernels {
namespace {

constexpr int kThreads = 256;

struct Direction {
  double cosine, sine;
};
/// Of the double that is nearest to 2 pi turn, as on the CPU, but without a reduction of large
/// angles, which takes a stack: by turns, then by the angle that this double is too large.
__device__ __forceinline__ Direction direction_of(double turn) {
  constexpr double kTwoPiRest = 2.4492935982947064e-16;  // 2 pi - kTwoPi
  const double excess = -(std::fma(kTwoPi, turn, -(kTwoPi * turn)) + kTwoPiRest * turn);
  double sine, cosine;
  sincospi(2.0 * turn, &sine, &cosine);
  return {cosine - sine * excess, sine + cosine * excess};
}

// ---- kernels -----------------------------------------------------------------------------------
/// Registers: 32.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    uniform_kernel(T* __restrict__ out, int64_t count, UniformRange range, RandomKey key) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  store_once(out + i, uniform_element(range, key, static_cast<uint64_t>(i)));
}

/// Registers: 40.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normal_kernel(T* __restrict__ out, int64_t count, RandomKey key, uint64_t first) {
  const uint64_t thread = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  const uint64_t pair = (first & ~uint64_t{1}) + 2 * thread;
  // Wraps around to -1 for the even number of a pair that begins before `first`.
  const auto i = static_cast<int64_t>(pair - first);
  if (i >= count) return;
  const NormalPoint point = normal_point(key, pair);
  const Direction direction = direction_of(point.turn);
  if (i >= 0) store_once(out + i, point.radius * direction.cosine);
  if (i + 1 < count) store_once(out + i + 1, point.radius * direction.sine);
}

}  // namespace

// ---- launch ------------------------------------------------------------------------------------
void cuda::fill_uniform(void* out, int64_t count, DType dtype, const UniformRange& range,
                        RandomKey key, const Stream& stream) {
  dispatch_dtype(dtype, "fill_uniform", [&](auto tag) {
    using T = decltype(tag);
    launch("fill_uniform", &uniform_kernel<T>, ceil_div(count, kThreads), kThreads, stream,
           static_cast<T*>(out), count, range, key);
  });
}

void cuda::fill_normal(void* out, int64_t count, DType dtype, RandomKey key, uint64_t first,
                       const Stream& stream) {
  if (count == 0) return;
  const auto before = static_cast<int64_t>(first & 1);  // the rest of the first pair is left out
  const int64_t num_pairs = ceil_div(count + before, 2);
  dispatch_dtype(dtype, "fill_normal", [&](auto tag) {
    using T = decltype(tag);
    launch("fill_normal", &normal_kernel<T>, ceil_div(num_pairs, kThreads), kThreads, stream,
           static_cast<T*>(out), count, key, first);
  });
}

}  // namespace perseid::kernels
