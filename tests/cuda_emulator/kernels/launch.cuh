#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels/checks.h"
#include "kernels/stream.h"

// The emulator's kernels/launch.cuh: .cu files compiled as C++ with this folder before the tree's
// on the include path run their kernels on the CPU, unchanged. Each thread of a block is a fiber
// that runs until it meets a barrier or a warp collective; blocks run one after the other. Finds
// errors of logic, ties, tails and participation: a collective that a thread of its mask never
// enters, or enters with another operation, ends the program with the place. Does not find races,
// and device memory is host memory.

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
// Blocks of different host threads (ranks of a local group) must not share.
#define __shared__ static thread_local

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};

namespace perseid::cuda_emulator {

/// Runs body once for each thread of each block.
void run_grid(const char* kernel, int64_t blocks, int threads, const std::function<void()>& body);

/// Of the running fiber.
const EmulatedIndex& thread_index();
const EmulatedIndex& block_index();
const EmulatedIndex& block_size();
const EmulatedIndex& grid_size();

/// Waits for all threads of the block that have not ended.
void barrier(const char* operation);

/// Waits for all lanes of `mask`, which must contain this one; returns what each gave, by lane.
const uint64_t* warp_exchange(const char* operation, unsigned mask, uint64_t value);
int lane();

template <typename T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

/// Ends the program: an error of a kernel is no error of its caller.
[[noreturn]] void stop(const char* operation, const char* what);

/// Value of `source` if that lane is part of the exchange, else undefined on a GPU: stops here.
template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int source) {
  const uint64_t* const words = warp_exchange(operation, mask, to_word(value));
  if ((mask >> source & 1u) == 0) stop(operation, "reads a lane outside its mask");
  return from_word<T>(words[source]);
}

template <typename T, typename Op>
T reduce(const char* operation, unsigned mask, T value, Op op) {
  const uint64_t* const words = warp_exchange(operation, mask, to_word(value));
  T result{};
  bool is_first = true;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    const T one = from_word<T>(words[i]);
    result = is_first ? one : op(result, one);
    is_first = false;
  }
  return result;
}

}  // namespace perseid::cuda_emulator

#define threadIdx (::perseid::cuda_emulator::thread_index())
#define blockIdx (::perseid::cuda_emulator::block_index())
#define blockDim (::perseid::cuda_emulator::block_size())
#define gridDim (::perseid::cuda_emulator::grid_size())

inline void __syncthreads() { ::perseid::cuda_emulator::barrier("__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  ::perseid::cuda_emulator::warp_exchange("__syncwarp", mask, 0);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = ::perseid::cuda_emulator::lane();
  return ::perseid::cuda_emulator::shuffle("__shfl_sync", mask, value,
                                           (lane & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = ::perseid::cuda_emulator::lane(), source = lane ^ lane_mask;
  const bool inside = source / width == lane / width;
  return ::perseid::cuda_emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ::perseid::cuda_emulator::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source / width == lane / width;
  return ::perseid::cuda_emulator::shuffle("__shfl_down_sync", mask, value, inside ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ::perseid::cuda_emulator::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= 0 && source / width == lane / width;
  return ::perseid::cuda_emulator::shuffle("__shfl_up_sync", mask, value, inside ? source : lane);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return ::perseid::cuda_emulator::reduce("__reduce_max_sync", mask, value,
                                          [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return ::perseid::cuda_emulator::reduce("__reduce_min_sync", mask, value,
                                          [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return ::perseid::cuda_emulator::reduce("__reduce_add_sync", mask, value,
                                          [](T a, T b) { return static_cast<T>(a + b); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* const words =
      ::perseid::cuda_emulator::warp_exchange("__ballot_sync", mask, predicate != 0);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) != 0 && words[i] != 0) ballot |= 1u << i;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
inline unsigned __activemask() {
  ::perseid::cuda_emulator::stop("__activemask", "has no meaning for fibers; pass a mask");
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
/// Two units in the last place on a GPU, for quotients of usual size.
inline float __fdividef(float a, float b) { return a / b; }

/// Sine and cosine of pi x.
inline void sincospi(double x, double* sine, double* cosine) {
  constexpr long double kPi = 3.14159265358979323846264338327950288L;
  *sine = static_cast<double>(std::sin(kPi * x));
  *cosine = static_cast<double>(std::cos(kPi * x));
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T atomicAdd(T* target, T value) {
  static_assert(std::is_integral_v<T>, "sums of floats in no fixed order are not wanted");
  const T old = *target;
  *target = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomicMax(T* target, T value) {
  const T old = *target;
  *target = old > value ? old : value;
  return old;
}
template <typename T>
T atomicOr(T* target, T value) {
  const T old = *target;
  *target = old | value;
  return old;
}

namespace perseid::kernels {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xFFFFFFFFu;

template <typename... Parameters, typename... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), int64_t blocks, int threads,
            const Stream&, Arguments... arguments) {
  if (blocks == 0) return;
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  cuda_emulator::run_grid(operation, blocks, threads, [&] { std::apply(kernel, values); });
}

}  // namespace perseid::kernels
