#pragma once
#include <cstdint>

#include "gates/routing.h"

namespace perseid {

enum class DropPolicy : uint8_t {
  kPosition,     ///< keeps the first C of an expert in (choice, token) order
  kProbability,  ///< keeps the C largest weights, equal weights by (token, choice)
};

struct CapacityOptions {
  double capacity_factor = 0;  ///< <= 0: dropless
  int64_t capacity_min = 0;
  DropPolicy drop_policy = DropPolicy::kPosition;
  bool renormalize_after_drop = false;  ///< rescale a token's surviving weights to its old sum
};

/// C = max(capacity_min, ceil(capacity_factor * T * K / E)), at most T: assignments that one expert
/// takes from this rank. Computed in double as ceil(capacity_factor * (T * K) / E). Dropless: T.
/// @param num_tokens  T, valid tokens of this rank
int64_t expert_capacity(const CapacityOptions& options, int64_t num_tokens, int64_t top_k,
                        int64_t num_experts);

struct CappedRouting {
  gates::Routing routing;  ///< ragged if anything was dropped
  int64_t num_dropped = 0;
};

/// A pure function of the routing. Dropless options return it unchanged.
CappedRouting apply_capacity(const gates::Routing& routing, const CapacityOptions& options,
                             int64_t num_tokens, int64_t top_k, int64_t num_experts);
/// The same with a given C >= 0. Surviving weights are differentiable and keep their order; a token
/// that lost everything has an empty row. Cost is linear in the assignments.
CappedRouting drop_over_capacity(const gates::Routing& routing, int64_t capacity,
                                 const CapacityOptions& options, int64_t num_experts);

}  // namespace perseid
