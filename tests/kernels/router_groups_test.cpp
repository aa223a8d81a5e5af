// Group-limited routing of the kernel and of its reference.
//   BruteForce     every set of groups tried: E <= 16, all divisors, biases of both signs
//   NegativeScores all score + bias below 0: experts outside the groups stay out (a mask of 0
//   fails) SmallScores    scores of 1e-8 under a bias of 12: weights are those of the scores alone
//   Ties           equal groups: the smaller ids
#include <algorithm>

#include "tests/kernels/router_fixture.h"

namespace perseid::kernels::testing {
namespace {

double score_of(ScoreFunction function, const std::vector<double>& z, size_t e) {
  if (function == ScoreFunction::kSigmoid) return 1 / (1 + std::exp(-z[e]));
  if (function == ScoreFunction::kSqrtSoftplus) return std::sqrt(std::log1p(std::exp(z[e])));
  double sum = 0;
  for (const double x : z) sum += std::exp(x);
  return std::exp(z[e]) / sum;
}

/// Ids of the K best experts in the set of groups with the largest sum of group scores, sorted.
std::vector<int32_t> best_choices(const RouterCase<double>& at, const std::vector<double>& z) {
  const auto num_experts = static_cast<size_t>(at.shape.num_experts);
  const auto num_groups = static_cast<size_t>(at.options.num_groups);
  const size_t size = num_experts / num_groups;
  std::vector<double> score(num_experts), group(num_groups);
  for (size_t e = 0; e < num_experts; ++e) {
    score[e] = score_of(at.options.score_function, z, e) + (at.bias.empty() ? 0 : at.bias[e]);
  }
  const bool is_max = at.options.score_function == ScoreFunction::kSoftmax && at.bias.empty();
  for (size_t g = 0; g < num_groups; ++g) {
    std::vector<double> members(score.begin() + g * size, score.begin() + (g + 1) * size);
    group[g] = -INFINITY;
    for (size_t a = 0; a < size; ++a) {
      if (is_max) group[g] = std::max(group[g], members[a]);
      for (size_t b = 0; !is_max && b < a; ++b) {
        group[g] = std::max(group[g], members[a] + members[b]);
      }
    }
  }
  double best = -INFINITY;
  size_t best_set = 0;
  for (size_t set = 0; set < size_t{1} << num_groups; ++set) {
    double sum = 0;
    int64_t count = 0;
    for (size_t g = 0; g < num_groups; ++g) {
      if ((set >> g & 1) == 0) continue;
      sum += group[g];
      ++count;
    }
    if (count == at.options.topk_groups && sum > best) best = sum, best_set = set;
  }
  std::vector<int32_t> ids;
  for (size_t e = 0; e < num_experts; ++e) {
    if (best_set >> (e / size) & 1) ids.push_back(static_cast<int32_t>(e));
  }
  std::sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return score[a] > score[b]; });
  ids.resize(static_cast<size_t>(at.shape.top_k));
  std::sort(ids.begin(), ids.end());
  return ids;
}

TEST(RouterGroups, BruteForce) {
  int64_t num_cases = 0;
  for (const int64_t num_experts : {4, 6, 8, 12, 16}) {
    for (int64_t num_groups = 2; num_groups <= num_experts / 2; ++num_groups) {
      if (num_experts % num_groups != 0) continue;
      for (int64_t topk_groups = 1; topk_groups <= num_groups; ++topk_groups) {
        for (const double shift : {0.0, -2.0, 1.0}) {
          RouterCase<double> at;
          const int64_t room = topk_groups * num_experts / num_groups;
          at.shape = {9, num_experts, std::min<int64_t>(room, 1 + num_cases % 5)};
          at.logits = normal_values<double>(9 * num_experts, static_cast<uint32_t>(num_cases), 2.0);
          at.bias = normal_values<float>(num_experts, static_cast<uint32_t>(num_cases) + 1, 0.5);
          for (float& b : at.bias) b += static_cast<float>(shift);
          if (shift == 1.0) at.bias.clear();
          for (const auto score : kScoreFunctions) {
            at.options = {score, true, 1.0, num_groups, topk_groups};
            for (const bool is_reference : {false, true}) {
              const Routed<double> routed = at.route(is_reference);
              for (int64_t t = 0; t < at.shape.num_tokens; ++t) {
                const auto row = at.logits.begin() + t * num_experts;
                const auto first = routed.expert_idx.begin() + t * at.shape.top_k;
                std::vector<int32_t> ids(first, first + at.shape.top_k);
                std::sort(ids.begin(), ids.end());
                ASSERT_EQ(ids, best_choices(at, {row, row + num_experts})) << at.name();
              }
            }
            ++num_cases;
          }
        }
      }
    }
  }
  EXPECT_GT(num_cases, 200);
}

TEST(RouterGroups, NegativeScores) {
  for (const bool is_reference : {false, true}) {
    auto at = one_token<float>({3, 2, 0, -1, 1, 0}, 2, ScoreFunction::kSigmoid);
    at.options.num_groups = 3;
    at.bias.assign(6, -5.0f);
    EXPECT_EQ(at.route(is_reference).expert_idx, (std::vector<int32_t>{0, 1}));
    at.bias = {-5, -9, -5, -5, -5, -9};  // group sums: -12.2, -9.2, -12.8
    EXPECT_EQ(at.route(is_reference).expert_idx, (std::vector<int32_t>{2, 3}));
  }
}

TEST(RouterGroups, SmallScores) {
  for (const bool is_reference : {false, true}) {
    auto at = one_token<float>({-18, -19, 2, 2}, 2, ScoreFunction::kSigmoid);
    at.options.num_groups = 2;
    at.bias = {12, 12, 0, 0};
    const Routed<float> routed = at.route(is_reference);
    EXPECT_EQ(routed.expert_idx, (std::vector<int32_t>{0, 1}));
    EXPECT_NEAR(routed.weights[0], 1 / (1 + std::exp(-1.0)), 1e-6);
    EXPECT_NEAR(routed.weights[1], 1 / (1 + std::exp(1.0)), 1e-6);
  }
}

TEST(RouterGroups, Ties) {
  for (const auto score : kScoreFunctions) {
    for (const bool is_reference : {false, true}) {
      auto at = one_token<float>(std::vector<float>(8, 0.5f), 3, score);
      at.options.num_groups = 4;
      at.options.topk_groups = 2;
      EXPECT_EQ(at.route(is_reference).expert_idx, (std::vector<int32_t>{0, 1, 2}));
      at.logits = {-0.0f, -1, 0, -1, -1, -1, -1, -1};
      EXPECT_EQ(at.route(is_reference).expert_idx, (std::vector<int32_t>{0, 2, 1}));
    }
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
