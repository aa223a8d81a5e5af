// route on a device against route_reference: ids and counts equal, floats to 2e-6 or 1e-12;
// outputs held NaN and -9 before.
//   Sizes      E = 1 .. 1500, K = 1 .. E, T = 0, 1, 37: every path and its tails
//   Variants   each score function, normalised or not, bias, mask, groups
//   Ties       logits from {-1, -0, 0, 1}, with a bias from {0, 1/2} as well
//   NotNumbers rows with NaN, +inf and -inf, or nothing else
//   Unaligned  logits that no wide access may read
//   Outputs    each one alone, and each one left out
//   ManyTokens more tokens than one round of blocks; the same bits twice
#include "tests/kernels/device_router_fixture.h"

namespace perseid::kernels::testing {
namespace {

class DeviceRouter : public DeviceTest {
 protected:
  template <typename T>
  void compare(const RouterCase<T>& at) {
    expect_routed(route_on_device(at, stream()), at.route(true), at);
  }
  /// Ids and weights alone take another kernel.
  void compare_choices(const RouterCase<float>& at) {
    const Routed<float> actual =
        route_on_device(at, stream(), {true, true, false, false, false, false, false, false});
    const Routed<float> expected = at.route(true);
    ASSERT_EQ(actual.expert_idx, expected.expert_idx) << at.name();
    expect_close(actual.weights, expected.weights, 2e-6, at.name() + " weights alone");
    EXPECT_EQ(actual.tokens_per_expert[0], -9) << "written, but not asked for";
  }
  template <typename T>
  static void expect_routed(const Routed<T>& actual, const Routed<T>& expected,
                            const RouterCase<T>& at) {
    const double relative = std::is_same_v<T, float> ? 2e-6 : 1e-12;
    ASSERT_EQ(actual.expert_idx, expected.expert_idx) << at.name();
    expect_close(actual.weights, expected.weights, relative, at.name() + " weights");
    expect_close(actual.score_sum, expected.score_sum, relative, at.name() + " score_sum");
    expect_close(actual.lse_square_sum, expected.lse_square_sum, relative, at.name() + " lse");
    EXPECT_EQ(actual.tokens_per_expert, expected.tokens_per_expert) << at.name();
    EXPECT_EQ(actual.non_finite_tokens, expected.non_finite_tokens) << at.name();
    expect_close(actual.score_shares, expected.score_shares, relative, at.name() + " shares");
    // Terms of both signs may cancel: the error is that of the weights.
    EXPECT_NEAR(actual.entropy_sum[0], expected.entropy_sum[0],
                relative * static_cast<double>(at.shape.num_tokens * at.shape.top_k) +
                    4 * relative * std::abs(expected.entropy_sum[0]))
        << at.name();
  }
};

template <typename T>
RouterCase<T> normal_case(int64_t num_tokens, int64_t num_experts, int64_t top_k) {
  RouterCase<T> at;
  at.shape = {num_tokens, num_experts, top_k};
  at.logits = normal_values<T>(num_tokens * num_experts, static_cast<uint32_t>(num_experts), 3.0);
  return at;
}

TEST_F(DeviceRouter, Sizes) {
  for (const int64_t num_experts :
       {1, 2, 5, 7, 8, 16, 17, 32, 63, 64, 100, 128, 255, 256, 512, 1000, 1024}) {
    for (const int64_t top_k : {1, 2, 3, 8, 16, 20}) {
      if (top_k > num_experts) continue;
      for (const int64_t num_tokens : {0, 1, 37}) {
        if (num_tokens == 37 && num_experts > 64 && top_k % 8 != 0) continue;
        const auto at = normal_case<float>(num_tokens, num_experts, top_k);
        compare(at);
        compare_choices(at);
      }
      compare(normal_case<double>(5, num_experts, top_k));
    }
  }
  for (const int64_t num_experts : {1, 2, 5, 8, 16, 17, 64, 100, 1500}) {
    const auto at = normal_case<float>(3, num_experts, num_experts);
    compare(at);
    compare_choices(at);
  }
  compare(normal_case<float>(5, 1500, 8));
  compare(normal_case<double>(5, 1500, 20));
}

TEST_F(DeviceRouter, Variants) {
  const auto both = [&](int64_t num_experts, int64_t top_k) {
    for_each_variant(normal_case<float>(5, num_experts, top_k),
                     [&](const RouterCase<float>& at) { compare(at), compare_choices(at); });
    for_each_variant(normal_case<double>(3, num_experts, top_k),
                     [&](const RouterCase<double>& at) { compare(at); });
  };
  both(5, 2);
  both(8, 8);
  both(16, 3);
  both(100, 16);
  both(256, 8);
  both(258, 20);
}

TEST_F(DeviceRouter, GroupsOfEqualScores) {
  // 8 groups of 32 as in DeepSeek-V3, then groups whose best scores tie.
  for (const auto score : kScoreFunctions) {
    for (const bool is_biased : {false, true}) {
      auto at = normal_case<float>(6, 256, 8);
      at.options = {score, true, 2.5, 8, 4};
      if (is_biased) at.bias = normal_values<float>(256, 8, 0.3);
      compare(at);
      for (size_t i = 0; i < at.logits.size(); ++i) at.logits[i] = static_cast<float>(i % 7 % 3);
      if (is_biased) at.bias.assign(256, 0.25f);
      compare(at);
    }
  }
}

template <typename T>
std::vector<T> drawn_from(const std::vector<T>& values, int64_t count, uint32_t seed) {
  std::mt19937 bits(seed);
  std::vector<T> result;
  for (int64_t i = 0; i < count; ++i) result.push_back(values[bits() % values.size()]);
  return result;
}

TEST_F(DeviceRouter, Ties) {
  const std::vector<float> values = {0.0f, -0.0f, 1.0f, -1.0f};
  for (const int64_t num_experts : {2, 5, 8, 16, 17, 64, 100, 256, 500, 1024}) {
    for (const int64_t top_k : {1, 2, 5, 8, 16}) {
      if (top_k > num_experts) continue;
      for (const size_t kinds : {1, 2, 3, 4}) {
        auto at = normal_case<float>(13, num_experts, top_k);
        at.logits =
            drawn_from<float>({values.begin(), values.begin() + static_cast<int64_t>(kinds)},
                              13 * num_experts, static_cast<uint32_t>(kinds));
        compare_choices(at);
        if (kinds != 3) continue;
        compare(at);
        at.bias = drawn_from<float>({0.0f, 0.5f}, num_experts, 4);
        compare(at);
        at.options.score_function = ScoreFunction::kSigmoid;
        compare(at);
      }
    }
  }
  for (const int64_t top_k : {1, 5, 20}) {
    auto at = normal_case<double>(5, 100, top_k);
    at.logits = drawn_from<double>({0.0, -0.0, 1.0}, 500, 5);
    compare(at);
  }
}

template <typename T>
RouterCase<T> broken_case(int64_t num_experts, int64_t top_k) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const std::vector<std::vector<T>> kinds = {{nan},
                                             {inf},
                                             {-inf},
                                             {nan, T{1}},
                                             {inf, T{1}},
                                             {-inf, T{1}},
                                             {T{2}},
                                             {nan, inf},
                                             {nan, -inf},
                                             {inf, -inf},
                                             {nan, inf, -inf},
                                             {nan, T{1}, T{2}},
                                             {inf, T{-1}, T{3}},
                                             {-inf, T{0}, T{5}},
                                             {nan, inf, -inf, T{1}, T{-2}}};
  RouterCase<T> at;
  at.shape = {static_cast<int64_t>(kinds.size()) + 2, num_experts, top_k};
  for (const auto& kind : kinds) {
    const auto row = drawn_from(kind, num_experts, 9);
    at.logits.insert(at.logits.end(), row.begin(), row.end());
  }
  // One NaN, then one +inf, in a good row.
  for (const T odd : {nan, inf}) {
    auto row = normal_values<T>(num_experts, 3);
    row[static_cast<size_t>(num_experts / 2)] = odd;
    at.logits.insert(at.logits.end(), row.begin(), row.end());
  }
  return at;
}

TEST_F(DeviceRouter, NotNumbers) {
  const auto both = [&](int64_t num_experts, int64_t top_k) {
    for_each_variant(broken_case<float>(num_experts, top_k),
                     [&](const RouterCase<float>& at) { compare(at), compare_choices(at); });
  };
  both(2, 1);
  both(5, 2);
  both(16, 8);
  both(40, 20);
  auto large = broken_case<float>(256, 8);
  for (const auto score : kScoreFunctions) {
    large.options.score_function = score;
    compare(large);
    compare_choices(large);
  }
  for_each_variant(broken_case<double>(12, 3), [&](const RouterCase<double>& at) { compare(at); });
}

TEST_F(DeviceRouter, Unaligned) {
  for (const int64_t num_experts : {8, 64, 256}) {
    const auto at = normal_case<float>(7, num_experts, 4);
    std::vector<float> shifted(1, 9.0f);
    shifted.insert(shifted.end(), at.logits.begin(), at.logits.end());
    DeviceArray<float> logits(shifted, stream());
    DeviceArray<int32_t> expert_idx(std::vector<int32_t>(28, -9), stream());
    RouterOutput output;
    output.expert_idx = expert_idx.data();
    route(at.shape, at.options, DType::kFloat32, {logits.data() + 1, nullptr, nullptr}, output,
          stream());
    EXPECT_EQ(expert_idx.read(), at.route(true).expert_idx) << num_experts;
  }
}

TEST_F(DeviceRouter, Outputs) {
  for (const int64_t top_k : {4, 20}) {
    auto at = normal_case<float>(9, 30, top_k);
    at.valid = {1, 1, 0, 1, 1, 0, 1, 1, 1};
    const Routed<float> all = route_on_device(at, stream());
    Routed<float> none;
    none.expert_idx.assign(all.expert_idx.size(), -9);
    none.weights = nans<float>(9 * top_k);
    none.score_sum = nans<float>(30);
    none.lse_square_sum = nans<float>(1);
    none.tokens_per_expert.assign(30, -9);
    none.non_finite_tokens = {-9};
    none.score_shares = nans<float>(9 * 30);
    none.entropy_sum = nans<double>(1);
    for (const bool is_alone : {true, false}) {
      for (size_t i = 0; i < 8; ++i) {
        std::vector<bool> used(8, !is_alone);
        used[i] = is_alone;
        Routed<float> expected = none;
        if (used[0]) expected.expert_idx = all.expert_idx;
        if (used[1]) expected.weights = all.weights;
        if (used[2]) expected.score_sum = all.score_sum;
        if (used[3]) expected.lse_square_sum = all.lse_square_sum;
        if (used[4]) expected.tokens_per_expert = all.tokens_per_expert;
        if (used[5]) expected.non_finite_tokens = all.non_finite_tokens;
        if (used[6]) expected.score_shares = all.score_shares;
        if (used[7]) expected.entropy_sum = all.entropy_sum;
        const Routed<float> actual = route_on_device(at, stream(), used);
        // Weights alone come from another kernel: the last bit may differ.
        expect_close(actual.weights, expected.weights, 2e-6, "weights");
        expected.weights = actual.weights;
        EXPECT_TRUE(actual.has_same_bits(expected)) << i << (is_alone ? " alone" : " left out");
      }
    }
  }
}

TEST_F(DeviceRouter, ManyTokens) {
  // More than 528 blocks of 64 tokens of two experts, or 264 of 4.
  auto at = normal_case<float>(34000, 2, 1);
  compare(at);
  compare_choices(at);
  EXPECT_TRUE(route_on_device(at, stream()).has_same_bits(route_on_device(at, stream())));
  const auto other = normal_case<double>(1100, 3, 2);
  compare(other);
  EXPECT_TRUE(route_on_device(other, stream()).has_same_bits(route_on_device(other, stream())));
}

}  // namespace
}  // namespace perseid::kernels::testing
