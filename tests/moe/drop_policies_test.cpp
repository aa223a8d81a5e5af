// Orders in which tokens take the places of an expert, beyond the position.
//   BatchPriority     first C by (choice, largest weight of the token, token), by sorting
//   Random            first C by (choice, keyed draw); keyed by global token; position in
//   evaluation NoTokenLeftBehind against a walk by definition; first choices first; counts tokens,
//   not pairs Invariants        kept <= C, no gap that a dropped pair could have used
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "gates/top_k_gate.h"
#include "kernels/random.h"
#include "moe/capacity.h"
#include "tests/closed_form.h"
#include "tests/config_error.h"

namespace perseid {
namespace {

using testing::config_error;
using testing::same_bits;

constexpr int64_t kTokens = 41, kExperts = 7, kChoices = 3;
constexpr DropContext kTraining{true, 5, 2, 100};

/// K choices per token with skewed experts and few distinct weights.
gates::Routing make_routing() {
  const kernels::RandomKey key = kernels::random_key(3);
  at::Tensor logits = at::empty({kTokens, kExperts}, at::kDouble);
  for (int64_t i = 0; i < logits.numel(); ++i) {
    logits.data_ptr<double>()[i] =
        static_cast<double>(kernels::random_below(key, static_cast<uint64_t>(i), 5)) -
        static_cast<double>(i % kExperts);
  }
  const auto [weights, ids] = logits.softmax(1).sort(/*stable=*/true, 1, true);
  return gates::routing_from_table(ids.slice(1, 0, kChoices), weights.slice(1, 0, kChoices),
                                   kExperts);
}

struct Pair {
  std::array<double, 3> key;  ///< by which places are given
  int64_t assignment, token, expert;
};

std::vector<Pair> pairs_of(const gates::Routing& routing,
                           const std::function<double(int64_t)>& token_key) {
  std::vector<Pair> pairs;
  for (int64_t a = 0; a < routing.num_assignments(); ++a) {
    const int64_t t = a / kChoices;
    pairs.push_back({{static_cast<double>(a % kChoices), token_key(t), static_cast<double>(t)},
                     a,
                     t,
                     routing.expert_idx[a].item<int64_t>()});
  }
  std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.key < b.key; });
  return pairs;
}

std::vector<int64_t> kept_pairs(const CappedRouting& capped, const gates::Routing& routing) {
  // Weights are not unique, so places are found through (token, expert).
  std::vector<int64_t> kept;
  const at::Tensor offsets = gates::explicit_offsets(capped.routing);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t i = offsets[t].item<int64_t>(); i < offsets[t + 1].item<int64_t>(); ++i) {
      for (int64_t k = 0; k < kChoices; ++k) {
        const int64_t a = t * kChoices + k;
        if (routing.expert_idx[a].item<int64_t>() == capped.routing.expert_idx[i].item<int64_t>()) {
          kept.push_back(a);
          EXPECT_TRUE(same_bits(routing.weights[a], capped.routing.weights[i]));
        }
      }
    }
  }
  return kept;
}

std::vector<int64_t> expected_first(const std::vector<Pair>& pairs, int64_t capacity) {
  std::vector<int64_t> taken(kExperts, 0), kept;
  for (const Pair& pair : pairs) {
    if (taken[static_cast<size_t>(pair.expert)]++ < capacity) kept.push_back(pair.assignment);
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

CapacityOptions with_policy(DropPolicy policy) {
  CapacityOptions options;
  options.drop_policy = policy;
  options.seed = 9;
  return options;
}

double draw(int64_t token) {
  const kernels::RandomKey key = kernels::random_key(9).with(5).with(2);
  return static_cast<double>(kernels::random_bits(key, static_cast<uint64_t>(100 + token)) >> 11);
}

TEST(DropPolicies, BatchPriority) {
  const gates::Routing routing = make_routing();
  const auto pairs =
      pairs_of(routing, [&](int64_t t) { return -routing.weights[t * kChoices].item<double>(); });
  for (const int64_t capacity : {0, 1, 6, 20, 41, 99}) {
    const CappedRouting capped = drop_over_capacity(
        routing, capacity, with_policy(DropPolicy::kBatchPriority), kExperts, kTraining);
    const auto kept = kept_pairs(capped, routing);
    EXPECT_EQ(kept, expected_first(pairs, capacity)) << capacity;
    EXPECT_EQ(capped.num_dropped, routing.num_assignments() - static_cast<int64_t>(kept.size()));
  }
}

TEST(DropPolicies, BatchPriorityPutsNanLast) {
  gates::Routing routing = gates::routing_from_table(at::zeros({3, 1}, at::kLong),
                                                     at::tensor({NAN, .25f, .5f}).unsqueeze(1), 1);
  const CappedRouting capped =
      drop_over_capacity(routing, 1, with_policy(DropPolicy::kBatchPriority), 1);
  EXPECT_TRUE(at::equal(capped.routing.token_offsets, at::tensor({0, 0, 0, 1}, at::kInt)));
}

TEST(DropPolicies, Random) {
  const gates::Routing routing = make_routing();
  const auto random = with_policy(DropPolicy::kRandom);
  const auto pairs = pairs_of(routing, draw);
  for (const int64_t capacity : {0, 1, 6, 20, 41}) {
    const CappedRouting capped = drop_over_capacity(routing, capacity, random, kExperts, kTraining);
    EXPECT_EQ(kept_pairs(capped, routing), expected_first(pairs, capacity)) << capacity;
    const CappedRouting evaluation = drop_over_capacity(routing, capacity, random, kExperts);
    const CappedRouting position =
        drop_over_capacity(routing, capacity, with_policy(DropPolicy::kPosition), kExperts);
    EXPECT_TRUE(same_bits(evaluation.routing.expert_idx, position.routing.expert_idx));
    EXPECT_TRUE(same_bits(evaluation.routing.token_offsets, position.routing.token_offsets));
  }
  // Another step, layer or seed is another order.
  const auto kept = [&](const CapacityOptions& options, const DropContext& context) {
    return kept_pairs(drop_over_capacity(routing, 3, options, kExperts, context), routing);
  };
  CapacityOptions other = random;
  other.seed = 10;
  EXPECT_NE(kept(random, kTraining), kept(other, kTraining));
  EXPECT_NE(kept(random, kTraining), kept(random, {true, 6, 2, 100}));
  EXPECT_NE(kept(random, kTraining), kept(random, {true, 5, 3, 100}));
  EXPECT_NE(kept(random, kTraining), kept(random, {true, 5, 2, 101}));
}

TEST(DropPolicies, NoTokenLeftBehind) {
  const gates::Routing routing = make_routing();
  const auto policy = with_policy(DropPolicy::kNoTokenLeftBehind);
  const auto pairs = pairs_of(routing, [](int64_t) { return 0.0; });
  for (const int64_t capacity : {0, 1, 6, 20, 41, 99}) {
    std::vector<int64_t> taken(kExperts, 0), expected;
    std::vector<bool> is_routed(kTokens, false);
    for (const Pair& pair : pairs) {
      if (is_routed[static_cast<size_t>(pair.token)] ||
          taken[static_cast<size_t>(pair.expert)] >= capacity) {
        continue;
      }
      ++taken[static_cast<size_t>(pair.expert)];
      is_routed[static_cast<size_t>(pair.token)] = true;
      expected.push_back(pair.assignment);
    }
    std::sort(expected.begin(), expected.end());
    const CappedRouting capped = drop_over_capacity(routing, capacity, policy, kExperts, kTraining);
    EXPECT_EQ(kept_pairs(capped, routing), expected) << capacity;
    EXPECT_EQ(capped.num_dropped, kTokens - static_cast<int64_t>(expected.size()));
    EXPECT_NO_THROW(gates::validate(capped.routing, kExperts, "test"));
  }
  // The capacity is that of one expert per token: with factor E everybody gets the first choice.
  CapacityOptions wide = policy;
  wide.capacity_factor = static_cast<double>(kExperts);
  const CappedRouting all = apply_capacity(routing, wide, kTokens, kChoices, kExperts);
  EXPECT_EQ(all.num_dropped, 0);
  EXPECT_TRUE(same_bits(all.routing.expert_idx,
                        routing.expert_idx.view({kTokens, kChoices}).select(1, 0).contiguous()));
  wide.capacity_factor = 1;  // C = ceil(41 / 7) = 6
  const CappedRouting tight = apply_capacity(routing, wide, kTokens, kChoices, kExperts);
  EXPECT_EQ(at::bincount(tight.routing.expert_idx, {}, kExperts).max().item<int64_t>(), 6);
}

TEST(DropPolicies, NoTokens) {
  gates::Routing routing;
  routing.token_offsets = at::zeros({1}, at::kInt);
  routing.expert_idx = at::zeros({0}, at::kInt);
  routing.weights = at::zeros({0});
  for (const DropPolicy policy :
       {DropPolicy::kBatchPriority, DropPolicy::kRandom, DropPolicy::kNoTokenLeftBehind}) {
    const CappedRouting capped =
        drop_over_capacity(routing, 3, with_policy(policy), kExperts, kTraining);
    EXPECT_EQ(capped.num_dropped, 0);
    EXPECT_EQ(capped.routing.num_assignments(), 0);
  }
}

TEST(DropPolicies, Errors) {
  EXPECT_EQ(config_error([] {
              apply_capacity(make_routing(), with_policy(DropPolicy::kNoTokenLeftBehind), kTokens,
                             kChoices, kExperts);
            }),
            "[apply_capacity] capacity_factor=0 leaves drop_policy=no_token_left_behind without a "
            "limit; choose one above 0");
}

}  // namespace
}  // namespace perseid
