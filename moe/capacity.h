#pragma once
#include <cstdint>

#include "gates/routing.h"

namespace perseid {

enum class DropPolicy : uint8_t {
  kPosition,     ///< keeps the first C of an expert in (choice, token) order
  kProbability,  ///< keeps the C largest weights, equal weights by (token, choice)
  /// Like kPosition, but tokens of larger weight come first: (choice, largest weight of the token
  /// descending, token). Batch priority of V-MoE; not causal.
  kBatchPriority,
  /// Like kPosition, but in a random order of tokens, keyed by their global ids; kPosition outside
  /// of training.
  kRandom,
  /// One expert for each token: the first of its choices that has room, all first choices before
  /// all second ones (no token left behind, Switch). The choices of the gate are candidates, so use
  /// it with several of them and weights that need no others (Normalization::kAll). Statistics and
  /// balance terms of the gate count candidates.
  kNoTokenLeftBehind,
};

struct CapacityOptions {
  double capacity_factor = 0;  ///< <= 0: dropless
  int64_t capacity_min = 0;
  DropPolicy drop_policy = DropPolicy::kPosition;
  bool renormalize_after_drop = false;  ///< rescale a token's surviving weights to its old sum
  uint64_t seed = 0;                    ///< of kRandom
};

/// What a random order is keyed by, beside the seed.
struct DropContext {
  bool training = false;
  int64_t step = 0;
  int64_t layer_id = 0;
  int64_t first_token = 0;  ///< global id of token 0 of this rank
};

/// C = max(capacity_min, ceil(capacity_factor * T * K / E)), at most T: assignments that one expert
/// takes from this rank. Computed in double as ceil(capacity_factor * (T * K) / E). Dropless: T.
/// @param num_tokens  T, valid tokens of this rank
int64_t expert_capacity(const CapacityOptions& options, int64_t num_tokens, int64_t top_k,
                        int64_t num_experts);

struct CappedRouting {
  gates::Routing routing;   ///< ragged if anything was dropped
  int64_t num_dropped = 0;  ///< assignments; kNoTokenLeftBehind: tokens that lost all candidates
};

/// A pure function of the routing. Dropless options return it unchanged. With kNoTokenLeftBehind C
/// is that of top_k = 1, and a capacity_factor is needed.
CappedRouting apply_capacity(const gates::Routing& routing, const CapacityOptions& options,
                             int64_t num_tokens, int64_t top_k, int64_t num_experts,
                             const DropContext& context = {});
/// The same with a given C >= 0. Surviving weights are differentiable and keep their order; a token
/// that lost everything has an empty row. Cost is linear in the assignments.
CappedRouting drop_over_capacity(const gates::Routing& routing, int64_t capacity,
                                 const CapacityOptions& options, int64_t num_experts,
                                 const DropContext& context = {});

}  // namespace perseid
