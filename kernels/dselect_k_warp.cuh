#pragma once
#include <cmath>
#include <limits>

#include "kernels/dselect_k_token.h"
#include "kernels/token_warp.cuh"

// One token's selectors in a warp: what both directions of DSelect-k on CUDA share. Each lane has
// every 32nd code and forms its products from the shares of the bits, of which the last five are
// the same for its codes. Private to this folder.

namespace perseid::kernels {

/// Bits of the lane's number, which all codes of a lane have in common.
inline constexpr int kLaneBits = 5;

/// What both directions know of a call.
template <typename T>
struct DSelectKCall {
  const T* logits;
  const int32_t* expert_map;  ///< or null
  const uint8_t* valid;       ///< or null
  T gamma, min_weight;
  int num_experts, num_selectors, num_bits;
  bool is_hard, is_renormalized;

  __device__ __forceinline__ bool is_valid(int64_t t) const {
    return valid == nullptr || valid[t] != 0;
  }
  __device__ __forceinline__ int expert_of(int selector, int code) const {
    return expert_map == nullptr ? code : expert_map[selector * num_experts + code];
  }
  __host__ __device__ int num_switches() const { return num_selectors * num_bits; }
  __host__ __device__ int row_size() const { return num_switches() + num_selectors; }
};

/// A token's values.
template <typename T>
struct DSelectKMemory {
  T* shares;      ///< [K, bits, 2] 1 - S and S
  T* alpha;       ///< [K]
  T* table;       ///< [E] forward: merged; backward: dL/d(merged)
  T* slope;       ///< [K, bits] backward only, as what follows
  T* mass;        ///< [K]
  T* alpha_grad;  ///< [K]
  T* code_grad;   ///< [2^bits] dL/dr of one selector, if there is more than one code a lane

  __device__ __forceinline__ DSelectKMemory(const DSelectKCall<T>& call, T* p)
      : shares(p),
        alpha(shares + 2 * call.num_switches()),
        table(alpha + call.num_selectors),
        slope(table + call.num_experts),
        mass(slope + call.num_switches()),
        alpha_grad(mass + call.num_selectors),
        code_grad(alpha_grad + call.num_selectors) {}
};
template <typename T>
int64_t elements_forward(const DSelectKCall<T>& call) {
  return int64_t{call.num_selectors} * (2 * call.num_bits + 1) + call.num_experts;
}
template <typename T>
int64_t elements_backward(const DSelectKCall<T>& call) {
  return elements_forward(call) + int64_t{call.num_selectors} * (call.num_bits + 2) +
         (call.num_bits > kLaneBits ? int64_t{1} << call.num_bits : 0);
}

/// Shares, and slopes if kHasSlopes, of the switches of a row of logits.
template <bool kHasSlopes, typename T>
__device__ __forceinline__ SelectorFacts read_selector_row(const DSelectKCall<T>& call,
                                                           const T* row,
                                                           const DSelectKMemory<T>& memory) {
  constexpr T kMax = std::numeric_limits<T>::max();
  const int num_switches = call.num_switches();
  bool has_nan = false, is_non_finite = false;
  int saturated = 0;
  PERSEID_ROLLED
  for (int i = TokenWarp::lane(); i < call.row_size(); i += kWarpSize) {
    const T x = row[i];
    has_nan |= x != x;
    is_non_finite |= !(std::abs(x) <= kMax);
    if (i >= num_switches) continue;
    const SmoothStep<T> step = smooth_step(x, call.gamma);
    memory.shares[2 * i] = step.complement;
    memory.shares[2 * i + 1] = step.value;
    if constexpr (kHasSlopes) memory.slope[i] = step.slope;
    saturated += step.slope == T{0} ? 1 : 0;
  }
  TokenWarp::sync();
  return {TokenWarp::any(has_nan), TokenWarp::any(is_non_finite), TokenWarp::sum(saturated)};
}

/// alpha; false if the largest omega is infinite.
template <typename T>
__device__ __forceinline__ bool share_weight(const DSelectKCall<T>& call, const T* omega,
                                             const DSelectKMemory<T>& memory) {
  T max = -std::numeric_limits<T>::infinity();
  for (int i = TokenWarp::lane(); i < call.num_selectors; i += kWarpSize) {
    max = omega[i] > max ? omega[i] : max;
  }
  max = TokenWarp::max(max);
  T sum = 0;
  for (int i = TokenWarp::lane(); i < call.num_selectors; i += kWarpSize) {
    memory.alpha[i] = share_of_max(omega[i], max);
    sum += memory.alpha[i];
  }
  sum = TokenWarp::sum(sum);
  for (int i = TokenWarp::lane(); i < call.num_selectors; i += kWarpSize) memory.alpha[i] /= sum;
  TokenWarp::sync();
  return std::isfinite(max);
}

/// The codes of one lane for one selector.
template <typename T>
struct DSelectKCodes {
  const T* shares;  ///< [bits, 2]
  int num_bits;
  T of_lane;  ///< product of the bits of the lane's number

  __device__ __forceinline__ DSelectKCodes(const DSelectKCall<T>& call,
                                           const DSelectKMemory<T>& memory, int selector)
      : shares(memory.shares + 2 * selector * call.num_bits), num_bits(call.num_bits) {
    of_lane = last_bits(num_bits < kLaneBits ? num_bits : kLaneBits);
  }
  /// Product of the shares of bits [first, end) of a code, counted from its last, times `product`.
  __device__ __forceinline__ T times(T product, int code, int first, int end) const {
    PERSEID_ROLLED
    for (int n = first; n < end; ++n) {
      product *= shares[2 * (num_bits - 1 - n) + (code >> n & 1)];
    }
    return product;
  }
  __device__ __forceinline__ T last_bits(int count) const {
    return times(T{1}, TokenWarp::lane(), 0, count);
  }
  /// r of a code of this lane.
  __device__ __forceinline__ T reach(int code) const {
    return without_subnormal(times(of_lane, code, kLaneBits, num_bits));
  }
  /// r of any code: the same bits.
  __device__ __forceinline__ T reach_of_any(int code) const {
    return without_subnormal(times(T{1}, code, 0, num_bits));
  }
};

template <typename T>
__device__ __forceinline__ void fill_row(T* row, int count, T value) {
  for (int i = TokenWarp::lane(); i < count; i += kWarpSize) row[i] = value;
}

template <typename T>
DSelectKCall<T> make_dselect_k_call(const DSelectKShape& shape, const DSelectKOptions& options,
                                    const DSelectKInput& input) {
  return {static_cast<const T*>(input.logits),
          input.expert_map,
          input.valid,
          static_cast<T>(options.gamma),
          static_cast<T>(options.min_weight),
          static_cast<int>(shape.num_experts),
          static_cast<int>(shape.num_selectors),
          static_cast<int>(dselect_k_bits(shape.num_experts)),
          options.hard_eval,
          options.renormalize};
}

}  // namespace perseid::kernels
