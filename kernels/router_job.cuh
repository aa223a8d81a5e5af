#pragma once
#include <cstdint>

#include "kernels/device_memory.h"
#include "kernels/launch.cuh"
#include "kernels/router.h"
#include "kernels/simd.h"

// What the kernels of the router share: the arguments of one call, and the sums over tokens. A sum
// has one part for each block of tokens, in double; a last kernel adds the parts in a fixed order.
// The number of parts depends on the number of tokens alone, so the bits do as well. Private to
// this folder.

namespace perseid::kernels {

inline constexpr int kRouterThreads = 128;

template <typename T>
struct RouterJob {
  int64_t num_tokens, num_experts, top_k;
  int64_t num_groups, topk_groups;
  ScoreFunction score_function;
  bool normalize;
  T route_scale;
  const T* logits;
  const float* expert_bias;
  const uint8_t* valid;
  int32_t* expert_idx;
  T* weights;
  T* score_sum;
  T* lse_square_sum;
  int64_t* tokens_per_expert;  ///< zeros before
  int64_t* non_finite_tokens;
  T* score_shares;
  double* entropy_sum;
  double* score_parts;   ///< [parts, E] of score_sum
  double* scalar_parts;  ///< [parts, 3] of lse_square_sum, entropy_sum and non_finite_tokens

  PERSEID_INLINE bool has_groups() const { return num_groups > 1; }
  bool has_sums() const {
    return score_sum != nullptr || lse_square_sum != nullptr || tokens_per_expert != nullptr ||
           non_finite_tokens != nullptr || entropy_sum != nullptr;
  }
};

/// Sums of one thread.
struct ScalarSums {
  double lse_square = 0;
  double entropy = 0;
  double non_finite = 0;
};

/// Device memory for `parts` parts of each sum.
template <typename T>
DeviceMemory make_parts(int64_t parts, const Stream& stream, RouterJob<T>& job) {
  DeviceMemory memory(parts * (job.num_experts + 3) * int64_t{sizeof(double)}, stream);
  job.scalar_parts = memory.as<double>();
  job.score_parts = job.scalar_parts + 3 * parts;
  return memory;
}

/// Adds the parts and writes score_sum, lse_square_sum, entropy_sum and non_finite_tokens.
template <typename T>
void finish_sums(const RouterJob<T>& job, int64_t parts, const Stream& stream);

inline constexpr int kRegisterExperts = 1024;
inline constexpr int kRegisterChoices = 16;
/// K <= 16 and E <= 1024 in float32 without groups: rows in registers.
bool fits_registers(const RouterJob<float>& job);
/// Softmax over the choices, neither bias nor sums: ids and weights alone.
void route_choices(const RouterJob<float>& job, const Stream& stream);
void route_with_sums(RouterJob<float>& job, const Stream& stream);
/// Any E, K and groups.
template <typename T>
void route_generic(RouterJob<T>& job, const Stream& stream);

/// Calls body with kChoices, the smallest power of two that is at least K <= kMax, as its template
/// argument.
template <int kMax, int kChoices = 1, typename Body>
void dispatch_choices(int64_t top_k, Body body) {
  if constexpr (2 * kChoices <= kMax && 2 * kChoices <= kRegisterChoices) {
    if (top_k > kChoices) return dispatch_choices<kMax, 2 * kChoices>(top_k, body);
  }
  body.template operator()<kChoices>();
}

}  // namespace perseid::kernels
