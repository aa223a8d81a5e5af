// route_backward.
//   Derivative   float64 against central differences of route, every variant and term, 1e-7
//   Reference    the parallel version in float32 and float64, E = 1 .. 256
//   Zeros        K = 1 with normalisation, invalid tokens, entries outside the selection: exactly 0
#include "tests/kernels/router_fixture.h"

namespace perseid::kernels::testing {
namespace {

/// Gradients of the loss sum(c w) + sum(a score_sum) + b lse_square_sum, each term optional, and
/// of sum(d score_shares) with the last two.
template <typename T>
struct Upstream {
  Upstream(const RouterShape& shape, bool with_weights, bool with_scores, bool with_lse)
      : weights(with_weights ? normal_values<T>(shape.num_tokens * shape.top_k, 21)
                             : std::vector<T>{}),
        scores(with_scores ? normal_values<T>(shape.num_experts, 22) : std::vector<T>{}),
        lse(with_lse ? std::vector<T>{T(0.3)} : std::vector<T>{}),
        shares(with_scores && with_lse ? normal_values<T>(shape.num_tokens * shape.num_experts, 23)
                                       : std::vector<T>{}),
        has_weights(with_weights) {}
  RouterGradInput input(const Routed<T>& routed) const {
    return {routed.expert_idx.data(), has_weights ? weights.data() : nullptr,
            scores.empty() ? nullptr : scores.data(), lse.empty() ? nullptr : lse.data(),
            shares.empty() ? nullptr : shares.data()};
  }
  double loss(const Routed<T>& routed) const {
    double sum = 0;
    for (size_t i = 0; i < weights.size(); ++i) sum += weights[i] * routed.weights[i];
    for (size_t e = 0; e < scores.size(); ++e) sum += scores[e] * routed.score_sum[e];
    for (size_t i = 0; i < shares.size(); ++i) sum += shares[i] * routed.score_shares[i];
    return lse.empty() ? sum : sum + lse[0] * routed.lse_square_sum[0];
  }
  std::vector<T> weights, scores, lse, shares;
  bool has_weights;
};

struct Terms {
  bool weights, scores, lse;
};
const std::vector<Terms> kTerms = {{true, false, false}, {false, true, false}, {false, false, true},
                                   {true, true, true},   {true, false, true},  {true, true, false}};

TEST(RouterGradient, IsTheDerivative) {
  for (const int64_t num_experts : {1, 2, 5, 6}) {
    for (const int64_t top_k : {1, 2, 5}) {
      if (top_k > num_experts) continue;
      RouterCase<double> base;
      base.shape = {4, num_experts, top_k};
      base.logits = normal_values<double>(4 * num_experts, 31, 1.5);
      for_each_variant(base, [](RouterCase<double> at) {
        const Routed<double> routed = at.route();
        for (const Terms& terms : kTerms) {
          const Upstream<double> upstream(at.shape, terms.weights, terms.scores, terms.lse);
          const auto grad = at.backward(upstream.input(routed));
          const auto reference = at.backward(upstream.input(routed), true);
          for (size_t i = 0; i < at.logits.size(); ++i) {
            const double h = 1e-5, centre = at.logits[i];
            at.logits[i] = centre + h;
            const double above = upstream.loss(at.route());
            at.logits[i] = centre - h;
            const double below = upstream.loss(at.route());
            at.logits[i] = centre;
            const double expected = (above - below) / (2 * h);
            ASSERT_NEAR(grad[i], expected, 1e-7 * (1e-2 + std::abs(expected))) << at.name();
            ASSERT_NEAR(reference[i], expected, 1e-7 * (1e-2 + std::abs(expected))) << at.name();
          }
        }
      });
    }
  }
}

template <typename T>
class RouterGradientTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(RouterGradientTyped, Types);

TYPED_TEST(RouterGradientTyped, EqualsReference) {
  using T = TypeParam;
  const double relative = std::is_same_v<T, float> ? 1e-5 : 1e-12;
  for (const int64_t num_experts : {1, 5, 8, 64, 128, 129, 256}) {
    for (const int64_t top_k : {1, 2, 8, 256}) {
      if (top_k > num_experts && top_k != 256) continue;
      RouterCase<T> base;
      const int64_t num_tokens = num_experts <= 128 ? 19 : 11;  // 16 side by side, and some more
      base.shape = {num_tokens, num_experts, std::min(top_k, num_experts)};
      base.logits = normal_values<T>(num_tokens * num_experts, 41, 2.0);
      base.logits[3] = -std::numeric_limits<T>::infinity();  // a masked expert
      for_each_variant(base, [&](const RouterCase<T>& at) {
        const Routed<T> routed = at.route();
        for (const Terms& terms : kTerms) {
          const Upstream<T> upstream(at.shape, terms.weights, terms.scores, terms.lse);
          expect_close(at.backward(upstream.input(routed)),
                       at.backward(upstream.input(routed), true), relative, at.name());
        }
      });
    }
  }
}

TYPED_TEST(RouterGradientTyped, ExceptionalRowsEqualReference) {
  using T = TypeParam;
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  RouterCase<T> base;
  base.shape = {6, 4, 2};
  base.logits = {nan,  1,    2,    3,    inf, 1,   2,   3,   inf, inf,  0,    1,
                 -inf, -inf, -inf, -inf, nan, nan, nan, nan, 1,   -inf, -inf, nan};
  for (int64_t t = 0; t < 14; ++t) {  // plain rows beside them, of which some have one finite logit
    for (int64_t e = 0; e < 4; ++e)
      base.logits.push_back(t % 3 == 2 && e != 1 ? -inf : T(t * e % 5));
  }
  base.shape.num_tokens = 20;
  for_each_variant(base, [](const RouterCase<T>& at) {
    const Routed<T> routed = at.route();
    for (const Terms& terms : kTerms) {
      const Upstream<T> upstream(at.shape, terms.weights, terms.scores, terms.lse);
      expect_close(at.backward(upstream.input(routed)), at.backward(upstream.input(routed), true),
                   5e-6, at.name());
    }
  });
}

TYPED_TEST(RouterGradientTyped, SameBitsForAnyThreadCount) {
  using T = TypeParam;
  RouterCase<T> base;
  base.shape = {1700, 16, 4};
  base.logits = normal_values<T>(1700 * 16, 51);
  for_each_variant(base, [](const RouterCase<T>& at) {
    const Routed<T> routed = at.route();
    const Upstream<T> upstream(at.shape, true, true, true);
    const auto expected = at.backward(upstream.input(routed));
    for (const int count : kThreadCounts) {
      const Threads threads(count);
      EXPECT_TRUE(same_bits(at.backward(upstream.input(routed)), expected)) << at.name();
    }
  });
}

TYPED_TEST(RouterGradientTyped, OneNormalizedChoiceHasNoGradient) {
  using T = TypeParam;
  for (const auto score : kScoreFunctions) {
    RouterCase<T> at;
    at.shape = {9, 7, 1};
    at.options = {score, true, 2.5};
    at.logits = normal_values<T>(63, 61);
    const Routed<T> routed = at.route();
    expect_close(routed.weights, std::vector<T>(9, T(2.5)), 2e-7, "weights");
    const Upstream<T> upstream(at.shape, true, false, false);
    for (const bool is_reference : {false, true}) {
      for (const T grad : at.backward(upstream.input(routed), is_reference)) EXPECT_EQ(grad, T{0});
    }
  }
}

TYPED_TEST(RouterGradientTyped, ZerosOutsideTheSelection) {
  using T = TypeParam;
  for (const auto score : kScoreFunctions) {
    RouterCase<T> at;
    at.shape = {6, 9, 3};
    at.options = {score, true, 1.0};
    at.logits = normal_values<T>(54, 71);
    at.valid = {1, 1, 0, 1, 0, 1};
    const Routed<T> routed = at.route();
    const Upstream<T> upstream(at.shape, true, false, false);
    const auto grad = at.backward(upstream.input(routed));
    for (int64_t t = 0; t < 6; ++t) {
      int64_t num_non_zero = 0;
      for (int64_t e = 0; e < 9; ++e) {
        ASSERT_FALSE(std::isnan(grad[t * 9 + e]));
        num_non_zero += grad[t * 9 + e] != T{0};
      }
      EXPECT_EQ(num_non_zero, at.valid[t] != 0 ? 3 : 0);
    }
    const Upstream<T> none(at.shape, false, false, false);
    for (const T value : at.backward(none.input(routed))) EXPECT_EQ(value, T{0});
    const Upstream<T> losses(at.shape, false, true, true);
    const auto all = at.backward(losses.input(routed));
    for (int64_t e = 0; e < 9; ++e) {
      EXPECT_NE(all[e], T{0});
      EXPECT_EQ(all[2 * 9 + e], T{0});
    }
  }
}

TEST(RouterGradient, WrongArguments) {
  const std::vector<float> logits(8, 0.0f), grads(2, 1.0f);
  std::vector<float> out(8);
  RouterGradInput grad;
  grad.grad_weights = grads.data();
  EXPECT_EQ(config_error([&] {
              route_backward({1, 8, 2}, {}, DType::kFloat32, {logits.data()}, grad, out.data());
            }),
            "[route_backward] expert_idx=null but 2 elements are needed; pass a buffer");
  EXPECT_EQ(config_error([&] {
              route_backward({1, 8, 9}, {}, DType::kFloat32, {logits.data()}, {}, out.data());
            }),
            "[route_backward] top_k=9 exceeds num_experts=8; choose top_k in [1, 8]");
}

}  // namespace
}  // namespace perseid::kernels::testing
