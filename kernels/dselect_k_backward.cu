// dselect_k_backward: one warp a token, see kernels/dselect_k_warp.cuh. Reads T*(K*(bits+1) + 2E)
// and writes T*K*(bits+1) elements. DSelectKMemory of a token: shares and slopes of the bits, a
// table of E and 2^bits values, in shared memory up to 40 KB. Sums in the type of the logits in a
// fixed order. Limit: 2^31 - 1 values of a token.
#include "kernels/cuda_launchers.h"
#include "kernels/dselect_k_warp.cuh"

namespace perseid::kernels {
namespace {

template <typename T>
struct Backward {
  using Element = T;
  static constexpr bool kHasSums = false;
  DSelectKCall<T> call;
  const T* weights;
  const T* grad_weights;  ///< or null
  const double* grad_entropy_sum;
  const double* grad_penalty_sum;
  T* grad_logits;

  __device__ void operator()(int64_t t, T* at) const {
    const DSelectKMemory<T> memory(call, at);
    const T* const logits = call.logits + t * call.row_size();
    T* const grad_z = grad_logits + t * call.row_size();
    T* const grad_omega = grad_z + call.num_switches();
    if (!call.is_valid(t)) return fill_row(grad_z, call.row_size(), T{0});
    if (read_selector_row<true>(call, logits, memory).has_nan) {
      return fill_row(grad_z, call.row_size(), std::numeric_limits<T>::quiet_NaN());
    }
    bool has_gradient = false;
    if (grad_weights != nullptr) {
      has_gradient = share_weight(call, logits + call.num_switches(), memory);
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

  __device__ __forceinline__ LargestOfWarp<T> largest_of(const DSelectKCodes<T>& codes) const {
    LargestOfWarp<T> largest;
    PERSEID_ROLLED
    for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
      largest.add(codes.reach(j), j);
    }
    largest.join();
    return largest;
  }

  /// The mass of each selector; returns what the forward divided the weights by.
  __device__ __forceinline__ T weigh_selectors(const DSelectKMemory<T>& memory) const {
    T total = 0;
    for (int i = 0; i < call.num_selectors; ++i) {
      const DSelectKCodes<T> codes(call, memory, i);
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
                                                 const DSelectKMemory<T>& memory) const {
    const T* const g = weights + t * call.num_experts;
    const T* const upstream = grad_weights + t * call.num_experts;
    T mean = 0;
    PERSEID_ROLLED
    for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
      const T rho = g[j] > T{0} ? upstream[j] : T{0};
      memory.table[j] = rho;
      mean += g[j] * rho;
    }
    if (call.is_renormalized) {
      mean = TokenWarp::sum(mean);
      PERSEID_ROLLED
      for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
        memory.table[j] = (memory.table[j] - mean) / divisor;
      }
    }
    TokenWarp::sync();
  }

  __device__ __forceinline__ void grade_alpha(int i, const DSelectKMemory<T>& memory) const {
    const DSelectKCodes<T> codes(call, memory, i);
    T sum = 0;
    if (call.is_hard) {
      const LargestOfWarp<T> largest = largest_of(codes);
      sum = largest.value > T{0} ? memory.table[call.expert_of(i, largest.index)] : T{0};
    } else {
      PERSEID_ROLLED
      for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
        sum += codes.reach(j) * memory.table[call.expert_of(i, j)];
      }
      sum = TokenWarp::sum(sum);
    }
    if (TokenWarp::lane() == 0) memory.alpha_grad[i] = sum;
  }

  /// grad z of selector i from G, from the first bit to the last: each bit halves the codes, as its
  /// switch sums the two halves up, and its own gradient is their difference. Halves of 32 codes
  /// and more are those of one lane.
  __device__ __forceinline__ void grade_bits(int i, const DSelectKMemory<T>& memory,
                                             T* grad_z) const {
    const int lane = TokenWarp::lane(), bits = call.num_bits;
    const DSelectKCodes<T> codes(call, memory, i);
    const T shifted = memory.mass[i] + static_cast<T>(kPenaltyEpsilon);
    const T of_mass = -value_of(grad_penalty_sum) / (shifted * shifted);
    const T entropy = value_of(grad_entropy_sum);
    const bool has_weights = grad_weights != nullptr && !call.is_hard;
    const auto gradient_of = [&](int j) {
      if (j >= call.num_experts) return T{0};
      const T r = codes.reach(j);
      if (!(r > T{0})) return T{0};
      T sum = (has_weights ? memory.alpha[i] * memory.table[call.expert_of(i, j)] : T{0}) + of_mass;
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
      PERSEID_ROLLED
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

}  // namespace

void cuda::dselect_k_backward(const DSelectKShape& shape, const DSelectKOptions& options,
                              DType dtype, const DSelectKInput& input,
                              const DSelectKGradInput& grad, void* grad_logits,
                              const Stream& stream) {
  dispatch_float_dtype(dtype, "dselect_k_backward", [&](auto tag) {
    using T = decltype(tag);
    const DSelectKCall<T> call = make_dselect_k_call<T>(shape, options, input);
    for_each_token("dselect_k_backward",
                   Backward<T>{call, static_cast<const T*>(grad.weights),
                               static_cast<const T*>(grad.grad_weights), grad.grad_entropy_sum,
                               grad.grad_penalty_sum, static_cast<T*>(grad_logits)},
                   shape.num_tokens, elements_backward(call), {}, stream);
  });
}

}  // namespace perseid::kernels
