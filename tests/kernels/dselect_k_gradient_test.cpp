// dselect_k_backward.
//   Derivative    float64 against central differences of dselect_k, every variant, all terms, 1e-7;
//                 about a third of the switches is saturated, none near a kink
//   SharedMap     the same for maps whose codes share experts
//   Reference     float32 and float64, E = 1 .. 33, all variants
//   OnlySupport   gradients of experts with weight 0 are not read: NaN there changes nothing
//   NotDivided    a share of 0 leaves the gradient of the other bits as it is: exclusive products
//   PenaltyAlone  0 where E is a power of two, else towards experts
//   HardEval      z learns from entropy and penalty alone, omega from the picked experts
//   Errors        text of every check
#include "tests/kernels/dselect_k_fixture.h"

namespace perseid::kernels::testing {
namespace {

constexpr SumCoefficients kSums{.3, .2};

/// Moves logits away from +-gamma/2 for both widths of for_each_variant.
void leave_kinks(std::vector<double>& logits) {
  for (double& z : logits) {
    if (std::abs(std::abs(z) - 0.5) < 0.01) z *= 1.1;
  }
}

double loss_of(const DSelectKCase<double>& at, const std::vector<double>& upstream,
               const SumCoefficients& sums) {
  const auto result = at.forward();
  return dot(result.weights, upstream) + sums.entropy * result.entropy_sum +
         sums.penalty * result.penalty_sum;
}

void expect_derivative(DSelectKCase<double> at, const std::vector<double>& upstream,
                       const SumCoefficients& sums) {
  const double h = 1e-6;
  const auto slopes = at.backward(upstream, sums);
  double scale = 1;
  for (const double slope : slopes) scale = std::max(scale, std::abs(slope));
  for (size_t i = 0; i < at.logits.size(); ++i) {
    const double value = at.logits[i];
    at.logits[i] = value + h;
    const double above = loss_of(at, upstream, sums);
    at.logits[i] = value - h;
    const double below = loss_of(at, upstream, sums);
    at.logits[i] = value;
    ASSERT_NEAR(slopes[i], (above - below) / (2 * h), 1e-7 * scale) << at.name() << i;
  }
}

TEST(DSelectKBackward, Derivative) {
  for (const int64_t E : {1, 2, 3, 5, 8, 11}) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 2), std::min<int64_t>(E, 3)}) {
      auto base = random_dselect_k<double>(3, E, K, static_cast<uint32_t>(E) + 30);
      leave_kinks(base.logits);
      const auto upstream = normal_values<double>(3 * E, 21);
      for_each_variant(base, [&](const DSelectKCase<double>& at) {
        if (at.options.hard_eval) return;  // r is a constant of its gradient by definition
        // The penalty by itself: where hardly any mass is on an expert it dwarfs the rest.
        expect_derivative(at, upstream, {.3, 0});
        expect_derivative(at, std::vector<double>(upstream.size(), 0.0), {0, 1e-3});
      });
    }
  }
}

TEST(DSelectKBackward, SharedMap) {
  for (const int64_t E : {2, 5, 8}) {
    auto at = random_dselect_k<double>(3, E, 2, static_cast<uint32_t>(E) + 30);
    leave_kinks(at.logits);
    for (int64_t x = 0; x < 2 * E; ++x) at.map.push_back(static_cast<int32_t>(x * x % (E - 1)));
    for (const bool renormalize : {false, true}) {
      at.options.renormalize = renormalize;
      expect_derivative(at, normal_values<double>(3 * E, 21), {.3, 1e-3});
    }
  }
}

/// Relative to the scale of the gradient: differences may cancel to 0.
template <typename T>
void expect_near(const std::vector<T>& actual, const std::vector<T>& expected, double allowed,
                 const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    const auto e = static_cast<double>(expected[i]);
    ASSERT_NEAR(static_cast<double>(actual[i]), e, allowed * (1 + std::abs(e))) << what << i;
  }
}

template <typename T>
void expect_reference() {
  const double allowed = std::is_same_v<T, double> ? 1e-12 : 2e-5;
  for (const int64_t E : {1, 2, 3, 5, 8, 13, 16, 33}) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 2), std::min<int64_t>(E, 5)}) {
      for_each_variant(random_dselect_k<T>(7, E, K), [&](const DSelectKCase<T>& at) {
        for (const SumCoefficients& sums : {SumCoefficients{}, {.3, 0}, {0, .2}}) {
          for (const bool has_weights : {true, false}) {
            const auto upstream = has_weights ? normal_values<T>(7 * E, 21) : std::vector<T>{};
            expect_near(at.backward(upstream, sums), at.backward(upstream, sums, true), allowed,
                        at.name());
          }
        }
      });
    }
  }
}

TEST(DSelectKBackward, Reference) {
  expect_reference<float>();
  expect_reference<double>();
}

TEST(DSelectKBackward, OnlySupport) {
  for_each_variant(random_dselect_k<double>(37, 6, 2), [](const DSelectKCase<double>& at) {
    const auto weights = at.forward().weights;
    auto upstream = normal_values<double>(37 * 6, 21);
    auto spoilt = upstream;
    int64_t absent = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] > 0) continue;
      ++absent;
      upstream[i] = 0;
      spoilt[i] = std::numeric_limits<double>::quiet_NaN();
    }
    EXPECT_TRUE(absent > 0 || at.options.gamma > 1) << at.name();
    EXPECT_TRUE(same_bits(at.backward(spoilt, kSums), at.backward(upstream, kSums))) << at.name();
  });
}

TEST(DSelectKBackward, NotDivided) {
  // The first bit stands on 1, the second is open: experts 2 and 3 share, S'(0) = 1.5.
  DSelectKCase<double> at;
  at.shape = {1, 4, 1};
  at.logits = {.7, 0, 0};
  EXPECT_EQ(at.backward({100, 200, 3, 5}, {}), (std::vector<double>{0, 1.5 * (5 - 3), 0}));
}

TEST(DSelectKBackward, PenaltyAlone) {
  const auto two_powers = random_dselect_k<double>(37, 8, 2);
  for (const double g : two_powers.backward({}, {0, 1})) EXPECT_NEAR(g, 0, 1e-14);
  const auto five = random_dselect_k<double>(37, 5, 2).backward({}, {0, 1});
  for (const double g : five) EXPECT_GE(g, 0);  // every bit leads away from the experts 0 .. 4
  EXPECT_GT(*std::max_element(five.begin(), five.end()), 1);
}

TEST(DSelectKBackward, HardEval) {
  auto at = random_dselect_k<double>(37, 7, 3);
  at.options.hard_eval = true;
  const auto upstream = normal_values<double>(37 * 7, 21);
  const auto all = at.backward(upstream, kSums), sums_only = at.backward({}, kSums);
  const auto row = static_cast<size_t>(at.row_size());
  const auto switches = static_cast<size_t>(at.num_switches());
  for (size_t i = 0; i < all.size(); ++i) {
    if (i % row < switches) {
      EXPECT_EQ(all[i], sums_only[i]);
    } else {
      EXPECT_EQ(sums_only[i], 0);
    }
  }
  // omega: two selectors on different experts, g = alpha.
  DSelectKCase<double> two;
  two.shape = {1, 2, 2};
  two.options.hard_eval = true;
  two.logits = {.3, -.2, .4, -.1};
  const double alpha = 1 / (1 + std::exp(-.5));
  EXPECT_NEAR(two.backward({2, 5}, {})[2], alpha * (1 - alpha) * (5 - 2), 1e-15);
  // Saturated: the soft gradient.
  for (int64_t t = 0; t < 37; ++t) {
    for (int64_t n = 0; n < at.num_switches(); ++n) at.z(t, 0, n) = at.z(t, 0, n) > 0 ? 1 : -1;
  }
  const auto hard = at.backward(upstream, kSums);
  at.options.hard_eval = false;
  EXPECT_EQ(hard, at.backward(upstream, kSums));
}

TEST(DSelectKBackward, Errors) {
  const auto at = random_dselect_k<float>(2, 4, 2);
  const std::vector<float> weights(8);
  std::vector<float> logits(12);
  const auto call = [&](const DSelectKGradInput& grad, void* grad_logits) {
    return config_error([&] {
      dselect_k_backward(at.shape, at.options, DType::kFloat32, at.input(), grad, grad_logits);
    });
  };
  EXPECT_EQ(call({nullptr, weights.data(), nullptr, nullptr}, logits.data()),
            "[dselect_k_backward] weights=null but 8 elements are needed; pass a buffer");
  EXPECT_EQ(call({}, nullptr),
            "[dselect_k_backward] grad_logits=null but 12 elements are needed; pass a buffer");
}

}  // namespace
}  // namespace perseid::kernels::testing
