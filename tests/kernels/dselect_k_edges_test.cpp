// The DSelect-k gate, forward and backward at the edges of numbers and sizes.
//   Underflow          a product of shares below the smallest normal number is 0
//   Infinite           omega = +inf shares all weight, all -inf 1/K; z = inf saturates; counted
//   NotANumber         experts 0 .. K-1 NaN, other tokens untouched, sums NaN, counted
//   Invalid, Empty     zeros and no counts, whatever the token holds; T = 0; E = 1
//   Errors             text of every check
#include "tests/kernels/dselect_k_fixture.h"

namespace perseid::kernels::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

TEST(DSelectKEdges, Underflow) {
  DSelectKCase<float> at;
  at.shape = {1, 16, 1};
  at.logits = {-.499994f, -.499994f, -.499994f, -.499994f, 0};  // shares of 1e-10 on the ones
  const auto weights = at.forward().weights;
  EXPECT_EQ(weights[15], 0.0f);  // 1e-40, subnormal
  EXPECT_GT(weights[7], 0.0f);   // 1e-30
  EXPECT_NEAR(weights[0], 1.0f, 1e-6f);
  for (const float g : at.backward(std::vector<float>(16, 1), {})) EXPECT_TRUE(std::isfinite(g));
}

TEST(DSelectKEdges, Infinite) {
  auto at = golden_dselect_k(4);
  at.omega(0, 1) = kInf;
  auto result = at.forward();
  EXPECT_EQ(result.weights, (std::vector<double>{0, 0, .5, .5}));  // selector 2 alone
  EXPECT_EQ(result.non_finite_tokens, 1);
  auto grad = at.backward({1, 2, 3, 5}, {});
  EXPECT_EQ(grad[4], 0);
  EXPECT_EQ(grad[5], 0);
  EXPECT_NEAR(grad[3], 1.5 * (5 - 3), 1e-14);  // its open bit still learns
  for (const double omega : {kInf, -kInf}) {
    at.omega(0, 0) = at.omega(0, 1) = omega;
    expect_close(at.forward().weights, {.10125 / 2, .055 / 2, (.54675 + .5) / 2, (.297 + .5) / 2},
                 1e-15, "both");
    grad = at.backward({1, 2, 3, 5}, {});
    EXPECT_EQ(grad[4], 0);
    EXPECT_EQ(grad[5], 0);
  }
  at = golden_dselect_k(4);
  at.z(0, 1, 0) = kInf;  // as saturated as 0.6
  result = at.forward();
  EXPECT_TRUE(same_bits(result.weights, golden_dselect_k(4).forward().weights));
  EXPECT_EQ(result.non_finite_tokens, 1);
  for (const double g : at.backward({1, 2, 3, 5}, {.1, .1})) EXPECT_TRUE(std::isfinite(g));
}

TEST(DSelectKEdges, NotANumber) {
  const int64_t E = 6, K = 3;
  for (const bool in_code : {true, false}) {
    auto at = random_dselect_k<double>(5, E, K);
    const auto clean = at.forward();
    const auto upstream = normal_values<double>(5 * E, 3);
    const auto clean_grad = at.backward(upstream, {.2, .1});
    (in_code ? at.z(2, 2, 1) : at.omega(2, 1)) = kNaN;
    const auto result = at.forward();
    EXPECT_EQ(result.non_finite_tokens, 1);
    EXPECT_EQ(result.num_switches, 4 * at.num_switches());
    EXPECT_TRUE(std::isnan(result.entropy_sum));
    EXPECT_TRUE(std::isnan(result.penalty_sum));
    EXPECT_TRUE(std::isnan(result.removed_weight));
    for (size_t i = 0; i < 30; ++i) {
      if (i / 6 != 2) {
        EXPECT_EQ(result.weights[i], clean.weights[i]);
      } else if (i % 6 < 3) {
        EXPECT_TRUE(std::isnan(result.weights[i]));
      } else {
        EXPECT_EQ(result.weights[i], 0);
      }
    }
    const auto grad = at.backward(upstream, {.2, .1});
    const auto row = static_cast<size_t>(at.row_size());
    for (size_t i = 0; i < grad.size(); ++i) {
      EXPECT_TRUE(i / row == 2 ? std::isnan(grad[i]) : grad[i] == clean_grad[i]) << i;
    }
  }
}

TEST(DSelectKEdges, Invalid) {
  auto at = random_dselect_k<double>(5, 6, 2);
  at.valid = {1, 1, 0, 1, 0};
  for (int64_t n = 0; n < at.row_size(); ++n) {
    at.z(2, 0, n) = kNaN;
    at.z(4, 0, n) = kInf;
  }
  const auto result = at.forward();
  EXPECT_EQ(result.non_finite_tokens, 0);
  EXPECT_EQ(result.num_switches, 3 * at.num_switches());
  EXPECT_TRUE(std::isfinite(result.entropy_sum));
  EXPECT_TRUE(std::isfinite(result.penalty_sum));
  const auto grad = at.backward(normal_values<double>(30, 3), {.2, .1});
  for (const int64_t t : {2, 4}) {
    EXPECT_EQ(weight_sum(result.weights, 6, t), 0);
    for (int64_t n = 0; n < at.row_size(); ++n) {
      EXPECT_EQ(grad[static_cast<size_t>(t * at.row_size() + n)], 0);
    }
  }
}

TEST(DSelectKEdges, Empty) {
  const auto result = random_dselect_k<float>(0, 6, 2).forward();
  EXPECT_EQ(result.entropy_sum, 0);
  EXPECT_EQ(result.penalty_sum, 0);
  EXPECT_EQ(result.removed_weight, 0);
  EXPECT_EQ(result.num_switches, 0);
  EXPECT_EQ(result.saturated_switches, 0);
  EXPECT_EQ(result.non_finite_tokens, 0);
  const auto one = random_dselect_k<float>(3, 1, 1);
  EXPECT_EQ(one.forward().weights, (std::vector<float>{1, 1, 1}));
  EXPECT_EQ(one.backward({1, 2, 3}, {.2, .1}), (std::vector<float>{0, 0, 0}));
}

TEST(DSelectKEdges, Errors) {
  const auto with = [](auto change) {
    return config_error([&] {
      DSelectKCase<float> at = random_dselect_k<float>(2, 4, 2);
      DSelectKInput input = at.input();
      change(at.shape, at.options, input);
      dselect_k(at.shape, at.options, DType::kFloat32, input, {});
    });
  };
  EXPECT_EQ(with([](auto& s, auto&, auto&) { s.num_tokens = -1; }),
            "[dselect_k] num_tokens=-1 is negative; choose 0 or more");
  for (const int64_t E : {int64_t{0}, int64_t{1} << 31}) {
    EXPECT_EQ(with([&](auto& s, auto&, auto&) { s.num_experts = E; }),
              "[dselect_k] num_experts=" + to_text(E) + " is outside [1, 2147483647]");
  }
  for (const int64_t K : {0, 5}) {
    EXPECT_EQ(with([&](auto& s, auto&, auto&) { s.num_selectors = K; }),
              "[dselect_k] num_selectors=" + to_text(K) + " is outside [1, num_experts=4]");
  }
  for (const double gamma : {0.0, -1.0, kNaN, kInf, 1e-50}) {
    EXPECT_EQ(with([&](auto&, auto& o, auto&) { o.gamma = gamma; }),
              "[dselect_k] gamma=" + to_text(gamma) + " is not a finite number above 0");
  }
  EXPECT_EQ(with([](auto&, auto& o, auto&) { o.min_weight = 1; }),
            "[dselect_k] min_weight=1 is outside [0, 1)");
  EXPECT_EQ(with([](auto&, auto&, auto& i) { i.logits = nullptr; }),
            "[dselect_k] logits=null but 12 elements are needed; pass a buffer");
  const auto at = random_dselect_k<float>(2, 4, 2);
  EXPECT_EQ(
      config_error([&] { dselect_k(at.shape, at.options, DType::kBFloat16, at.input(), {}); }),
      "[dselect_k] dtype=bf16 is not supported; choose fp32 or fp64");
}

}  // namespace
}  // namespace perseid::kernels::testing
