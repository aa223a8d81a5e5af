// route in float32 with K <= 16 and E <= 1024, ids and softmax weights alone: the K largest logits
// of each row and the softmax over them. A warp has 32 / kWidth rows, with up to 16 logits in a
// lane, see kernels/router_select.cuh; lane k of a row ends with its choice k. No shared memory, no
// barrier. Reads T*E*4 B, and what it looks up again from the first-level cache; writes T*K*8 B.
// Arithmetic in float32. Deterministic. At E = 256 and K = 8 two tokens take 512 instructions in 32
// registers. One token a warp with its logits in registers takes 352; four take 720, but their
// accesses use 16 bytes of a line each. The other cases are in router_sums.cu and
// router_generic.cu.
#include "kernels/cuda_launchers.h"
#include "kernels/router_job.cuh"
#include "kernels/router_math.h"
#include "kernels/router_row.cuh"

namespace perseid::kernels {
namespace {

struct Choices {
  const float* logits;
  const uint8_t* valid;
  int32_t* expert_idx;
  float* weights;
  int64_t num_tokens;
  int num_experts;
  int top_k;
  float route_scale;
};

/// A whole warp compares integers, by one instruction; fewer lanes shuffle, and floats will do.
template <typename Key>
__device__ __forceinline__ Key key_of(float logit) {
  if constexpr (std::is_integral_v<Key>) return lean_key(logit);
  return fmaxf(logit, -std::numeric_limits<float>::infinity());
}

template <int kWidth, int kPerLane, int kChoices, bool kIsWhole>
__device__ __forceinline__ void route_row(const Choices& job) {
  const auto lane = static_cast<int>(threadIdx.x) % kWidth;
  const int64_t token = int64_t{blockIdx.x} * (kRouterThreads / kWidth) + threadIdx.x / kWidth;
  // Only whole warps leave.
  if (kWidth == kWarpSize && token >= job.num_tokens) return;
  const bool is_inside = token < job.num_tokens;
  const float* const row = job.logits + (is_inside ? token : job.num_tokens - 1) * job.num_experts;

  using Key = std::conditional_t<kWidth == kWarpSize, int32_t, float>;
  constexpr int kList = kListSize<kChoices, kPerLane>;
  const auto read_of = [&](int source, int begin, Key(&keys)[kList]) {
    float logits[kList];
    read_lane<kIsWhole>(row, job.num_experts, source * kPerLane + begin, logits);
#pragma unroll
    for (int i = 0; i < kList; ++i) keys[i] = key_of<Key>(logits[i]);
  };
  const int32_t choice = select_choice<kChoices, kWidth, kPerLane, Key>(
      [&](int begin, Key(&keys)[kList]) { read_of(lane, begin, keys); }, read_of);

  // A choice that counts as -inf may be a NaN, which has to show.
  const bool is_choice = lane < job.top_k;
  const float logit = is_choice ? row[choice] : 0.0f;
  const float first = __shfl_sync(kFullWarp, logit, 0, kWidth);
  const float max = is_nan(first) ? -std::numeric_limits<float>::infinity() : first;
  const float term = is_choice ? softmax_term(logit, max) : 0.0f;
  const float sum = sum_of_lanes<kChoices>(term);
  if (!is_inside || !is_choice) return;
  const bool is_valid = job.valid == nullptr || job.valid[token] != 0;
  const int64_t place = token * job.top_k + lane;
  if (job.expert_idx != nullptr) job.expert_idx[place] = is_valid ? choice : -1;
  if (job.weights != nullptr) {
    job.weights[place] = is_valid ? __fdividef(term * job.route_scale, sum) : 0.0f;
  }
}

// ---- kernels -----------------------------------------------------------------------------------
/// Registers: 32. Rows of up to 512 logits.
template <int kWidth, int kPerLane, int kChoices, bool kIsWhole>
__global__ void __launch_bounds__(kRouterThreads) route_choices_kernel(Choices job) {
  route_row<kWidth, kPerLane, kChoices, kIsWhole>(job);
}
/// Registers: 48. Longer rows.
template <int kWidth, int kPerLane, int kChoices, bool kIsWhole>
__global__ void __launch_bounds__(kRouterThreads) route_long_choices_kernel(Choices job) {
  route_row<kWidth, kPerLane, kChoices, kIsWhole>(job);
}

// ---- launch ------------------------------------------------------------------------------------
template <int kExperts, int kChoices>
void launch_choices(const Choices& job, const Stream& stream) {
  // At most 16 logits, 64 bytes, a lane: more would leave too little of each access to its line.
  constexpr int kFewest = kExperts / 16 < kWarpSize ? kExperts / 16 : kWarpSize;
  constexpr int kWidth = kChoices > kFewest ? kChoices : kFewest;
  constexpr int kPerLane = kExperts / kWidth;
  const int64_t blocks = ceil_div(job.num_tokens, kRouterThreads / kWidth);
  const auto launch_one = [&]<bool kIsWhole>() {
    if constexpr (kPerLane <= 16) {
      launch("route", &route_choices_kernel<kWidth, kPerLane, kChoices, kIsWhole>, blocks,
             kRouterThreads, stream, job);
    } else {
      launch("route", &route_long_choices_kernel<kWidth, kPerLane, kChoices, kIsWhole>, blocks,
             kRouterThreads, stream, job);
    }
  };
  const bool is_whole =
      job.num_experts == kExperts && reinterpret_cast<uintptr_t>(job.logits) % 16 == 0;
  if (is_whole) return launch_one.template operator()<true>();
  launch_one.template operator()<false>();
}

/// The smallest power of two that holds the row.
template <int kExperts>
void launch_row(const Choices& job, const Stream& stream) {
  if constexpr (kExperts < kRegisterExperts) {
    if (job.num_experts > kExperts) return launch_row<2 * kExperts>(job, stream);
  }
  dispatch_choices<kExperts>(
      job.top_k, [&]<int kChoices>() { launch_choices<kExperts, kChoices>(job, stream); });
}

}  // namespace

bool fits_registers(const RouterJob<float>& job) {
  return job.top_k <= kRegisterChoices && job.num_experts <= kRegisterExperts && !job.has_groups();
}

void route_choices(const RouterJob<float>& job, const Stream& stream) {
  const Choices choices{job.logits,
                        job.valid,
                        job.expert_idx,
                        job.weights,
                        job.num_tokens,
                        static_cast<int>(job.num_experts),
                        static_cast<int>(job.top_k),
                        job.route_scale};
  launch_row<1>(choices, stream);
}

// ---- the operation ----
void cuda::route(const RouterShape& shape, const RouterOptions& options, DType dtype,
                 const RouterInput& input, const RouterOutput& output, const Stream& stream) {
  dispatch_float_dtype(dtype, "route", [&](auto tag) {
    using T = decltype(tag);
    RouterJob<T> job{};
    job.num_tokens = shape.num_tokens;
    job.num_experts = shape.num_experts;
    job.top_k = shape.top_k;
    job.num_groups = options.num_groups;
    job.topk_groups = options.topk_groups;
    job.score_function = options.score_function;
    job.normalize = options.normalize;
    job.route_scale = static_cast<T>(options.route_scale);
    job.logits = static_cast<const T*>(input.logits);
    job.expert_bias = input.expert_bias;
    job.valid = input.valid;
    job.expert_idx = output.expert_idx;
    job.weights = static_cast<T*>(output.weights);
    job.score_sum = static_cast<T*>(output.score_sum);
    job.lse_square_sum = static_cast<T*>(output.lse_square_sum);
    job.tokens_per_expert = output.tokens_per_expert;
    job.non_finite_tokens = output.non_finite_tokens;
    job.score_shares = static_cast<T*>(output.score_shares);
    job.entropy_sum = output.entropy_sum;
    if (job.tokens_per_expert != nullptr) {
      fill_zero(job.tokens_per_expert, job.num_experts * int64_t{sizeof(int64_t)}, stream);
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      const bool is_plain = job.score_function == ScoreFunction::kSoftmax && job.normalize &&
                            job.expert_bias == nullptr && job.score_shares == nullptr &&
                            !job.has_sums();
      if (fits_registers(job)) {
        return is_plain ? route_choices(job, stream) : route_with_sums(job, stream);
      }
    }
    route_generic(job, stream);
  });
}

}  // namespace perseid::kernels
