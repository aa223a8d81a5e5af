// route: golden values, and the parallel version against the reference.
//   Golden       z = (1, 2, .5, -1): specification of the gates, 8.1
//   Reference    E = 1 .. 256, K = 1 .. E, every variant, float32 and float64; outputs were NaN
//   Ties         logits from {-1, -0, 0, 1}: ids are exactly those of the reference
//   Threads      all outputs bit for bit equal on 1, 2, 3, 7 threads
#include "tests/kernels/router_fixture.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class RouterTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(RouterTyped, Types);

TYPED_TEST(RouterTyped, GoldenValues) {
  using T = TypeParam;
  const double near = std::is_same_v<T, float> ? 2e-7 : 1e-10;
  for (const bool is_reference : {false, true}) {
    auto at = one_token<T>({1, 2, T(0.5), -1}, 2);
    Routed<T> routed = at.route(is_reference);
    EXPECT_EQ(routed.expert_idx, (std::vector<int32_t>{1, 0}));
    EXPECT_NEAR(routed.weights[0], 0.7310585786, near);
    EXPECT_NEAR(routed.weights[1], 0.2689414214, near);
    const std::vector<double> softmax = {.2242078180, .6094600376, .1359889158, .0303432286};
    for (int e = 0; e < 4; ++e) EXPECT_NEAR(routed.score_sum[e], softmax[e], near);
    EXPECT_NEAR(routed.lse_square_sum[0], 6.2259327045, 10 * near);
    EXPECT_EQ(routed.tokens_per_expert, (std::vector<int64_t>{1, 1, 0, 0}));
    EXPECT_EQ(routed.non_finite_tokens[0], 0);

    at.options.normalize = false;
    routed = at.route(is_reference);
    EXPECT_NEAR(routed.weights[0], .6094600376, near);
    EXPECT_NEAR(routed.weights[1], .2242078180, near);

    at.options = {ScoreFunction::kSigmoid, true, 1.0};
    routed = at.route(is_reference);
    EXPECT_NEAR(routed.weights[0], 0.5464491032, near);
    EXPECT_NEAR(routed.weights[1], 0.4535508968, near);
    double sum = 0;
    for (const double z : {1.0, 2.0, 0.5, -1.0}) sum += 1 / (1 + std::exp(-z));
    for (int e = 0; e < 4; ++e) {
      EXPECT_NEAR(routed.score_sum[e], 1 / (1 + std::exp(-double{at.logits[e]})) / sum, near);
    }
    at.options = {ScoreFunction::kSigmoid, false, 2.5};
    routed = at.route(is_reference);
    EXPECT_NEAR(routed.weights[0], 2.5 / (1 + std::exp(-2.0)), 3 * near);

    at.options = {ScoreFunction::kSqrtSoftplus, true, 1.0};
    routed = at.route(is_reference);
    const double s1 = std::sqrt(std::log1p(std::exp(2.0)));
    const double s0 = std::sqrt(std::log1p(std::exp(1.0)));
    EXPECT_NEAR(routed.weights[0], s1 / (s0 + s1), near);
    EXPECT_NEAR(routed.weights[1], s0 / (s0 + s1), near);
    EXPECT_NEAR(routed.entropy_sum[0],
                -routed.weights[0] * std::log(routed.weights[0]) -
                    routed.weights[1] * std::log(routed.weights[1]),
                4 * near);
    at.options.normalize = false;
    EXPECT_NEAR(at.route(is_reference).weights[0], s1, 2 * near);
  }
}

TYPED_TEST(RouterTyped, BiasSelectsButDoesNotWeigh) {
  using T = TypeParam;
  for (const bool is_reference : {false, true}) {
    auto at = one_token<T>({1, 2, T(0.5), -1}, 2, ScoreFunction::kSigmoid);
    at.bias = {-1.0f, 0.0f, 0.0f, 0.9f};  // scores + bias: -.27, .88, .62, 1.17
    const Routed<T> routed = at.route(is_reference);
    EXPECT_EQ(routed.expert_idx, (std::vector<int32_t>{1, 3}));  // ordered by the score alone
    const double s1 = 1 / (1 + std::exp(-2.0)), s3 = 1 / (1 + std::exp(1.0));
    EXPECT_NEAR(routed.weights[0], s1 / (s1 + s3), 2e-7);
    EXPECT_NEAR(routed.weights[1], s3 / (s1 + s3), 2e-7);

    at.options.score_function = ScoreFunction::kSoftmax;  // p + bias: -.78, .61, .14, .93
    EXPECT_EQ(at.route(is_reference).expert_idx, (std::vector<int32_t>{1, 3}));
  }
}

template <typename T>
void expect_reference(const RouterCase<T>& at) {
  const Routed<T> actual = at.route(), expected = at.route(true);
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

TYPED_TEST(RouterTyped, EqualsReference) {
  using T = TypeParam;
  for (const int64_t num_experts : {1, 2, 5, 8, 16, 17, 33, 64, 65, 128, 129, 256}) {
    for (const int64_t top_k : {1, 2, 8, 16, 19, 256}) {
      if (top_k > num_experts && top_k != 256) continue;
      RouterCase<T> at;
      at.shape = {21, num_experts, std::min(top_k, num_experts)};
      at.logits = normal_values<T>(21 * num_experts, static_cast<uint32_t>(num_experts), 3.0);
      for_each_variant(at, [](const RouterCase<T>& variant) { expect_reference(variant); });
    }
  }
}

TYPED_TEST(RouterTyped, Ties) {
  using T = TypeParam;
  std::mt19937 bits(5);
  const std::vector<T> values = {T{-1}, T{-0.0}, T{0}, T{1}};
  for (const int64_t num_experts : {5, 16, 64, 100, 256}) {
    for (const int64_t top_k : {1, 2, 5}) {
      for (const int64_t kinds : {1, 2, 4}) {  // 1: all equal
        RouterCase<T> at;
        at.shape = {37, num_experts, top_k};
        for (int64_t i = 0; i < 37 * num_experts; ++i) {
          at.logits.push_back(values[bits() % kinds + (kinds == 2 ? 1 : 0)]);
        }
        for (const auto score : kScoreFunctions) {
          at.options.score_function = score;
          at.bias.clear();
          expect_reference(at);
          at.bias.assign(static_cast<size_t>(num_experts), 0.25f);
          expect_reference(at);
        }
        if (kinds != 4) {  // all are equal, -0 and +0 too
          const Routed<T> routed = at.route();
          for (int64_t t = 0; t < 37; ++t) {
            for (int64_t k = 0; k < top_k; ++k) ASSERT_EQ(routed.expert_idx[t * top_k + k], k);
          }
        }
      }
    }
  }
}

/// Rows of every kind that has a rule of its own.
template <typename T>
std::vector<T> odd_logits(int64_t num_tokens, int64_t num_experts) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  auto logits = normal_values<T>(num_tokens * num_experts, 9, 2.0);
  std::mt19937 bits(8);
  const std::vector<std::vector<T>> kinds = {
      {nan}, {-inf}, {inf}, {nan, -inf}, {nan, inf, -inf}, {T{-0.0}, T{0}}, {T{-1000}}, {T{1000}}};
  for (int64_t t = 0; t < num_tokens; ++t) {
    const auto& kind = kinds[t % kinds.size()];
    const uint32_t share = t / 8 % 3;  // a few, half, or all entries
    for (int64_t e = 0; e < num_experts; ++e) {
      const bool is_odd = share == 2 || bits() % (share == 0 ? 5 : 2) == 0;
      if (is_odd) logits[t * num_experts + e] = kind[bits() % kind.size()];
    }
  }
  return logits;
}

template <typename V>
std::vector<V> slice(const std::vector<V>& values, int64_t begin, int64_t count) {
  return {values.begin() + begin, values.begin() + begin + count};
}

TYPED_TEST(RouterTyped, OddRowsEqualReference) {
  using T = TypeParam;
  for (const int64_t num_experts : {1, 5, 16, 64, 100}) {
    for (const int64_t top_k : {1, 3, 100}) {
      if (top_k > num_experts && top_k != 100) continue;
      RouterCase<T> at;
      at.shape = {48, num_experts, std::min(top_k, num_experts)};
      at.logits = odd_logits<T>(48, num_experts);
      for_each_variant(at, [](const RouterCase<T>& variant) { expect_reference(variant); });
    }
  }
}

TYPED_TEST(RouterTyped, OddBiases) {
  using T = TypeParam;
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  RouterCase<T> at;
  at.shape = {48, 6, 3};
  at.logits = odd_logits<T>(48, 6);
  for (const auto score : kScoreFunctions) {
    for (const bool normalize : {true, false}) {
      at.options = {score, normalize, 1.0};
      for (const auto& bias : {std::vector<float>(6, -inf), {0, inf, 0, nan, -inf, 1}}) {
        at.bias = bias;
        expect_reference(at);
      }
    }
  }
}

TYPED_TEST(RouterTyped, SameBitsForAnyThreadCount) {
  using T = TypeParam;
  for (const int64_t num_experts : {8, 64}) {
    RouterCase<T> at;
    at.shape = {1500, num_experts, 2};
    at.logits = normal_values<T>(1500 * num_experts, 4);
    for_each_variant(at, [](const RouterCase<T>& variant) {
      const Routed<T> expected = variant.route();
      for (const int count : kThreadCounts) {
        const Threads threads(count);
        EXPECT_TRUE(variant.route().has_same_bits(expected)) << variant.name();
      }
    });
  }
}

TYPED_TEST(RouterTyped, TokensDoNotDependOnTheirNeighbours) {
  using T = TypeParam;
  for (const int64_t num_experts : {1, 7, 64, 200}) {
    RouterCase<T> at;
    at.shape = {43, num_experts, std::min<int64_t>(3, num_experts)};
    at.logits = odd_logits<T>(43, num_experts);
    for_each_variant(at, [&](const RouterCase<T>& variant) {
      const Routed<T> together = variant.route();
      for (int64_t t = 0; t < 43; ++t) {
        RouterCase<T> one = variant;
        one.shape.num_tokens = 1;
        one.logits = slice(variant.logits, t * num_experts, num_experts);
        if (!variant.valid.empty()) one.valid = slice(variant.valid, t, 1);
        const Routed<T> alone = one.route();
        const int64_t top_k = at.shape.top_k;
        EXPECT_EQ(alone.expert_idx, slice(together.expert_idx, t * top_k, top_k));
        EXPECT_TRUE(same_bits(alone.weights, slice(together.weights, t * top_k, top_k)))
            << variant.name() << " token " << t;
        EXPECT_TRUE(same_bits(alone.score_shares,
                              slice(together.score_shares, t * num_experts, num_experts)))
            << variant.name() << " token " << t;
      }
    });
  }
}

TYPED_TEST(RouterTyped, NoTokensAndNoValidTokens) {
  using T = TypeParam;
  for (const bool is_reference : {false, true}) {
    RouterCase<T> at;
    at.shape = {0, 5, 2};
    Routed<T> routed = at.route(is_reference);
    EXPECT_EQ(routed.score_sum, std::vector<T>(5, T{0}));
    EXPECT_EQ(routed.lse_square_sum[0], T{0});
    EXPECT_EQ(routed.tokens_per_expert, std::vector<int64_t>(5, 0));
    EXPECT_EQ(routed.non_finite_tokens[0], 0);

    at.shape = {3, 5, 2};
    at.logits = nans<T>(15);
    at.valid = {0, 0, 0};
    routed = at.route(is_reference);
    EXPECT_EQ(routed.expert_idx, std::vector<int32_t>(6, -1));
    EXPECT_EQ(routed.weights, std::vector<T>(6, T{0}));
    EXPECT_EQ(routed.score_sum, std::vector<T>(5, T{0}));
    EXPECT_EQ(routed.non_finite_tokens[0], 0);
  }
}

TEST(Router, NullOutputsAreNotWritten) {
  auto at = one_token<float>({1, 2, 3}, 2);
  std::vector<int32_t> expert_idx(2, -9);
  route(at.shape, at.options, DType::kFloat32, at.input(), {expert_idx.data()});
  EXPECT_EQ(expert_idx, (std::vector<int32_t>{2, 1}));
  EXPECT_NO_THROW(route(at.shape, at.options, DType::kFloat32, at.input(), {}));
}

TEST(Router, SumsAreFormedInDouble) {
  // 2^24 + 1 and more do not fit into float32 one by one: a float32 sum of ones would stop there.
  RouterCase<float> at;
  at.shape = {20000, 1, 1};
  at.logits.assign(20000, 60.0f);
  EXPECT_EQ(at.route().score_sum[0], 20000.0f);
  EXPECT_EQ(at.route().lse_square_sum[0], 72000000.0f);  // 20000 * 60^2
}

TEST(Router, WrongArguments) {
  const auto text = [](const RouterShape& shape, const RouterOptions& options = {},
                       DType dtype = DType::kFloat32) {
    const std::string forward = config_error([&] { route(shape, options, dtype, {}, {}); });
    EXPECT_EQ(forward, config_error([&] { route_reference(shape, options, dtype, {}, {}); }));
    EXPECT_NE(config_error([&] { route_backward(shape, options, dtype, {}, {}, nullptr); }), "");
    return forward;
  };
  EXPECT_EQ(text({0, 8, 9}), "[route] top_k=9 exceeds num_experts=8; choose top_k in [1, 8]");
  EXPECT_EQ(text({0, 8, 0}), "[route] top_k=0 is below 1; choose top_k in [1, 8]");
  EXPECT_EQ(text({-1, 8, 2}), "[route] num_tokens=-1 is negative; choose 0 or more");
  EXPECT_EQ(text({0, 0, 1}), "[route] num_experts=0 is out of range; choose it in [1, 2147483647]");
  EXPECT_EQ(text({0, 8, 2}, {ScoreFunction::kSoftmax, true, std::nan("")}),
            "[route] route_scale=nan is not a positive number; choose a finite one above 0");
  EXPECT_EQ(text({0, 8, 2}, {}, DType::kBFloat16),
            "[route] dtype=bf16 is not supported; choose fp32 or fp64");
  const auto groups = [](int64_t num_groups, int64_t topk_groups, ScoreFunction score) {
    return RouterOptions{score, true, 1.0, num_groups, topk_groups};
  };
  EXPECT_EQ(text({0, 8, 2}, groups(3, 1, ScoreFunction::kSoftmax)),
            "[route] num_groups=3 does not divide num_experts=8");
  EXPECT_EQ(text({0, 8, 2}, groups(4, 5, ScoreFunction::kSoftmax)),
            "[route] topk_groups=5 is outside [1, num_groups=4]");
  EXPECT_EQ(text({0, 8, 5}, groups(4, 2, ScoreFunction::kSoftmax)),
            "[route] top_k=5 exceeds the 4 experts of topk_groups=2 groups; use more groups");
  EXPECT_EQ(text({0, 8, 1}, groups(8, 2, ScoreFunction::kSigmoid)),
            "[route] num_groups=8 leaves 1 expert in a group, but the two best rank it; choose at "
            "most 4");
  EXPECT_EQ(text({0, 8, 1}, groups(8, 2, ScoreFunction::kSoftmax)), "no ConfigError");
  EXPECT_EQ(text({3, 8, 2}), "[route] logits=null but 24 elements are needed; pass a buffer");
}

}  // namespace
}  // namespace perseid::kernels::testing
