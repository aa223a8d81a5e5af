// comet_backward.
//   Derivative   float64 against central differences of comet, every variant, both terms, 1e-7;
//                about a third of the switches is saturated, none near a kink
//   Reference    float32 and float64, E = 1 .. 33, all variants
//   OnlySupport  gradients of experts with weight 0 are not read: NaN there changes nothing
//   Resurrection an expert with weight exactly 0 gets gradient exactly 0 in its leaf logits
//   HardEval     equals the soft gradient where all switches are saturated
//   Errors       text of every check
#include "tests/kernels/comet_fixture.h"

namespace perseid::kernels::testing {
namespace {

/// Moves logits away from +-gamma/2 for both widths of for_each_variant.
void leave_kinks(std::vector<double>& splits) {
  for (double& z : splits) {
    if (std::abs(std::abs(z) - 0.5) < 0.01) z *= 1.1;
  }
}

double loss_of(const CometCase<double>& at, const std::vector<double>& upstream, double coeff) {
  const auto result = at.forward();
  return dot(result.weights, upstream) + coeff * result.entropy_sum;
}

TEST(CometBackward, Derivative) {
  const double h = 1e-6;
  for (const int64_t E : {1, 2, 5, 6, 8}) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 2), std::min<int64_t>(E, 3)}) {
      auto base = random_comet<double>(3, E, K, static_cast<uint32_t>(E));
      leave_kinks(base.splits);
      const auto upstream = normal_values<double>(3 * E, 21);
      for_each_variant(base, [&](CometCase<double> at) {
        if (at.options.hard_eval) return;  // v is a constant of its gradient by definition
        const auto grad = at.backward(upstream, 0.3);
        const auto check = [&](std::vector<double>& logits, const std::vector<double>& slopes) {
          for (size_t i = 0; i < logits.size(); ++i) {
            const double value = logits[i];
            logits[i] = value + h;
            const double above = loss_of(at, upstream, 0.3);
            logits[i] = value - h;
            const double below = loss_of(at, upstream, 0.3);
            logits[i] = value;
            ASSERT_NEAR(slopes[i], (above - below) / (2 * h), 1e-7 * (1 + std::abs(slopes[i])))
                << at.name() << " " << i;
          }
        };
        check(at.splits, grad.splits);
        check(at.leaves, grad.leaves);
      });
    }
  }
}

/// Relative to 1, the scale of `upstream`: differences of gradients may cancel to 0.
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
  for (const int64_t E : {1, 2, 3, 5, 8, 13, 16, 33}) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 2), std::min<int64_t>(E, 5)}) {
      for_each_variant(random_comet<T>(7, E, K), [&](const CometCase<T>& at) {
        for (const double coeff : {0.0, 0.3}) {
          for (const bool has_weights : {true, false}) {
            const auto upstream = has_weights ? normal_values<T>(7 * E, 21) : std::vector<T>{};
            const auto actual = at.backward(upstream, coeff);
            const auto expected = at.backward(upstream, coeff, true);
            const double allowed = std::is_same_v<T, double> ? 1e-12 : 2e-5;
            expect_near(actual.splits, expected.splits, allowed, at.name() + " splits");
            expect_near(actual.leaves, expected.leaves, allowed, at.name() + " leaves");
          }
        }
      });
    }
  }
}

TEST(CometBackward, Reference) {
  expect_reference<float>();
  expect_reference<double>();
}

TEST(CometBackward, OnlySupport) {
  for_each_variant(random_comet<double>(37, 6, 2), [](const CometCase<double>& at) {
    const auto weights = at.forward().weights;
    auto upstream = normal_values<double>(37 * 6, 21);
    auto spoilt = upstream;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] == 0) {
        upstream[i] = 0;
        spoilt[i] = std::numeric_limits<double>::quiet_NaN();
      }
    }
    const auto expected = at.backward(upstream, 0.3), actual = at.backward(spoilt, 0.3);
    EXPECT_TRUE(same_bits(actual.splits, expected.splits)) << at.name();
    EXPECT_TRUE(same_bits(actual.leaves, expected.leaves)) << at.name();
  });
}

TEST(CometBackward, Resurrection) {
  auto at = random_comet<float>(37, 8, 2);
  const auto weights = at.forward().weights;
  const auto grad = at.backward(normal_values<float>(37 * 8, 21), 0.3);
  int64_t absent = 0;
  for (size_t t = 0; t < 37; ++t) {
    for (size_t m = 0; m < 8; ++m) {
      if (weights[t * 8 + m] > 0) continue;
      ++absent;
      for (size_t i = 0; i < 2; ++i) EXPECT_EQ(grad.leaves[(t * 2 + i) * 8 + m], 0.0f);
    }
  }
  EXPECT_GT(absent, 37);
}

TEST(CometBackward, HardEval) {
  auto at = random_comet<double>(37, 7, 3);
  for (double& z : at.splits) z = z > 0 ? 1 : -1;
  const auto upstream = normal_values<double>(37 * 7, 21);
  const auto soft = at.backward(upstream, 0.3);
  at.options.hard_eval = true;
  const auto hard = at.backward(upstream, 0.3);
  EXPECT_EQ(hard.splits, soft.splits);
  EXPECT_EQ(hard.leaves, soft.leaves);
  for (const double g : hard.splits) EXPECT_EQ(g, 0);
}

TEST(CometBackward, Errors) {
  const auto at = random_comet<float>(2, 4, 2);
  const std::vector<float> weights(8);
  std::vector<float> splits(12), leaves(16);
  const auto call = [&](const CometGradInput& grad, void* grad_splits, void* grad_leaves) {
    return config_error([&] {
      comet_backward(at.shape, at.options, DType::kFloat32, at.input(), grad, grad_splits,
                     grad_leaves);
    });
  };
  EXPECT_EQ(call({nullptr, weights.data(), nullptr}, splits.data(), leaves.data()),
            "[comet_backward] weights=null but 8 elements are needed; pass a buffer");
  EXPECT_EQ(call({}, nullptr, leaves.data()),
            "[comet_backward] grad_split_logits=null but 12 elements are needed; pass a buffer");
  EXPECT_EQ(call({}, splits.data(), nullptr),
            "[comet_backward] grad_leaf_logits=null but 16 elements are needed; pass a buffer");
}

}  // namespace
}  // namespace perseid::kernels::testing
