// Capacity C of an expert, and what is dropped over it. `Table` is a dense picture of a routing:
// for each token the pairs (expert, weight) in choice order; the expectations are formed from it by
// sorting, independently of the code under test.
//   Formula         T=100, E=8, K=2: 1.25 -> 32; exact multiples stay exact; at most T, at least
//   min KeepsThe...     kept of an expert = its first C in (choice, token) or largest C by weight
//   Invariants      kept <= C, kept is a subset, row order kept, counts add up; C in {0, 1, 3, T, >
//   T} Ties            equal weights: by token, then choice Gradients       survivors get theirs,
//   dropped ones exactly 0; renormalised: finite differences Errors          operation, argument,
//   value, limit
#include "moe/capacity.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "kernels/error.h"
#include "kernels/random.h"
#include "tests/closed_form.h"
#include "tests/config_error.h"
#include "tests/gradcheck.h"

namespace perseid {
namespace {
using testing::config_error;

using testing::gradients_match;
using testing::same_bits;

constexpr DropPolicy kPolicies[] = {DropPolicy::kPosition, DropPolicy::kProbability};

struct Pair {
  int32_t expert;
  double weight;
};
using Table = std::vector<std::vector<Pair>>;

gates::Routing ragged_routing(const Table& table, at::ScalarType type = at::kFloat) {
  std::vector<int32_t> offsets = {0}, experts;
  std::vector<double> weights;
  for (const auto& row : table) {
    for (const Pair& pair : row) {
      experts.push_back(pair.expert);
      weights.push_back(pair.weight);
    }
    offsets.push_back(static_cast<int32_t>(experts.size()));
  }
  gates::Routing routing;
  routing.num_tokens = static_cast<int64_t>(table.size());
  routing.token_offsets = at::tensor(offsets, at::kInt);
  routing.expert_idx = at::tensor(experts, at::kInt);
  routing.weights = at::tensor(weights, at::kDouble).to(type);
  return routing;
}

gates::Routing fixed_routing(const Table& table, at::ScalarType type = at::kFloat) {
  gates::Routing routing = ragged_routing(table, type);
  routing.token_offsets = at::Tensor();
  routing.top_k = table.empty() ? 1 : static_cast<int64_t>(table.front().size());
  return routing;
}

/// Rows of 0..max_choices pairs without repeated experts, weights falling; few distinct weights, so
/// that ties across tokens are common. `exact`: rows of exactly max_choices.
Table random_table(int64_t num_tokens, int64_t num_experts, int64_t max_choices, bool exact,
                   uint64_t seed) {
  const kernels::RandomKey key = kernels::random_key(seed);
  uint64_t counter = 0;
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(kernels::random_below(key, counter++, static_cast<uint64_t>(n)));
  };
  Table table(static_cast<size_t>(num_tokens));
  for (auto& row : table) {
    const int64_t count = exact ? max_choices : below(max_choices + 1);
    std::set<int32_t> experts;
    while (static_cast<int64_t>(experts.size()) < count) {
      // The square favours small ids: hot experts.
      experts.insert(static_cast<int32_t>(below(num_experts) * below(num_experts) / num_experts));
    }
    for (const int32_t expert : experts) {
      row.push_back({expert, static_cast<double>(1 + below(12)) / 16});
    }
    std::stable_sort(row.begin(), row.end(),
                     [](const Pair& a, const Pair& b) { return a.weight > b.weight; });
  }
  return table;
}

/// What should be kept, by sorting each expert's pairs.
Table expected_table(const Table& table, int64_t capacity, int64_t num_experts, DropPolicy policy) {
  std::set<std::pair<size_t, size_t>> kept;
  for (int32_t expert = 0; expert < num_experts; ++expert) {
    std::vector<std::array<double, 3>> keys;
    for (size_t t = 0; t < table.size(); ++t) {
      for (size_t k = 0; k < table[t].size(); ++k) {
        if (table[t][k].expert != expert) continue;
        const auto token = static_cast<double>(t), choice = static_cast<double>(k);
        if (policy == DropPolicy::kPosition) {
          keys.push_back({choice, token, 0});
        } else {
          keys.push_back({-table[t][k].weight, token, choice});
        }
      }
    }
    std::sort(keys.begin(), keys.end());
    for (size_t i = 0; i < keys.size() && static_cast<int64_t>(i) < capacity; ++i) {
      const bool by_position = policy == DropPolicy::kPosition;
      kept.insert({static_cast<size_t>(keys[i][1]),
                   static_cast<size_t>(by_position ? keys[i][0] : keys[i][2])});
    }
  }
  Table result(table.size());
  for (size_t t = 0; t < table.size(); ++t) {
    for (size_t k = 0; k < table[t].size(); ++k) {
      if (kept.count({t, k}) > 0) result[t].push_back(table[t][k]);
    }
  }
  return result;
}

CapacityOptions with_policy(DropPolicy policy) {
  CapacityOptions options;
  options.drop_policy = policy;
  return options;
}

TEST(ExpertCapacity, Formula) {
  const auto capacity = [](double factor, int64_t T, int64_t K, int64_t E, int64_t min = 0) {
    CapacityOptions options;
    options.capacity_factor = factor;
    options.capacity_min = min;
    return expert_capacity(options, T, K, E);
  };
  EXPECT_EQ(capacity(1.25, 100, 2, 8), 32);  // 31.25
  // Exact multiples: no rounding may add one.
  EXPECT_EQ(capacity(1.0, 96, 2, 8), 24);
  EXPECT_EQ(capacity(1.25, 128, 2, 8), 40);
  EXPECT_EQ(capacity(1.5, 4096, 8, 64), 768);
  EXPECT_EQ(capacity(2.0, 3, 1, 3), 2);
  for (int64_t share = 1; share <= 2000; ++share) {
    EXPECT_EQ(capacity(1.0, share * 7, 3, 21), share);
  }
  // Limits.
  EXPECT_EQ(capacity(8.0, 10, 2, 4), 10);
  EXPECT_EQ(capacity(1e300, 10, 2, 4), 10);
  EXPECT_EQ(capacity(INFINITY, 10, 2, 4), 10);
  EXPECT_EQ(capacity(1.0, 10, 1, 5, 4), 4);
  EXPECT_EQ(capacity(1.0, 10, 1, 5, 40), 10);
  EXPECT_EQ(capacity(1.0, 0, 2, 8, 4), 0);
  EXPECT_EQ(capacity(1e-9, 10, 1, 5), 1);
  // Dropless.
  EXPECT_EQ(capacity(0.0, 10, 1, 5), 10);
  EXPECT_EQ(capacity(-1.0, 10, 1, 5), 10);
  EXPECT_EQ(capacity(-INFINITY, 10, 1, 5), 10);
}

TEST(DropOverCapacity, KeepsTheExpectedPairs) {
  constexpr int64_t kExperts = 7, kTokens = 41;
  for (const bool exact : {true, false}) {
    for (const int64_t choices : {1, 3, 5}) {
      const Table table =
          random_table(kTokens, kExperts, choices, exact, static_cast<uint64_t>(choices));
      const gates::Routing routing = exact ? fixed_routing(table) : ragged_routing(table);
      for (const DropPolicy policy : kPolicies) {
        for (const int64_t capacity : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{6}}) {
          const CappedRouting capped =
              drop_over_capacity(routing, capacity, with_policy(policy), kExperts);
          const Table expected = expected_table(table, capacity, kExperts, policy);
          const gates::Routing expected_routing = ragged_routing(expected);
          EXPECT_EQ(capped.routing.top_k, 0);
          EXPECT_EQ(capped.routing.num_tokens, kTokens);
          EXPECT_TRUE(same_bits(capped.routing.token_offsets, expected_routing.token_offsets));
          EXPECT_TRUE(same_bits(capped.routing.expert_idx, expected_routing.expert_idx));
          EXPECT_TRUE(same_bits(capped.routing.weights, expected_routing.weights));
          EXPECT_EQ(capped.num_dropped,
                    routing.num_assignments() - expected_routing.num_assignments());
          const at::Tensor load = at::bincount(capped.routing.expert_idx, {}, kExperts);
          if (capped.routing.num_assignments() > 0) {
            EXPECT_LE(load.max().item<int64_t>(), capacity);
          }
        }
      }
    }
  }
}

TEST(DropOverCapacity, NothingOverCapacityIsTheSameRouting) {
  const Table table = random_table(9, 4, 2, true, 5);
  gates::Routing routing = fixed_routing(table);
  routing.scores = at::rand({9, 4});
  for (const DropPolicy policy : kPolicies) {
    for (const int64_t capacity : {9, 100}) {
      const CappedRouting capped = drop_over_capacity(routing, capacity, with_policy(policy), 4);
      EXPECT_EQ(capped.num_dropped, 0);
      EXPECT_EQ(capped.routing.top_k, 2);
      EXPECT_FALSE(capped.routing.token_offsets.defined());
      EXPECT_TRUE(capped.routing.weights.is_same(routing.weights));
      EXPECT_TRUE(capped.routing.expert_idx.is_same(routing.expert_idx));
    }
    const CappedRouting capped = drop_over_capacity(routing, 1, with_policy(policy), 4);
    EXPECT_GT(capped.num_dropped, 0);
    EXPECT_TRUE(capped.routing.scores.is_same(routing.scores));
  }
}

TEST(DropOverCapacity, NoTokens) {
  for (const DropPolicy policy : kPolicies) {
    for (const gates::Routing& routing : {fixed_routing({}), ragged_routing({})}) {
      const CappedRouting capped = drop_over_capacity(routing, 0, with_policy(policy), 3);
      EXPECT_EQ(capped.num_dropped, 0);
      EXPECT_EQ(capped.routing.num_assignments(), 0);
    }
  }
}

TEST(DropOverCapacity, PositionPrefersFirstChoices) {
  // Expert 0 is the second choice of token 0 and the first of tokens 1 and 2.
  const Table table = {{{1, 0.9}, {0, 0.8}}, {{0, 0.2}}, {{0, 0.1}}};
  CappedRouting capped =
      drop_over_capacity(ragged_routing(table), 2, with_policy(DropPolicy::kPosition), 2);
  EXPECT_TRUE(at::equal(capped.routing.expert_idx, at::tensor({1, 0, 0}, at::kInt)));
  EXPECT_TRUE(at::equal(capped.routing.token_offsets, at::tensor({0, 1, 2, 3}, at::kInt)));
  capped = drop_over_capacity(ragged_routing(table), 2, with_policy(DropPolicy::kProbability), 2);
  EXPECT_TRUE(at::equal(capped.routing.token_offsets, at::tensor({0, 2, 3, 3}, at::kInt)));
}

TEST(DropOverCapacity, PermutedTokensOnlyChangeWhatIsDropped) {
  const int64_t T = 12, E = 4;
  const at::Tensor weights = testing::random_tensor({T, E}, 1, .1, 1);
  const at::Tensor order = at::arange(T).mul(5).remainder(T);
  CapacityOptions options;
  options.capacity_factor = 1;
  const auto kept_of = [&](const at::Tensor& table) {
    const auto capped = drop_over_capacity(gates::routing_from_dense(table), 7, options, E);
    EXPECT_EQ(capped.num_dropped, T * E - 7 * E);
    return gates::dense_weights(capped.routing, E);
  };
  const at::Tensor plain = kept_of(weights).index_select(0, order);
  const at::Tensor permuted = kept_of(weights.index_select(0, order));
  const at::Tensor in_both = plain.ne(0) & permuted.ne(0);
  EXPECT_TRUE(testing::same_bits(plain * in_both, permuted * in_both));
  EXPECT_TRUE(plain.ne(0).ne(permuted.ne(0)).any().item<bool>());
}

TEST(DropOverCapacity, EqualWeightsGoToEarlierTokens) {
  const Table table(6, {{2, 0.5}, {0, 0.25}});
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    for (const DropPolicy policy : kPolicies) {
      const CappedRouting capped =
          drop_over_capacity(fixed_routing(table, type), 2, with_policy(policy), 3);
      EXPECT_EQ(capped.num_dropped, 8);
      EXPECT_TRUE(
          at::equal(capped.routing.token_offsets, at::tensor({0, 2, 4, 4, 4, 4, 4}, at::kInt)));
    }
  }
}

TEST(DropOverCapacity, NanIsDroppedFirst) {
  const Table table = {{{0, std::nan("")}}, {{0, 0.0}}, {{0, 0.5}}};
  const CappedRouting capped =
      drop_over_capacity(ragged_routing(table), 2, with_policy(DropPolicy::kProbability), 1);
  EXPECT_TRUE(at::equal(capped.routing.token_offsets, at::tensor({0, 0, 1, 2}, at::kInt)));
}

TEST(DropOverCapacity, ProbabilityKeepsNoLessThanItDrops) {
  constexpr int64_t kExperts = 5;
  const Table table = random_table(300, kExperts, 3, false, 11);
  const gates::Routing routing = ragged_routing(table);
  const CappedRouting capped =
      drop_over_capacity(routing, 20, with_policy(DropPolicy::kProbability), kExperts);
  for (int64_t e = 0; e < kExperts; ++e) {
    const at::Tensor all = std::get<0>(
        routing.weights.masked_select(routing.expert_idx.eq(e)).sort(0, /*descending=*/true));
    const at::Tensor kept = std::get<0>(
        capped.routing.weights.masked_select(capped.routing.expert_idx.eq(e)).sort(0, true));
    EXPECT_EQ(kept.size(0), std::min<int64_t>(20, all.size(0)));
    EXPECT_TRUE(same_bits(kept, all.narrow(0, 0, kept.size(0))));
  }
}

TEST(DropOverCapacity, SurvivorsAreDifferentiable) {
  const Table table = random_table(20, 4, 3, true, 3);
  for (const DropPolicy policy : kPolicies) {
    gates::Routing routing = fixed_routing(table, at::kDouble);
    routing.weights.set_requires_grad(true);
    const CappedRouting capped = drop_over_capacity(routing, 4, with_policy(policy), 4);
    const at::Tensor cotangent = testing::random_tensor(capped.routing.weights.sizes(), 7);
    (capped.routing.weights * cotangent).sum().backward();
    const at::Tensor gradient = routing.weights.grad();
    EXPECT_EQ(gradient.count_nonzero().item<int64_t>(), capped.routing.num_assignments());
    EXPECT_TRUE(same_bits(gradient.masked_select(gradient.ne(0)), cotangent));
  }
}

TEST(DropOverCapacity, RenormalizedRowsKeepTheirSum) {
  const Table table = random_table(50, 6, 4, false, 9);
  for (const DropPolicy policy : kPolicies) {
    CapacityOptions options = with_policy(policy);
    const gates::Routing routing = ragged_routing(table, at::kDouble);
    const gates::Routing plain = drop_over_capacity(routing, 6, options, 6).routing;
    options.renormalize_after_drop = true;
    const gates::Routing scaled = drop_over_capacity(routing, 6, options, 6).routing;
    EXPECT_TRUE(same_bits(scaled.token_offsets, plain.token_offsets));
    EXPECT_TRUE(same_bits(scaled.expert_idx, plain.expert_idx));
    const auto sum = [](const gates::Routing& r, int64_t t) {
      const int64_t begin = r.token_offsets[t].item<int64_t>();
      return r.weights.narrow(0, begin, r.token_offsets[t + 1].item<int64_t>() - begin).sum();
    };
    for (int64_t t = 0; t < 50; ++t) {
      const int64_t begin = plain.token_offsets[t].item<int64_t>();
      const int64_t count = plain.token_offsets[t + 1].item<int64_t>() - begin;
      if (count == 0) continue;
      EXPECT_NEAR(sum(scaled, t).item<double>(), sum(routing, t).item<double>(), 1e-14);
      if (count == static_cast<int64_t>(table[static_cast<size_t>(t)].size())) {
        EXPECT_TRUE(same_bits(scaled.weights.narrow(0, begin, count),
                              plain.weights.narrow(0, begin, count)));
      }
    }
  }
}

TEST(DropOverCapacity, RenormalizedGradients) {
  const Table table = random_table(15, 4, 3, false, 21);
  gates::Routing routing = ragged_routing(table, at::kDouble);
  // By position, and with capacity by position only: a step of the check must not change the set.
  CapacityOptions options = with_policy(DropPolicy::kPosition);
  options.renormalize_after_drop = true;
  ASSERT_GT(drop_over_capacity(routing, 3, options, 4).num_dropped, 0);
  EXPECT_TRUE(gradients_match(
      [&] {
        return std::vector<at::Tensor>{drop_over_capacity(routing, 3, options, 4).routing.weights};
      },
      {routing.weights}));
}

TEST(DropOverCapacity, RenormalizingZeroWeightsStaysFinite) {
  // Token 1 keeps expert 1 with weight 0; token 2 loses everything.
  const Table table = {{{0, 0.5}}, {{0, 0.25}, {1, 0.0}}, {{0, 0.125}}};
  CapacityOptions options = with_policy(DropPolicy::kPosition);
  options.renormalize_after_drop = true;
  gates::Routing routing = ragged_routing(table, at::kDouble);
  routing.weights.set_requires_grad(true);
  const CappedRouting capped = drop_over_capacity(routing, 1, options, 2);
  EXPECT_TRUE(at::equal(capped.routing.token_offsets, at::tensor({0, 1, 2, 2}, at::kInt)));
  EXPECT_TRUE(at::equal(capped.routing.weights, at::tensor({0.5, 0.0}, at::kDouble)));
  capped.routing.weights.sum().backward();
  EXPECT_TRUE(routing.weights.grad().isfinite().all().item<bool>());
}

TEST(ApplyCapacity, DroplessIsUnchangedAndFactorApplies) {
  const Table table(10, {{3, 0.75}, {1, 0.25}});
  const gates::Routing routing = fixed_routing(table);
  CapacityOptions options;
  CappedRouting capped = apply_capacity(routing, options, 10, 2, 4);
  EXPECT_EQ(capped.num_dropped, 0);
  EXPECT_TRUE(capped.routing.weights.is_same(routing.weights));
  options.capacity_factor = 1.25;  // ceil(1.25 * 20 / 4) = 7
  capped = apply_capacity(routing, options, 10, 2, 4);
  EXPECT_EQ(capped.num_dropped, 6);
  // A pure function: the same bits again.
  EXPECT_TRUE(same_bits(apply_capacity(routing, options, 10, 2, 4).routing.weights,
                        capped.routing.weights));
}

TEST(Capacity, Errors) {
  const gates::Routing routing = fixed_routing({{{0, 0.5}}, {{2, 0.5}}});
  CapacityOptions options;
  options.capacity_factor = std::nan("");
  const std::string nan_text = " capacity_factor=nan must be a number; choose 0 for dropless";
  EXPECT_EQ(config_error([&] { expert_capacity(options, 4, 1, 2); }),
            "[expert_capacity]" + nan_text);
  EXPECT_EQ(config_error([&] { apply_capacity(routing, options, 2, 1, 3); }),
            "[apply_capacity]" + nan_text);
  options = {};
  options.capacity_min = -3;
  EXPECT_EQ(config_error([&] { expert_capacity(options, 4, 1, 2); }),
            "[expert_capacity] capacity_min=-3 must be at least 0");
  options = {};
  EXPECT_EQ(config_error([&] { expert_capacity(options, -1, 1, 2); }),
            "[expert_capacity] num_tokens=-1 must be at least 0");
  EXPECT_EQ(config_error([&] { expert_capacity(options, 4, 0, 2); }),
            "[expert_capacity] top_k=0 must be at least 1");
  EXPECT_EQ(config_error([&] { expert_capacity(options, 4, 1, 0); }),
            "[expert_capacity] num_experts=0 must be at least 1");
  EXPECT_EQ(config_error([&] { drop_over_capacity(routing, -1, options, 3); }),
            "[drop_over_capacity] capacity=-1 must be at least 0");
  EXPECT_EQ(config_error([&] { drop_over_capacity(routing, 1, options, 2); }),
            "[drop_over_capacity] expert_idx=1 ids lie outside [0, 2)");
}

}  // namespace
}  // namespace perseid
