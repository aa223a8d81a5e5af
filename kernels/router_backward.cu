// route_backward: one warp a row, which reads it three times, from memory and then from the
// first-level cache: for its maximum, for the sums that the terms need, and to write the gradients.
// Reads T*(E + 2*K) and writes T*E elements; E more are read if the shares have gradients. Two
// exponentials for each logit if a term reaches all experts, else one for each choice. Arithmetic
// in the type of the logits. No atomics; deterministic. Any E and K.
#include "kernels/cuda_launchers.h"
#include "kernels/router_job.cuh"
#include "kernels/router_math.h"
#include "kernels/router_row.cuh"

namespace perseid::kernels {
namespace {

constexpr int kWarps = kRouterThreads / kWarpSize;

template <typename T>
struct BackwardJob {
  int64_t num_tokens, num_experts, top_k;
  ScoreFunction score_function;
  bool normalize;
  T route_scale;
  const T* logits;
  const uint8_t* valid;
  const int32_t* expert_idx;
  const T* grad_weights;
  const T* grad_score_sum;
  const T* grad_lse_square_sum;
  const T* grad_score_shares;
  T* grad_logits;
};

/// One token's arrays.
template <typename T>
struct TokenJob {
  const T* row;
  const int32_t* expert_idx;
  const T* grad_weights;
  const T* grad_shares;
  T* grad_row;
};

/// How the gradient of a row follows from its logits: each entry is, summed over the parts,
/// share * scale * (grad + offset) * slope.
template <typename T>
struct Part {
  bool is_on = false;
  T scale = 0;
  T offset = 0;
};

template <typename T>
__device__ __forceinline__ T sum_of_warp(T value) {
  return sum_of_lanes<kWarpSize>(value);
}
template <typename T>
__device__ __forceinline__ T max_of_warp(SignedKey<T> key) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const SignedKey<T> other = __shfl_xor_sync(kFullWarp, key, offset);
    key = other > key ? other : key;
  }
  return value_of_key<T>(key);
}

template <typename T>
__device__ __forceinline__ T max_of_row(const BackwardJob<T>& job, const T* row) {
  SignedKey<T> max_key = std::numeric_limits<SignedKey<T>>::lowest();
  for (int64_t e = threadIdx.x % kWarpSize; e < job.num_experts; e += kWarpSize) {
    const SignedKey<T> key = signed_key(row[e]);
    max_key = key > max_key ? key : max_key;
  }
  return max_of_warp<T>(max_key);
}

PERSEID_INLINE bool is_expert(int32_t e, int64_t num_experts) { return e >= 0 && e < num_experts; }

/// Gradient of one share.
template <typename T>
__device__ __forceinline__ T grad_of_share(const BackwardJob<T>& job, const TokenJob<T>& token,
                                           int64_t e) {
  const T own = token.grad_shares == nullptr ? T{0} : token.grad_shares[e];
  return job.grad_score_sum == nullptr ? own : own + job.grad_score_sum[e];
}

/// The softmax over all experts: p_e (h_e - sum of p h + 2 lse dlse), where h is the gradient of
/// p_e by weights and shares.
template <typename T>
__device__ __forceinline__ Part<T> softmax_part(const BackwardJob<T>& job, const TokenJob<T>& token,
                                                T max, bool has_shares, bool has_weights) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  T sum = 0, mean = 0;
  for (int64_t e = lane; e < job.num_experts; e += kWarpSize) {
    const T term = softmax_term(token.row[e], max);
    sum += term;
    if (has_shares) mean += term * grad_of_share(job, token, e);
  }
  for (int64_t k = lane; has_weights && k < job.top_k; k += kWarpSize) {
    const int32_t e = token.expert_idx[k];
    if (!is_expert(e, job.num_experts)) continue;
    mean += softmax_term(token.row[e], max) * (job.route_scale * token.grad_weights[k]);
  }
  sum = sum_of_warp(sum);
  mean = sum_of_warp(mean);
  const T grad_lse = job.grad_lse_square_sum == nullptr ? T{0} : *job.grad_lse_square_sum;
  const T shift =
      grad_lse == T{0} ? T{0} : T{2} * static_cast<T>(log_sum_exp_of(max, sum)) * grad_lse;
  Part<T> part;
  // Where the maximum is infinite the shares are a convention, unless there is a NaN.
  part.is_on = !is_infinite(max) || is_nan(sum);
  part.scale = T{1} / sum;
  part.offset = shift - mean * part.scale;
  return part;
}

/// The shares of other scores: q_e (g_e - sum of q g) dlog s_e / dz_e.
template <typename T>
__device__ __forceinline__ Part<T> share_part(const BackwardJob<T>& job, const TokenJob<T>& token,
                                              T max, T c, T floor) {
  T sum = 0, mean = 0;
  for (int64_t e = threadIdx.x % kWarpSize; e < job.num_experts; e += kWarpSize) {
    const T term = share_term(job.score_function, token.row[e], max, c, floor);
    sum += term;
    mean += term * grad_of_share(job, token, e);
  }
  sum = sum_of_warp(sum);
  mean = sum_of_warp(mean);
  Part<T> part;
  part.is_on = !has_share_convention(job.score_function, max) || is_nan(sum);
  part.scale = T{1} / sum;
  part.offset = -mean * part.scale;
  return part;
}

/// Weights that depend on the choices alone: adds to the entries of the choices.
template <typename T>
__device__ __forceinline__ void add_choice_terms(const BackwardJob<T>& job,
                                                 const TokenJob<T>& token) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool is_softmax = job.score_function == ScoreFunction::kSoftmax;
  T max = 0;
  if (is_softmax) {
    SignedKey<T> max_key = std::numeric_limits<SignedKey<T>>::lowest();
    for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
      const int32_t e = token.expert_idx[k];
      if (!is_expert(e, job.num_experts)) continue;
      const SignedKey<T> key = signed_key(token.row[e]);
      max_key = key > max_key ? key : max_key;
    }
    max = max_of_warp<T>(max_key);
  }
  const auto score = [&](T z) {
    return is_softmax ? softmax_term(z, max) : score_of(job.score_function, z);
  };
  T sum = 0, mean = 0;
  for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
    const int32_t e = token.expert_idx[k];
    if (is_expert(e, job.num_experts)) sum += score(token.row[e]);
  }
  sum = sum_of_warp(sum) + (is_softmax ? T{0} : T{1e-20});
  for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
    const int32_t e = token.expert_idx[k];
    if (!is_expert(e, job.num_experts)) continue;
    mean += score(token.row[e]) / sum * token.grad_weights[k];  // the gradient itself for K = 1
  }
  mean = sum_of_warp(mean);
  // Infinite scores that are normalized share by a convention.
  const bool is_convention =
      is_softmax ? is_infinite(max) && !is_nan(sum) : sum == std::numeric_limits<T>::infinity();
  if (job.normalize && is_convention) return;
  for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
    const int32_t e = token.expert_idx[k];
    if (!is_expert(e, job.num_experts)) continue;
    const T z = token.row[e];
    const T grad = job.normalize ? (token.grad_weights[k] - mean) / sum : token.grad_weights[k];
    token.grad_row[e] += job.route_scale * grad * choice_slope(job.score_function, score(z), z);
  }
}

template <typename T>
__device__ __forceinline__ void backward_row(const BackwardJob<T>& job, const TokenJob<T>& token) {
  const auto lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool is_softmax = job.score_function == ScoreFunction::kSoftmax;
  const bool has_shares = job.grad_score_sum != nullptr || token.grad_shares != nullptr;
  const bool has_weights = token.grad_weights != nullptr;
  const bool has_all_weights = has_weights && is_softmax && !job.normalize;
  Part<T> softmax, share;
  T max = 0, c = 0, floor = 1;
  if (has_shares || has_all_weights || job.grad_lse_square_sum != nullptr) {
    max = max_of_row(job, token.row);
    c = share_shift(max);
    floor = exp_of(-c);
  }
  if (has_all_weights || (is_softmax && has_shares) || job.grad_lse_square_sum != nullptr) {
    softmax = softmax_part(job, token, max, is_softmax && has_shares, has_all_weights);
  }
  if (!is_softmax && has_shares) share = share_part(job, token, max, c, floor);

  const auto softmax_grad = [&](int64_t e, T grad) {
    if (is_softmax && has_shares) grad += grad_of_share(job, token, e);
    return softmax_term(token.row[e], max) * softmax.scale * (grad + softmax.offset);
  };
  for (int64_t e = lane; e < job.num_experts; e += kWarpSize) {
    T grad = softmax.is_on ? softmax_grad(e, T{0}) : T{0};
    if (share.is_on) {
      const T z = token.row[e];
      const T term = share_term(job.score_function, z, max, c, floor) * share.scale *
                     (grad_of_share(job, token, e) + share.offset);
      grad += term * log_slope_of(job.score_function, z);
    }
    token.grad_row[e] = grad;
  }
  __syncwarp();
  if (has_all_weights && softmax.is_on) {
    for (int64_t k = lane; k < job.top_k; k += kWarpSize) {
      const int32_t e = token.expert_idx[k];
      if (!is_expert(e, job.num_experts)) continue;
      token.grad_row[e] = softmax_grad(e, job.route_scale * token.grad_weights[k]);
    }
  }
  if (has_weights && !has_all_weights) add_choice_terms(job, token);
}

// ---- kernel ------------------------------------------------------------------------------------
/// Registers: 96.
template <typename T>
__global__ void __launch_bounds__(kRouterThreads) route_backward_kernel(BackwardJob<T> job) {
  const int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (t >= job.num_tokens) return;
  const int64_t first = t * job.num_experts;
  if (job.valid != nullptr && job.valid[t] == 0) {
    for (int64_t e = threadIdx.x % kWarpSize; e < job.num_experts; e += kWarpSize) {
      job.grad_logits[first + e] = T{0};
    }
    return;
  }
  const bool has_weights = job.grad_weights != nullptr;
  backward_row(
      job, TokenJob<T>{job.logits + first, has_weights ? job.expert_idx + t * job.top_k : nullptr,
                       has_weights ? job.grad_weights + t * job.top_k : nullptr,
                       job.grad_score_shares == nullptr ? nullptr : job.grad_score_shares + first,
                       job.grad_logits + first});
}

}  // namespace

// ---- launch ------------------------------------------------------------------------------------
void cuda::route_backward(const RouterShape& shape, const RouterOptions& options, DType dtype,
                          const RouterInput& input, const RouterGradInput& grad, void* grad_logits,
                          const Stream& stream) {
  dispatch_float_dtype(dtype, "route_backward", [&](auto tag) {
    using T = decltype(tag);
    BackwardJob<T> job{};
    job.num_tokens = shape.num_tokens;
    job.num_experts = shape.num_experts;
    job.top_k = shape.top_k;
    job.score_function = options.score_function;
    job.normalize = options.normalize;
    job.route_scale = static_cast<T>(options.route_scale);
    job.logits = static_cast<const T*>(input.logits);
    job.valid = input.valid;
    job.expert_idx = grad.expert_idx;
    job.grad_weights = static_cast<const T*>(grad.grad_weights);
    job.grad_score_sum = static_cast<const T*>(grad.grad_score_sum);
    job.grad_lse_square_sum = static_cast<const T*>(grad.grad_lse_square_sum);
    job.grad_score_shares = static_cast<const T*>(grad.grad_score_shares);
    job.grad_logits = static_cast<T*>(grad_logits);
    launch("route_backward", &route_backward_kernel<T>, ceil_div(job.num_tokens, kWarps),
           kRouterThreads, stream, job);
  });
}

}  // namespace perseid::kernels
