// Statistical top-k, forward and backward.
//   Quantile      known values to 1e-10; the tail beyond it is the share, 1e-14; odd
//   Golden        a worked example: population and sample std, 1e-9; Q of 1 - K/E for E = 8, K = 2
//   Survivors     normal scores: mean number kept and share of empty rows of five (E, K)
//   ShiftAndScale z + c and z * c: the same survivors, weights times c
//   EqualScores   std = 0: expert 0 with a weight next to 0 that passes gradient, or none
//   Fallback      nothing above the threshold: the largest score over the mean, smaller id
//   Cap           the largest stay, equal ones with the smaller id
//   Reference     E = 2 .. 257, all variants: 1e-13 in float64, 2e-5 of the scale in float32
//   Derivative    float64 against central differences, every variant, 1e-7
//   OnlySupport   gradients of experts with weight 0 are not read: NaN there changes nothing
//   Threads       1, 2, 3, 7 threads: the same bits
//   NonFinite     experts 0 .. K-1 NaN, other tokens untouched, counted; Invalid, Empty
//   Errors        text of every check
#include "kernels/statistical_top_k.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

template <typename T>
struct Case {
  StatisticalTopKShape shape;
  StatisticalTopKOptions options;
  std::vector<T> scores;
  std::vector<uint8_t> valid;  ///< empty: all
  int64_t non_finite_tokens = -9;

  const uint8_t* valid_or_null() const { return valid.empty() ? nullptr : valid.data(); }
  std::vector<T> forward(bool is_reference = false) {
    std::vector<T> weights = nans<T>(static_cast<int64_t>(scores.size()));
    const auto call = is_reference ? &statistical_top_k_reference : &forward_call;
    call(shape, options, DTypeOf<T>::value, scores.data(), valid_or_null(), weights.data(),
         &non_finite_tokens);
    return weights;
  }
  std::vector<T> backward(const std::vector<T>& upstream, bool is_reference = false) {
    const std::vector<T> weights = forward(is_reference);
    std::vector<T> result = nans<T>(static_cast<int64_t>(scores.size()));
    const auto call = is_reference ? &statistical_top_k_backward_reference : &backward_call;
    call(shape, options, DTypeOf<T>::value, scores.data(), valid_or_null(), weights.data(),
         upstream.data(), result.data());
    return result;
  }
  std::string name() const {
    return "E=" + to_text(shape.num_experts) + " K=" + to_text(shape.top_k) +
           (options.unbiased ? " unbiased" : "") + (options.detach_threshold ? " detached" : "") +
           " min_experts=" + to_text(options.min_experts) + " cap=" + to_text(options.cap) +
           (valid.empty() ? " " : " masked ");
  }

 private:
  static void forward_call(const StatisticalTopKShape& shape, const StatisticalTopKOptions& options,
                           DType dtype, const void* scores, const uint8_t* valid, void* weights,
                           int64_t* non_finite_tokens) {
    statistical_top_k(shape, options, dtype, scores, valid, weights, non_finite_tokens);
  }
  static void backward_call(const StatisticalTopKShape& shape,
                            const StatisticalTopKOptions& options, DType dtype, const void* scores,
                            const uint8_t* valid, const void* weights, const void* grad_weights,
                            void* grad_scores) {
    statistical_top_k_backward(shape, options, dtype, scores, valid, weights, grad_weights,
                               grad_scores);
  }
};

template <typename T>
Case<T> random_case(int64_t num_tokens, int64_t num_experts, int64_t top_k, uint32_t seed = 1) {
  Case<T> result;
  result.shape = {num_tokens, num_experts, top_k};
  result.scores = normal_values<T>(num_tokens * num_experts, seed);
  return result;
}

Case<double> row(const std::vector<double>& scores, int64_t top_k) {
  Case<double> result;
  result.shape = {1, static_cast<int64_t>(scores.size()), top_k};
  result.scores = scores;
  return result;
}

/// std x threshold x min_experts x cap x mask.
template <typename T, typename Body>
void for_each_variant(Case<T> at, Body body) {
  std::vector<uint8_t> valid;
  for (int64_t t = 0; t < at.shape.num_tokens; ++t) valid.push_back(t % 4 != 2);
  for (int variant = 0; variant < 32; ++variant) {
    at.options.unbiased = (variant & 1) != 0;
    at.options.detach_threshold = (variant & 2) != 0;
    at.options.min_experts = (variant & 4) != 0 ? 0 : 1;
    at.options.cap = (variant & 8) != 0 ? at.shape.top_k : 0;
    at.valid = (variant & 16) != 0 ? valid : std::vector<uint8_t>{};
    body(at);
  }
}

TEST(StatisticalTopK, Quantile) {
  for (const auto& [share, expected] : {std::pair{.25, .6744897502},
                                        {.1, 1.2815515655},
                                        {.05, 1.6448536270},
                                        {.08, 1.4050715603},
                                        {.125, 1.1503493804}}) {
    EXPECT_NEAR(normal_upper_quantile(share), expected, 1e-10) << share;
    EXPECT_NEAR(normal_upper_quantile(1 - share), -expected, 1e-10) << share;
  }
  EXPECT_EQ(normal_upper_quantile(.5), 0);
  for (double share = .9; share > 1e-300; share *= .3) {
    const double tail = .5 * std::erfc(normal_upper_quantile(share) / std::sqrt(2.0));
    EXPECT_NEAR(tail, share, 1e-12 * share);
  }
}

TEST(StatisticalTopK, Golden) {
  auto at = row({1, 2, 3, 4, 5, 6, 7, 10}, 2);
  auto g = at.forward();
  for (size_t j = 0; j < 6; ++j) EXPECT_EQ(g[j], 0) << j;
  EXPECT_NEAR(g[6], .4105463727, 1e-9);
  EXPECT_NEAR(g[7], 3.4105463727, 1e-9);
  at.options.unbiased = true;
  g = at.forward();
  EXPECT_NEAR(g[6], 7 - 6.7164586435, 1e-9);
  EXPECT_NEAR(g[7], 10 - 6.7164586435, 1e-9);
  EXPECT_EQ(at.non_finite_tokens, 0);
}

TEST(StatisticalTopK, Survivors) {
  struct Expected {
    int64_t E, K;
    double mean, std, empty_low, empty_high;
  };
  for (const Expected& e : {Expected{8, 2, 2.17, .70, 1e-4, 8e-4},
                            {16, 2, 2.11, .79, .007, .011},
                            {64, 8, 8.09, 1.58, 0, 1e-9},
                            {256, 8, 8.01, 2.08, 0, 1e-3},
                            {1024, 64, 64.2, 5.2, 0, 1e-9}}) {
    const int64_t T = std::min<int64_t>(40000, 4'000'000 / e.E);
    auto at = random_case<float>(T, e.E, e.K, 11);
    at.options.min_experts = 0;
    const auto g = at.forward();
    double sum = 0, squares = 0, empty = 0;
    for (int64_t t = 0; t < T; ++t) {
      const auto begin = g.begin() + t * e.E;
      const auto count =
          static_cast<double>(std::count_if(begin, begin + e.E, [](float x) { return x > 0; }));
      sum += count;
      squares += count * count;
      empty += count == 0 ? 1 : 0;
    }
    const double mean = sum / static_cast<double>(T);
    // Four standard errors, and the rounding of the expectation.
    const double rounding = e.mean < 10 ? .005 : .05;
    EXPECT_NEAR(mean, e.mean, 4 * e.std / std::sqrt(static_cast<double>(T)) + rounding) << e.E;
    EXPECT_NEAR(std::sqrt(squares / static_cast<double>(T) - mean * mean), e.std, .05 * e.std);
    EXPECT_GE(empty / static_cast<double>(T), e.empty_low) << e.E;
    EXPECT_LE(empty / static_cast<double>(T), e.empty_high) << e.E;
  }
}

TEST(StatisticalTopK, ShiftAndScale) {
  auto at = random_case<double>(37, 16, 3);
  for (double& z : at.scores) z = std::round(z * 1024) / 1024;  // sums with 64 are exact
  const auto expected = at.forward();
  for (double& z : at.scores) z += 64;
  EXPECT_EQ(at.forward(), expected);
  for (double& z : at.scores) z *= 4;
  const auto scaled = at.forward();
  for (size_t i = 0; i < scaled.size(); ++i) EXPECT_EQ(scaled[i], 4 * expected[i]);
}

TEST(StatisticalTopK, EqualScores) {
  for (const double z : {0., .1, -3e10}) {
    for (const int64_t K : {1, 2, 4, 5}) {  // Q above, at and below 0
      auto at = row(std::vector<double>(6, z), K);
      auto expected = std::vector<double>(6, 0.0);
      expected[0] = std::numeric_limits<double>::min();
      EXPECT_EQ(at.forward(), expected) << z << " " << K;
      expect_close(at.backward({6, 1, 1, 1, 1, 1}), {5, -1, -1, -1, -1, -1}, 1e-15, "gradient");
      at.options.min_experts = 0;
      EXPECT_EQ(at.forward(), std::vector<double>(6, 0.0));
      EXPECT_EQ(at.backward({6, 1, 1, 1, 1, 1}), std::vector<double>(6, 0.0));
    }
  }
  EXPECT_EQ(row({-0., 0., 0., 0.}, 2).forward()[0], std::numeric_limits<double>::min());
}

TEST(StatisticalTopK, Fallback) {
  // Two equal scores above six: mean 1, std sqrt(3), Q(1 - 1/8) = 1.15, so 4 > theta; with five
  // equal ones the largest is below theta.
  auto at = row({0, 4, 0, 4, 0, 0, 0, 0}, 1);
  const auto two = at.forward();
  EXPECT_EQ(std::count(two.begin(), two.end(), 0.0), 6);
  at = row({0, 1, 1, 1, 1, 0, 0, 1}, 1);
  EXPECT_EQ(at.forward(), (std::vector<double>{0, 1 - .625, 0, 0, 0, 0, 0, 0}));
  expect_close(at.backward({1, 8, 1, 1, 1, 1, 1, 1}), {-1, 7, -1, -1, -1, -1, -1, -1}, 1e-15,
               "over the mean");
  at.options.detach_threshold = true;
  EXPECT_EQ(at.backward({1, 8, 1, 1, 1, 1, 1, 1}), (std::vector<double>{0, 8, 0, 0, 0, 0, 0, 0}));
  at.options.min_experts = 0;
  EXPECT_EQ(at.forward(), std::vector<double>(8, 0.0));
}

TEST(StatisticalTopK, Cap) {
  auto at = row({5, 0, 7, 5, 0, 0, 6, 5, 0, 0, 0, 0}, 5);
  const auto all = at.forward();
  for (const size_t j : {0, 2, 3, 6, 7}) EXPECT_GT(all[j], 0) << j;
  for (int64_t cap = 1; cap <= 5; ++cap) {
    at.options.cap = cap;
    std::vector<double> expected(12, 0.0);
    const std::vector<size_t> order = {2, 6, 0, 3, 7};
    for (size_t i = 0; i < static_cast<size_t>(cap); ++i) expected[order[i]] = all[order[i]];
    EXPECT_EQ(at.forward(), expected) << cap;
  }
}

template <typename T>
void expect_reference() {
  const double allowed = std::is_same_v<T, double> ? 1e-13 : 2e-5;
  for (const int64_t E : {2, 3, 8, 17, 257}) {
    for (const int64_t K : {int64_t{1}, E / 2, E - 1}) {
      for_each_variant(random_case<T>(13, E, K), [&](Case<T> at) {
        const auto upstream = normal_values<T>(13 * E, 21);
        const auto near = [&](const std::vector<T>& actual, const std::vector<T>& expected) {
          for (size_t i = 0; i < actual.size(); ++i) {
            const auto e = static_cast<double>(expected[i]);
            ASSERT_NEAR(static_cast<double>(actual[i]), e, allowed * (1 + std::abs(e)))
                << at.name() << i;
          }
        };
        near(at.forward(), at.forward(true));
        near(at.backward(upstream), at.backward(upstream, true));
        EXPECT_EQ(at.non_finite_tokens, 0);
      });
    }
  }
}

TEST(StatisticalTopK, Reference) {
  expect_reference<float>();
  expect_reference<double>();
}

TEST(StatisticalTopK, Derivative) {
  const double h = 1e-6;
  for (const int64_t E : {2, 3, 8, 17}) {
    for (const int64_t K : {int64_t{1}, E - 1}) {
      for_each_variant(random_case<double>(7, E, K, 5), [&](Case<double> at) {
        if (at.options.detach_threshold) return;  // its gradient is another by definition
        const auto upstream = normal_values<double>(7 * E, 21);
        const auto slopes = at.backward(upstream);
        for (size_t i = 0; i < at.scores.size(); ++i) {
          const double value = at.scores[i];
          at.scores[i] = value + h;
          const double above = dot(at.forward(), upstream);
          at.scores[i] = value - h;
          const double below = dot(at.forward(), upstream);
          at.scores[i] = value;
          ASSERT_NEAR(slopes[i], (above - below) / (2 * h), 1e-7) << at.name() << i;
        }
      });
    }
  }
}

TEST(StatisticalTopK, OnlySupport) {
  for_each_variant(random_case<double>(37, 8, 2), [](Case<double> at) {
    const auto g = at.forward();
    auto upstream = normal_values<double>(37 * 8, 21);
    auto spoilt = upstream;
    for (size_t i = 0; i < g.size(); ++i) {
      if (g[i] == 0) spoilt[i] = kNaN;
    }
    const auto gradient = at.backward(upstream);
    EXPECT_TRUE(same_bits(at.backward(spoilt), gradient)) << at.name();
    if (!at.options.detach_threshold) return;
    for (size_t i = 0; i < g.size(); ++i) EXPECT_EQ(gradient[i], g[i] > 0 ? upstream[i] : 0);
  });
}

TEST(StatisticalTopK, Threads) {
  auto at = random_case<float>(1999, 33, 4);
  at.options.cap = 4;
  at.scores[5 * 33] = static_cast<float>(kNaN);
  const auto upstream = normal_values<float>(1999 * 33, 8);
  const auto expected = at.forward(), expected_grad = at.backward(upstream);
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_TRUE(same_bits(at.forward(), expected)) << count;
    EXPECT_EQ(at.non_finite_tokens, 1);
    EXPECT_TRUE(same_bits(at.backward(upstream), expected_grad)) << count;
  }
}

TEST(StatisticalTopK, NonFinite) {
  for (const double bad : {kNaN, kInf, -kInf}) {
    auto at = random_case<double>(5, 6, 3);
    const auto upstream = normal_values<double>(30, 3);
    const auto clean = at.forward(), clean_grad = at.backward(upstream);
    at.scores[2 * 6 + 4] = bad;
    const auto g = at.forward(), grad = at.backward(upstream);
    EXPECT_EQ(at.non_finite_tokens, 1);
    for (size_t i = 0; i < 30; ++i) {
      if (i / 6 != 2) {
        EXPECT_EQ(g[i], clean[i]);
        EXPECT_EQ(grad[i], clean_grad[i]);
      } else {
        EXPECT_TRUE(i % 6 < 3 ? std::isnan(g[i]) : g[i] == 0) << i;
        EXPECT_TRUE(std::isnan(grad[i])) << i;
      }
    }
    EXPECT_TRUE(at.forward(true).size() == 30 && at.non_finite_tokens == 1);
  }
}

TEST(StatisticalTopK, Invalid) {
  auto at = random_case<double>(5, 6, 2);
  at.valid = {1, 1, 0, 1, 0};
  for (size_t i = 2 * 6; i < 3 * 6; ++i) at.scores[i] = kNaN;
  const auto g = at.forward(), grad = at.backward(normal_values<double>(30, 3));
  EXPECT_EQ(at.non_finite_tokens, 0);
  for (size_t i = 0; i < 30; ++i) {
    if (at.valid[i / 6] == 0) {
      EXPECT_EQ(g[i], 0);
      EXPECT_EQ(grad[i], 0);
    }
  }
}

TEST(StatisticalTopK, Empty) {
  auto at = random_case<float>(0, 6, 2);
  EXPECT_TRUE(at.forward().empty());
  EXPECT_EQ(at.non_finite_tokens, 0);
  EXPECT_TRUE(at.backward({}).empty());
}

TEST(StatisticalTopK, Errors) {
  const auto with = [](auto change) {
    return config_error([&] {
      auto at = random_case<float>(2, 4, 2);
      change(at.shape, at.options);
      at.forward();
    });
  };
  EXPECT_EQ(with([](auto& s, auto&) { s.num_tokens = -1; }),
            "[statistical_top_k] num_tokens=-1 is negative; choose 0 or more");
  for (const int64_t E : {int64_t{1}, int64_t{1} << 31}) {
    EXPECT_EQ(with([&](auto& s, auto&) { s.num_experts = E; }),
              "[statistical_top_k] num_experts=" + to_text(E) + " is outside [2, 2147483647]");
  }
  for (const int64_t K : {0, 4}) {
    EXPECT_EQ(with([&](auto& s, auto&) { s.top_k = K; }),
              "[statistical_top_k] top_k=" + to_text(K) + " is outside [1, num_experts - 1=3]");
  }
  EXPECT_EQ(with([](auto&, auto& o) { o.min_experts = 2; }),
            "[statistical_top_k] min_experts=2 is neither 0 nor 1");
  EXPECT_EQ(with([](auto&, auto& o) { o.cap = -1; }),
            "[statistical_top_k] cap=-1 is negative; choose 0 or more");
  const auto at = random_case<float>(2, 4, 2);
  std::vector<float> buffer(8);
  EXPECT_EQ(config_error([&] {
              statistical_top_k(at.shape, {}, DType::kFloat32, nullptr, nullptr, buffer.data(),
                                nullptr);
            }),
            "[statistical_top_k] scores=null but 8 elements are needed; pass a buffer");
  EXPECT_EQ(config_error([&] {
              statistical_top_k(at.shape, {}, DType::kFloat32, buffer.data(), nullptr, nullptr,
                                nullptr);
            }),
            "[statistical_top_k] weights=null but 8 elements are needed; pass a buffer");
  EXPECT_EQ(config_error([&] {
              statistical_top_k(at.shape, {}, DType::kBFloat16, buffer.data(), nullptr,
                                buffer.data(), nullptr);
            }),
            "[statistical_top_k] dtype=bf16 is not supported; choose fp32 or fp64");
  const char* const names[] = {"scores", "weights", "grad_weights", "grad_scores"};
  for (size_t missing = 0; missing < 4; ++missing) {
    float* pointers[] = {buffer.data(), buffer.data(), buffer.data(), buffer.data()};
    pointers[missing] = nullptr;
    EXPECT_EQ(config_error([&] {
                statistical_top_k_backward(at.shape, {}, DType::kFloat32, pointers[0], nullptr,
                                           pointers[1], pointers[2], pointers[3]);
              }),
              std::string("[statistical_top_k_backward] ") + names[missing] +
                  "=null but 8 elements are needed; pass a buffer");
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
