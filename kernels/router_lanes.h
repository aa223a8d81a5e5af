#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/ordered_key.h"
#include "kernels/router_math.h"
#include "kernels/router_select.h"

// Softmax routing of few experts: kLanes tokens at a time, one in each lane, as the experts of one
// token would not fill a vector. A table of kLanes tokens is [row][kLanes]. Lanes without a plain
// row hold zeros; what they compute is finite and not used. Private to this folder.

namespace perseid::kernels {

/// Rows of 256 experts are as fast one by one.
inline constexpr int64_t kLaneExpertsMax = 128;

/// GCC takes comparisons of vectors apart, element by element, that are wider than registers.
inline bool has_lane_registers() {
#if defined(__clang__)
  return true;
#elif defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

template <typename T>
bool fits_lanes(const RouterShape& shape, const RouterOptions& options) {
  return std::is_same_v<T, float> && options.score_function == ScoreFunction::kSoftmax &&
         shape.num_experts <= kLaneExpertsMax && has_lane_registers();
}

PERSEID_INLINE bool has_lane(uint32_t lanes, int64_t lane) { return (lanes >> lane & 1U) != 0; }

PERSEID_INLINE bool is_valid(const RouterInput& input, int64_t t) {
  return input.valid == nullptr || input.valid[t] != 0;
}

/// Bits of the valid ones among tokens first .. first + count - 1.
PERSEID_INLINE uint32_t valid_lanes(const RouterInput& input, int64_t first, int64_t count) {
  uint32_t valid = 0;
  for (int64_t l = 0; l < count; ++l) {
    valid |= static_cast<uint32_t>(is_valid(input, first + l)) << l;
  }
  return valid;
}

/// The values of 8 lanes, in one register of 32 bytes.
typedef int32_t LaneKeys __attribute__((vector_size(32)));
inline constexpr int64_t kHalf = kLanes / 2;

PERSEID_INLINE void load_keys(const void* values, LaneKeys& keys) {
  std::memcpy(&keys, values, sizeof(keys));
}
PERSEID_INLINE void store_keys(const LaneKeys& keys, int32_t* values) {
  std::memcpy(values, &keys, sizeof(keys));
}

/// Working memory of one thread for `num_experts` experts.
struct LaneRows {
  LaneRows(int64_t num_experts, int64_t top_k)
      : logits(num_experts * kLanes),
        keys(num_experts * kLanes),
        exps(num_experts * kLanes),
        choices(top_k * kLanes),
        choice_idx(top_k * kLanes) {}
  LaneBuffer<float> logits;
  LaneBuffer<int32_t> keys;  ///< used up by a selection
  LaneBuffer<float> exps;
  LaneBuffer<float> choices;       ///< [K] logits of the choices, then their weights
  LaneBuffer<int32_t> choice_idx;  ///< [K]
  alignas(64) float max[kLanes] = {};
  alignas(64) float exp_sum[kLanes] = {};
  uint32_t plain = 0;       ///< bit l: the row of lane l has no NaN and a finite maximum
  uint32_t non_finite = 0;  ///< bit l: a NaN or an infinity
};

/// Reads `count` rows of logits; `used` has the bits of those that are to be looked at.
PERSEID_INLINE void read_lanes(const float* logits, int64_t num_experts, int64_t count,
                               uint32_t used, LaneRows& rows) {
  float* const z = rows.logits.data();
  int32_t* const keys = rows.keys.data();
  if (count == kLanes) {
    for (int64_t e = 0; e < num_experts; ++e) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) z[e * kLanes + l] = logits[l * num_experts + e];
    }
  } else {
    for (int64_t e = 0; e < num_experts; ++e) {
      for (int64_t l = 0; l < kLanes; ++l) {
        z[e * kLanes + l] = l < count ? logits[l * num_experts + e] : 0.0F;
      }
    }
  }
  for (int64_t e = 0; e < num_experts; ++e) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) keys[e * kLanes + l] = signed_key(z[e * kLanes + l]);
  }
  alignas(64) int32_t max_keys[kLanes], magnitudes[kLanes];
  for (int64_t half = 0; half < kLanes; half += kHalf) {
    LaneKeys max_key = LaneKeys{} + kLowestKey<float>, max_magnitude = LaneKeys{};
    for (int64_t e = 0; e < num_experts; ++e) {
      LaneKeys key, bits;
      load_keys(keys + e * kLanes + half, key);
      load_keys(z + e * kLanes + half, bits);
      const LaneKeys magnitude = bits & 0x7FFFFFFF;
      max_key = key > max_key ? key : max_key;
      max_magnitude = magnitude > max_magnitude ? magnitude : max_magnitude;
    }
    store_keys(max_key, max_keys + half);
    store_keys(max_magnitude, magnitudes + half);
  }
  rows.plain = rows.non_finite = 0;
  for (int64_t l = 0; l < kLanes; ++l) {
    const auto facts = facts_of<float>(max_keys[l], static_cast<uint32_t>(magnitudes[l]));
    rows.max[l] = facts.max;
    rows.plain |= static_cast<uint32_t>(facts.is_plain) << l;
    rows.non_finite |= static_cast<uint32_t>(facts.is_non_finite) << l;
  }
  rows.plain &= used;
  rows.non_finite &= used;
  if (rows.plain == (1U << kLanes) - 1) return;
  for (int64_t l = 0; l < kLanes; ++l) {
    if (has_lane(rows.plain, l)) continue;
    rows.max[l] = 0;
    for (int64_t e = 0; e < num_experts; ++e) z[e * kLanes + l] = 0;
    for (int64_t e = 0; e < num_experts; ++e) keys[e * kLanes + l] = 0;
  }
}

/// e^(z - max) and their sums over the experts.
PERSEID_INLINE void exp_lanes(int64_t num_experts, LaneRows& rows) {
  const float *const z = rows.logits.data(), *const max = rows.max;
  float *const exps = rows.exps.data(), *const sum = rows.exp_sum;
  for (int64_t l = 0; l < kLanes; ++l) sum[l] = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const float term = exp_of(z[e * kLanes + l] - max[l]);
      exps[e * kLanes + l] = term;
      sum[l] += term;
    }
  }
}

/// The larger key and its place; of equal keys the first.
struct LaneBest {
  LaneKeys key, index;
};
PERSEID_INLINE void take_larger(const LaneKeys& key, const LaneKeys& index, LaneBest& best) {
  const LaneKeys is_larger = key > best.key;
  best.key = is_larger ? key : best.key;
  best.index = is_larger ? index : best.index;
}

/// The K largest logits of each lane and their experts, equal ones by smaller id. Takes K passes.
PERSEID_INLINE void select_lanes(int64_t num_experts, int64_t top_k, LaneRows& rows) {
  const LaneKeys below_all = LaneKeys{} + std::numeric_limits<int32_t>::lowest();
  const int64_t middle = num_experts / 2;
  for (int64_t half = 0; half < kLanes; half += kHalf) {
    int32_t* const keys = rows.keys.data() + half;
    LaneKeys taken = LaneKeys{} - 1;
    for (int64_t k = 0; k < top_k; ++k) {
      const auto look_at = [&](int64_t e, LaneBest & best) __attribute__((always_inline)) {
        const LaneKeys index = LaneKeys{} + static_cast<int32_t>(e);
        LaneKeys key;
        load_keys(keys + e * kLanes, key);
        key = taken == index ? below_all : key;
        store_keys(key, keys + e * kLanes);
        take_larger(key, index, best);
      };
      // Two at a time, as each step waits for the one before.
      LaneBest best = {below_all, LaneKeys{}}, upper = best;
      for (int64_t e = 0; e < middle; ++e) {
        look_at(e, best);
        look_at(middle + e, upper);
      }
      if (num_experts % 2 == 1) look_at(num_experts - 1, upper);
      take_larger(upper.key, upper.index, best);
      taken = best.index;
      store_keys(best.index, rows.choice_idx.data() + k * kLanes + half);
      alignas(32) int32_t best_keys[kHalf];
      store_keys(best.key, best_keys);
      float* const choices = rows.choices.data() + k * kLanes + half;
#pragma omp simd
      for (int64_t l = 0; l < kHalf; ++l) choices[l] = value_of_key<float>(best_keys[l]);
    }
  }
}

/// Turns the logits of the choices into weights; without `normalize` after exp_lanes.
PERSEID_INLINE void weigh_lanes(const RouterOptions& options, int64_t top_k, LaneRows& rows) {
  float* const choices = rows.choices.data();
  alignas(64) float sum[kLanes] = {}, scale[kLanes];
  for (int64_t k = 0; k < top_k; ++k) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const float score = exp_of(choices[k * kLanes + l] - rows.max[l]);
      choices[k * kLanes + l] = score;
      sum[l] += score;
    }
  }
  const auto route_scale = static_cast<float>(options.route_scale);
#pragma omp simd
  for (int64_t l = 0; l < kLanes; ++l) {
    scale[l] = route_scale / (options.normalize ? sum[l] : rows.exp_sum[l]);
  }
  for (int64_t k = 0; k < top_k; ++k) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) choices[k * kLanes + l] *= scale[l];
  }
}

}  // namespace perseid::kernels
