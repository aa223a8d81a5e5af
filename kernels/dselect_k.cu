// dselect_k, dselect_k_backward: one warp a token; each lane has every 32nd code and forms its
// products from the shares of the bits, the last five of which it shares between its codes. The
// forward reads T*K*(bits+1) and writes T*E elements; the backward reads T*(K*(bits+1) + 2E) and
// writes T*K*(bits+1). Memory of a token: the shares, a table of E and in the backward 2^bits
// values; in shared memory up to 40 KB. Sums in the type of the logits, over tokens in double, all
// in a fixed order. Limit: 2^31 - 1 values of a token.
#include <cmath>

#include "kernels/cuda_launchers.h"
#include "kernels/dselect_k_token.h"
#include "kernels/token_warp.cuh"

namespace perseid::kernels {
namespace {

/// Bits of the lane's number, which all codes of a lane have in common.
constexpr int kLaneBits = 5;

/// What both directions know of a call.
template <typename T>
struct Call {
  const T* logits;
  const uint8_t* valid;
  T gamma, min_weight;
  int num_experts, num_selectors, num_bits;
  bool is_hard, is_renormalized;

  __device__ __forceinline__ bool is_valid(int64_t t) const {
    return valid == nullptr || valid[t] != 0;
  }
  __host__ __device__ int num_switches() const { return num_selectors * num_bits; }
  __host__ __device__ int row_size() const { return num_switches() + num_selectors; }
};

/// A token's values.
template <typename T>
struct Memory {
  T* shares;      ///< [K, bits, 2] 1 - S and S
  T* alpha;       ///< [K]
  T* table;       ///< [E] forward: merged; backward: dL/d(merged)
  T* slope;       ///< [K, bits] backward only, as what follows
  T* mass;        ///< [K]
  T* alpha_grad;  ///< [K]
  T* code_grad;   ///< [2^bits] dL/dr of one selector, if there is more than one code a lane

  __device__ __forceinline__ Memory(const Call<T>& call, T* p)
      : shares(p),
        alpha(shares + 2 * call.num_switches()),
        table(alpha + call.num_selectors),
        slope(table + call.num_experts),
        mass(slope + call.num_switches()),
        alpha_grad(mass + call.num_selectors),
        code_grad(alpha_grad + call.num_selectors) {}
};
template <typename T>
int64_t elements_forward(const Call<T>& call) {
  return 2 * int64_t{call.num_switches()} + call.num_selectors + call.num_experts;
}
template <typename T>
int64_t elements_backward(const Call<T>& call) {
  return elements_forward(call) + call.row_size() + call.num_selectors +
         (call.num_bits > kLaneBits ? int64_t{1} << call.num_bits : 0);
}

/// Shares, and slopes if kHasSlopes, of the switches of a row of logits.
template <bool kHasSlopes, typename T>
__device__ __forceinline__ SelectorFacts read_row(const Call<T>& call, const T* row,
                                                  const Memory<T>& memory) {
  constexpr T kMax = std::numeric_limits<T>::max();
  const int num_switches = call.num_switches();
  bool has_nan = false, is_non_finite = false;
  int saturated = 0;
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
__device__ __forceinline__ bool share(const Call<T>& call, const T* omega,
                                      const Memory<T>& memory) {
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
struct Codes {
  const T* shares;  ///< [bits, 2]
  int num_bits;
  T of_lane;  ///< product of the bits of the lane's number

  __device__ __forceinline__ Codes(const Call<T>& call, const Memory<T>& memory, int selector)
      : shares(memory.shares + 2 * selector * call.num_bits), num_bits(call.num_bits) {
    of_lane = last_bits(num_bits < kLaneBits ? num_bits : kLaneBits);
  }
  /// Product of the shares of bits [first, end) of a code, counted from its last, times `product`.
  __device__ __forceinline__ T times(T product, int code, int first, int end) const {
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
};

template <typename T>
__device__ __forceinline__ void fill(T* row, int count, T value) {
  for (int i = TokenWarp::lane(); i < count; i += kWarpSize) row[i] = value;
}

// ---- forward -----------------------------------------------------------------------------------
template <typename T>
struct Forward {
  using Element = T;
  static constexpr bool kHasSums = true;
  Call<T> call;
  T* weights;
  bool needs_entropy;

  __device__ TokenSums operator()(int64_t t, T* at) const {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    const int E = call.num_experts, lane = TokenWarp::lane();
    const Memory<T> memory(call, at);
    const T* const logits = call.logits + t * call.row_size();
    T* const row = weights == nullptr ? nullptr : weights + t * E;
    TokenSums sums;
    if (!call.is_valid(t)) {
      if (row != nullptr) fill(row, E, T{0});
      return sums;
    }
    const SelectorFacts facts = read_row<false>(call, logits, memory);
    sums.of[kNonFinite] = facts.is_non_finite ? 1 : 0;
    if (facts.has_nan) {
      sums.of[kEntropy] = sums.of[kPenalty] = sums.of[kRemoved] = static_cast<double>(kNaN);
      if (row == nullptr) return sums;
      for (int j = lane; j < E; j += kWarpSize) row[j] = j < call.num_selectors ? kNaN : T{0};
      return sums;
    }
    sums.of[kSwitches] = call.num_switches();
    sums.of[kSaturated] = static_cast<double>(facts.saturated);
    if (row != nullptr) {
      share(call, logits + call.num_switches(), memory);
      fill(memory.table, E, T{0});
    }
    for (int i = 0; i < call.num_selectors; ++i) add_selector(i, memory, sums);
    if (row == nullptr) return sums;
    T total = 0;
    for (int j = lane; j < E; j += kWarpSize) total += memory.table[j];
    total = TokenWarp::sum(total);
    const T divisor = call.is_renormalized && total > T{0} ? total : T{1};
    double removed = 0;
    for (int j = lane; j < E; j += kWarpSize) {
      const T g = memory.table[j] / divisor;
      const bool is_removed = g < call.min_weight;
      row[j] = is_removed ? T{0} : g;
      removed += is_removed ? static_cast<double>(g) : 0.0;
    }
    sums.of[kRemoved] = TokenWarp::sum(removed);
    return sums;
  }

  /// Its losses, and its share of the weights unless those are not wanted.
  __device__ __forceinline__ void add_selector(int i, const Memory<T>& memory,
                                               TokenSums& sums) const {
    const Codes<T> codes(call, memory, i);
    const T alpha = weights == nullptr ? T{0} : memory.alpha[i];
    T mass = 0, entropy = 0;
    LargestOfWarp<T> largest;
    for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
      const T r = codes.reach(j);
      mass += r;
      if (needs_entropy) entropy += r * log_of(r + static_cast<T>(kEntropyEpsilon));
      if (call.is_hard) {
        largest.add(r, j);
      } else if (weights != nullptr) {
        memory.table[j] += alpha * r;
      }
    }
    mass = TokenWarp::sum(mass);
    sums.of[kPenalty] += 1 / (kPenaltyEpsilon + static_cast<double>(mass));
    if (needs_entropy) sums.of[kEntropy] -= static_cast<double>(TokenWarp::sum(entropy));
    if (!call.is_hard || weights == nullptr) return;
    largest.join();
    const bool is_mine = largest.index % kWarpSize == TokenWarp::lane();
    if (is_mine && largest.value > T{0}) memory.table[largest.index] += alpha;
  }
};

// ---- backward ----------------------------------------------------------------------------------
template <typename T>
struct Backward {
  using Element = T;
  static constexpr bool kHasSums = false;
  Call<T> call;
  const T* weights;
  const T* grad_weights;  ///< or null
  const double* grad_entropy_sum;
  const double* grad_penalty_sum;
  T* grad_logits;

  __device__ void operator()(int64_t t, T* at) const {
    const Memory<T> memory(call, at);
    const T* const logits = call.logits + t * call.row_size();
    T* const grad_z = grad_logits + t * call.row_size();
    T* const grad_omega = grad_z + call.num_switches();
    if (!call.is_valid(t)) return fill(grad_z, call.row_size(), T{0});
    if (read_row<true>(call, logits, memory).has_nan) {
      return fill(grad_z, call.row_size(), std::numeric_limits<T>::quiet_NaN());
    }
    bool has_gradient = false;
    if (grad_weights != nullptr) {
      has_gradient = share(call, logits + call.num_switches(), memory);
    }
    const T divisor = weigh_selectors(memory);
    if (grad_weights != nullptr) {
      read_gradients(t, divisor, memory);
      for (int i = 0; i < call.num_selectors; ++i) grade_alpha(i, memory);
      TokenWarp::sync();
    }
    T mean = 0;
    for (int i = TokenWarp::lane(); has_gradient && i < call.num_selectors; i += kWarpSize) {
      mean += memory.alpha[i] * memory.alpha_grad[i];
    }
    mean = TokenWarp::sum(mean);
    for (int i = TokenWarp::lane(); i < call.num_selectors; i += kWarpSize) {
      grad_omega[i] = has_gradient ? memory.alpha[i] * (memory.alpha_grad[i] - mean) : T{0};
    }
    for (int i = 0; i < call.num_selectors; ++i) {
      grade_bits(i, memory, grad_z + i * call.num_bits);
    }
  }

  __device__ __forceinline__ LargestOfWarp<T> largest_of(const Codes<T>& codes) const {
    LargestOfWarp<T> largest;
    for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
      largest.add(codes.reach(j), j);
    }
    largest.join();
    return largest;
  }

  /// The mass of each selector; returns what the forward divided the weights by.
  __device__ __forceinline__ T weigh_selectors(const Memory<T>& memory) const {
    T total = 0;
    for (int i = 0; i < call.num_selectors; ++i) {
      const Codes<T> codes(call, memory, i);
      T mass = 0;
      for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) mass += codes.reach(j);
      mass = TokenWarp::sum(mass);
      if (TokenWarp::lane() == 0) memory.mass[i] = mass;
      if (grad_weights == nullptr || !call.is_renormalized) continue;
      if (call.is_hard) mass = largest_of(codes).value > T{0} ? T{1} : T{0};
      total += memory.alpha[i] * mass;
    }
    TokenWarp::sync();
    return call.is_renormalized && total > T{0} ? total : T{1};
  }

  /// dL/d(merged), from what may be read of dL/dg.
  __device__ __forceinline__ void read_gradients(int64_t t, T divisor,
                                                 const Memory<T>& memory) const {
    const T* const g = weights + t * call.num_experts;
    const T* const upstream = grad_weights + t * call.num_experts;
    T mean = 0;
    for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
      const T rho = g[j] > T{0} ? upstream[j] : T{0};
      memory.table[j] = rho;
      mean += g[j] * rho;
    }
    if (call.is_renormalized) {
      mean = TokenWarp::sum(mean);
      for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
        memory.table[j] = (memory.table[j] - mean) / divisor;
      }
    }
    TokenWarp::sync();
  }

  __device__ __forceinline__ void grade_alpha(int i, const Memory<T>& memory) const {
    const Codes<T> codes(call, memory, i);
    T sum = 0;
    if (call.is_hard) {
      const LargestOfWarp<T> largest = largest_of(codes);
      sum = largest.value > T{0} ? memory.table[largest.index] : T{0};
    } else {
      for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
        sum += codes.reach(j) * memory.table[j];
      }
      sum = TokenWarp::sum(sum);
    }
    if (TokenWarp::lane() == 0) memory.alpha_grad[i] = sum;
  }

  /// grad z of selector i from G, from the first bit to the last: each bit halves the codes, as its
  /// switch sums the two halves up, and its own gradient is their difference. Halves of 32 codes
  /// and more are those of one lane.
  __device__ __forceinline__ void grade_bits(int i, const Memory<T>& memory, T* grad_z) const {
    const int lane = TokenWarp::lane(), bits = call.num_bits;
    const Codes<T> codes(call, memory, i);
    const T shifted = memory.mass[i] + static_cast<T>(kPenaltyEpsilon);
    const T of_mass = -value_of(grad_penalty_sum) / (shifted * shifted);
    const T entropy = value_of(grad_entropy_sum);
    const bool has_weights = grad_weights != nullptr && !call.is_hard;
    const auto gradient_of = [&](int j) {
      if (j >= call.num_experts) return T{0};
      const T r = codes.reach(j);
      if (!(r > T{0})) return T{0};
      T sum = (has_weights ? memory.alpha[i] * memory.table[j] : T{0}) + of_mass;
      if (entropy != T{0}) sum += entropy * entropy_slope(r);
      return sum;
    };
    const T* const slope = memory.slope + i * bits;
    const auto write = [&](int n, T sum) {
      sum = TokenWarp::sum(sum);
      if (lane == 0) grad_z[bits - 1 - n] = slope[bits - 1 - n] * sum;
    };
    T* const grad = memory.code_grad;
    for (int c = lane; bits > kLaneBits && c < 1 << bits; c += kWarpSize) grad[c] = gradient_of(c);
    for (int n = bits - 1; n >= kLaneBits; --n) {
      const T zero = codes.shares[2 * (bits - 1 - n)], one = codes.shares[2 * (bits - 1 - n) + 1];
      T sum = 0;
      for (int c = lane; c < 1 << n; c += kWarpSize) {
        const T of_zero = grad[c], of_one = grad[c + (1 << n)];
        sum += codes.times(codes.of_lane, c, kLaneBits, n) * (of_one - of_zero);
        grad[c] = zero * of_zero + one * of_one;
      }
      write(n, sum);
    }
    T of_zero = bits > kLaneBits ? grad[lane] : gradient_of(lane);
    for (int n = (bits < kLaneBits ? bits : kLaneBits) - 1; n >= 0; --n) {
      const T zero = codes.shares[2 * (bits - 1 - n)], one = codes.shares[2 * (bits - 1 - n) + 1];
      const T of_one = __shfl_down_sync(kFullWarp, of_zero, 1u << n);
      const T sum = lane < 1 << n ? codes.last_bits(n) * (of_one - of_zero) : T{0};
      of_zero = zero * of_zero + one * of_one;
      write(n, sum);
    }
  }

  static __device__ __forceinline__ T value_of(const double* p) {
    return p == nullptr ? T{0} : static_cast<T>(*p);
  }
};

// ---- launch ------------------------------------------------------------------------------------
template <typename T>
Call<T> make_call(const DSelectKShape& shape, const DSelectKOptions& options,
                  const DSelectKInput& input) {
  return {static_cast<const T*>(input.logits),
          input.valid,
          static_cast<T>(options.gamma),
          static_cast<T>(options.min_weight),
          static_cast<int>(shape.num_experts),
          static_cast<int>(shape.num_selectors),
          static_cast<int>(dselect_k_bits(shape.num_experts)),
          options.hard_eval,
          options.renormalize};
}

}  // namespace

void cuda::dselect_k(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
                     const DSelectKInput& input, const DSelectKOutput& output,
                     const Stream& stream) {
  dispatch_float_dtype(dtype, "dselect_k", [&](auto tag) {
    using T = decltype(tag);
    const Call<T> call = make_call<T>(shape, options, input);
    const TokenSumTargets targets{
        {output.entropy_sum, output.penalty_sum, output.removed_weight},
        {output.num_switches, output.saturated_switches, output.non_finite_tokens}};
    for_each_token("dselect_k",
                   Forward<T>{call, static_cast<T*>(output.weights), output.entropy_sum != nullptr},
                   shape.num_tokens, elements_forward(call), targets, stream);
  });
}

void cuda::dselect_k_backward(const DSelectKShape& shape, const DSelectKOptions& options,
                              DType dtype, const DSelectKInput& input,
                              const DSelectKGradInput& grad, void* grad_logits,
                              const Stream& stream) {
  dispatch_float_dtype(dtype, "dselect_k_backward", [&](auto tag) {
    using T = decltype(tag);
    const Call<T> call = make_call<T>(shape, options, input);
    for_each_token("dselect_k_backward",
                   Backward<T>{call, static_cast<const T*>(grad.weights),
                               static_cast<const T*>(grad.grad_weights), grad.grad_entropy_sum,
                               grad.grad_penalty_sum, static_cast<T*>(grad_logits)},
                   shape.num_tokens, elements_backward(call), {}, stream);
  });
}

}  // namespace perseid::kernels
