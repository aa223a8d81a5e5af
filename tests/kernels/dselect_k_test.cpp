// The DSelect-k gate, forward.
//   Bits               ceil(log2 E)
//   Golden             the published example with E = 4 and E = 3: r, g, its sum, the penalty; 1e-9
//   Codes              saturated bits pick the expert of their number, most significant bit first
//   Gamma              S(0.25) = 0.84375, 1, 0.53746875 for gamma = 1, 0.5, 10
//   SumsToOne          E a power of two: 1; else 1 less the mass on codes without an expert
//   Reference          E = 1 .. 33, all variants: 1e-13 in float64, 2e-6 in float32
//   AtMostK            saturated switches: at most K experts, zeros exact, hard_eval the same bits
//   HardEval           one-hot on the largest r, equal ones on the smaller expert
//   Unreachable        all mass on codes without an expert: no weight, also with renormalize
//   Renormalize        g over its sum
//   LossSums           entropy 0 when saturated, K ln E at z = 0; penalty K when all mass is there
//   MinWeight          kept weights unchanged, what is left out adds up to removed_weight
//   IdentityMap        no map and the identity: the same bits, forward and backward
//   CommonMap          one permutation for all selectors relabels the experts, the same bits
//   GoldenMap          the published example with maps by hand, one of which shares experts
//   SharedMap          codes of a selector that share an expert, experts without a code
//   Threads            1, 2, 3, 7 threads: the same bits
#include "tests/kernels/dselect_k_fixture.h"

namespace perseid::kernels::testing {
namespace {

/// r of one selector is g if it is the only one.
std::vector<double> reach_of(const std::vector<double>& z, int64_t E) {
  DSelectKCase<double> at;
  at.shape = {1, E, 1};
  at.logits = z;
  at.logits.push_back(7);  // a softmax of one
  return at.forward().weights;
}

TEST(DSelectK, Bits) {
  const std::vector<int64_t> expected = {0, 1, 2, 2, 3, 3, 3, 3, 4};
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(dselect_k_bits(static_cast<int64_t>(i) + 1), expected[i]) << i + 1;
  }
  EXPECT_EQ(dselect_k_bits(1 << 20), 20);
  EXPECT_EQ(dselect_k_bits((1 << 20) + 1), 21);
}

TEST(DSelectK, Golden) {
  expect_close(reach_of({.25, -.1}, 4), {.10125, .055, .54675, .297}, 1e-15, "first");
  expect_close(reach_of({.6, 0}, 4), {0, 0, .5, .5}, 1e-15, "second");
  const auto four = golden_dselect_k(4).forward();
  const std::vector<double> expected = {.0630240073, .0342352632, .5290999737, .3736407558};
  for (size_t j = 0; j < 4; ++j) EXPECT_NEAR(four.weights[j], expected[j], 1e-9) << j;
  EXPECT_NEAR(weight_sum(four.weights, 4), 1, 1e-15);
  EXPECT_NEAR(four.penalty_sum, 2 / (1 + 1e-6), 1e-14);
  EXPECT_EQ(four.num_switches, 4);
  EXPECT_EQ(four.saturated_switches, 1);
  EXPECT_EQ(four.non_finite_tokens, 0);
  EXPECT_EQ(four.removed_weight, 0);

  const auto three = golden_dselect_k(3).forward();
  for (size_t j = 0; j < 3; ++j) EXPECT_NEAR(three.weights[j], expected[j], 1e-9) << j;
  EXPECT_NEAR(weight_sum(three.weights, 3), .6263592442, 1e-9);
  EXPECT_NEAR(three.penalty_sum, 3.4224751067, 1e-5);  // that figure is without epsilon
  EXPECT_NEAR(three.penalty_sum, 1 / (.703 + 1e-6) + 1 / (.5 + 1e-6), 1e-14);
  double entropy = 0;
  for (const double r : {.10125, .055, .54675, .5}) entropy -= r * std::log(r + 1e-6);
  EXPECT_NEAR(three.entropy_sum, entropy, 1e-14);
}

TEST(DSelectK, Codes) {
  for (int64_t E = 2; E <= 17; ++E) {
    const int64_t bits = dselect_k_bits(E);
    for (int64_t code = 0; code < int64_t{1} << bits; ++code) {
      std::vector<double> z;
      for (int64_t b = 0; b < bits; ++b) {
        z.push_back(((code >> (bits - 1 - b)) & 1) != 0 ? .5 : -.5);
      }
      std::vector<double> expected(static_cast<size_t>(E), 0.0);
      if (code < E) expected[static_cast<size_t>(code)] = 1;
      EXPECT_EQ(reach_of(z, E), expected) << E << " " << code;
    }
  }
  // Not yet saturated: the first bit stands for half of the experts.
  EXPECT_EQ(reach_of({.5, 0, 0}, 8), (std::vector<double>{0, 0, 0, 0, .25, .25, .25, .25}));
  EXPECT_EQ(reach_of({0, 0, .5}, 8), (std::vector<double>{0, .25, 0, .25, 0, .25, 0, .25}));
}

TEST(DSelectK, Gamma) {
  DSelectKCase<double> at;
  at.shape = {1, 2, 1};
  at.logits = {.25, 0};
  for (const auto& [gamma, value] : {std::pair{1., .84375}, {.5, 1.}, {10., .53746875}}) {
    at.options.gamma = gamma;
    EXPECT_NEAR(at.forward().weights[1], value, 1e-15) << gamma;
    EXPECT_NEAR(at.forward().weights[0], 1 - value, 1e-15) << gamma;
  }
}

TEST(DSelectK, SumsToOne) {
  for (int64_t E = 1; E <= 33; ++E) {
    const int64_t codes = int64_t{1} << dselect_k_bits(E);
    auto at = random_dselect_k<double>(5, E, std::min<int64_t>(E, 3), static_cast<uint32_t>(E), .2);
    const auto some = at.forward().weights;
    at.shape.num_experts = codes;  // the same logits with an expert for every code
    const auto all = at.forward().weights;
    for (int64_t t = 0; t < 5; ++t) {
      EXPECT_NEAR(weight_sum(all, codes, t), 1, 1e-14) << E;
      for (int64_t j = 0; j < E; ++j) {
        EXPECT_EQ(some[static_cast<size_t>(t * E + j)], all[static_cast<size_t>(t * codes + j)]);
      }
      if (E < codes) {
        EXPECT_LT(weight_sum(some, E, t), .999) << E;
      }
    }
  }
}

template <typename T>
void expect_reference() {
  for (const int64_t E : {1, 2, 3, 5, 6, 7, 8, 13, 16, 33}) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 2), std::min<int64_t>(E, 5)}) {
      for_each_variant(random_dselect_k<T>(7, E, K), [](const DSelectKCase<T>& at) {
        const auto actual = at.forward(), expected = at.forward(true);
        expect_close(actual.weights, expected.weights, tolerance<T>(), at.name());
        const auto expect_sum = [&](double sum, double reference, const char* what) {
          EXPECT_NEAR(sum, reference, tolerance<T>() * (1 + std::abs(reference)))
              << at.name() << what;
        };
        expect_sum(actual.entropy_sum, expected.entropy_sum, "entropy");
        expect_sum(actual.penalty_sum, expected.penalty_sum, "penalty");
        expect_sum(actual.removed_weight, expected.removed_weight, "removed");
        EXPECT_EQ(actual.num_switches, expected.num_switches) << at.name();
        EXPECT_EQ(actual.saturated_switches, expected.saturated_switches) << at.name();
        EXPECT_EQ(actual.non_finite_tokens, 0);
      });
    }
  }
}

TEST(DSelectK, Reference) {
  expect_reference<float>();
  expect_reference<double>();
}

TEST(DSelectK, AtMostK) {
  for (const int64_t E : {2, 5, 8, 17}) {
    for (const int64_t K : {1, 2, 4}) {
      if (K > E) continue;
      auto at = random_dselect_k<float>(37, E, K);
      for (int64_t t = 0; t < 37; ++t) {
        for (int64_t n = 0; n < at.num_switches(); ++n) {
          float& z = at.z(t, 0, n);
          z = z > 0 ? .5f : -.5f;
        }
      }
      const auto soft = at.forward();
      EXPECT_EQ(soft.num_switches, 37 * at.num_switches());
      EXPECT_EQ(soft.saturated_switches, soft.num_switches);
      for (int64_t t = 0; t < 37; ++t) {
        const auto row = soft.weights.begin() + t * E;
        EXPECT_LE(std::count_if(row, row + E, [](float g) { return g != 0.0f; }), K);
      }
      at.options.hard_eval = true;
      EXPECT_TRUE(at.forward().has_same_bits(soft));
    }
  }
}

TEST(DSelectK, HardEval) {
  auto at = golden_dselect_k(4);
  at.options.hard_eval = true;
  const auto result = at.forward();  // selector 1 takes expert 2 (r .54675), selector 2 expert 2
  expect_close(result.weights, {0, 0, 1, 0}, 1e-15, "both");
  EXPECT_EQ(result.entropy_sum, golden_dselect_k(4).forward().entropy_sum);
  EXPECT_EQ(result.penalty_sum, golden_dselect_k(4).forward().penalty_sum);
  at.z(0, 1, 1) = .01;
  const double alpha = 1 / (1 + std::exp(-.5));
  expect_close(at.forward().weights, {0, 0, alpha, 1 - alpha}, 1e-15, "two");
  for (int64_t n = 0; n < 4; ++n) at.z(0, 0, n) = 0;  // all r equal: both take expert 0
  expect_close(at.forward().weights, {1, 0, 0, 0}, 1e-15, "ties");
  // The largest r of an expert, though a code without expert has more.
  at = golden_dselect_k(3);
  at.options.hard_eval = true;
  at.z(0, 0, 0) = at.z(0, 0, 1) = .2;  // r of code 3 is .628
  EXPECT_NEAR(at.forward().weights[1], alpha, 1e-15);
}

TEST(DSelectK, Unreachable) {
  for (const bool hard : {false, true}) {
    for (const bool renormalize : {false, true}) {
      auto at = golden_dselect_k(3);
      at.options.hard_eval = hard;
      at.options.renormalize = renormalize;
      for (int64_t n = 0; n < 4; ++n) at.z(0, 0, n) = 1;  // code 3, twice
      const auto result = at.forward();
      EXPECT_EQ(result.weights, (std::vector<double>{0, 0, 0}));
      EXPECT_NEAR(result.penalty_sum, 2e6, 1e-8);
      EXPECT_EQ(result.entropy_sum, 0);
      for (const double g : at.backward({1, 2, 3}, {.5, .5})) EXPECT_EQ(g, 0);
    }
  }
}

TEST(DSelectK, Renormalize) {
  for (const int64_t E : {3, 5, 6, 8}) {
    auto at = random_dselect_k<double>(37, E, 2, 3, .3);
    const auto plain = at.forward().weights;
    at.options.renormalize = true;
    const auto result = at.forward();
    for (int64_t t = 0; t < 37; ++t) {
      const double sum = weight_sum(plain, E, t);
      EXPECT_NEAR(weight_sum(result.weights, E, t), sum > 0 ? 1 : 0, 1e-14);
      for (int64_t j = 0; j < E && sum > 0; ++j) {
        const auto n = static_cast<size_t>(t * E + j);
        EXPECT_NEAR(result.weights[n], plain[n] / sum, 1e-14);
      }
    }
  }
}

TEST(DSelectK, LossSums) {
  for (const int64_t E : {2, 5, 8}) {
    auto at = random_dselect_k<double>(1, E, 2);
    for (int64_t n = 0; n < at.num_switches(); ++n) at.z(0, 0, n) = -1;  // expert 0
    EXPECT_LE(std::abs(at.forward().entropy_sum), 1e-6 * 2 * static_cast<double>(E)) << E;
    EXPECT_NEAR(at.forward().penalty_sum, 2 / (1 + 1e-6), 1e-15) << E;
    for (int64_t n = 0; n < at.num_switches(); ++n) at.z(0, 0, n) = 0;
    const auto codes = static_cast<double>(int64_t{1} << dselect_k_bits(E));
    const double share = static_cast<double>(E) / codes;
    EXPECT_NEAR(at.forward().entropy_sum, 2 * share * std::log(codes), 2.1e-6 * codes) << E;
    EXPECT_NEAR(at.forward().penalty_sum, 2 / (share + 1e-6), 1e-14) << E;
  }
}

TEST(DSelectK, MinWeight) {
  auto at = random_dselect_k<double>(37, 16, 2);
  const auto full = at.forward();
  at.options.min_weight = 0.05;
  const auto cut = at.forward();
  double removed = 0;
  for (size_t i = 0; i < full.weights.size(); ++i) {
    const bool is_kept = full.weights[i] >= 0.05;
    EXPECT_EQ(cut.weights[i], is_kept ? full.weights[i] : 0);
    if (!is_kept) removed += full.weights[i];
  }
  EXPECT_GT(removed, 0.1);
  EXPECT_NEAR(cut.removed_weight, removed, 1e-14);
  EXPECT_EQ(cut.entropy_sum, full.entropy_sum);
}

TEST(DSelectK, IdentityMap) {
  for (const int64_t E : {1, 5, 16, 33}) {
    for_each_variant(
        random_dselect_k<float>(7, E, std::min<int64_t>(E, 3)), [&](DSelectKCase<float> at) {
          if (!at.map.empty()) return;
          const auto expected = at.forward();
          const auto upstream = normal_values<float>(7 * E, 9);
          const auto expected_grad = at.backward(upstream, {.3, .2});
          for (int64_t i = 0; i < at.shape.num_selectors; ++i) {
            for (int32_t j = 0; j < E; ++j) at.map.push_back(j);
          }
          EXPECT_TRUE(at.forward().has_same_bits(expected)) << at.name();
          EXPECT_TRUE(same_bits(at.backward(upstream, {.3, .2}), expected_grad)) << at.name();
        });
  }
}

TEST(DSelectK, CommonMap) {
  const int64_t T = 37, E = 13, K = 3;
  for_each_variant(random_dselect_k<float>(T, E, K), [&](DSelectKCase<float> at) {
    if (!at.map.empty()) return;
    const auto map = shuffled_map(1, E);
    const auto relabelled = [&](const std::vector<float>& rows) {
      std::vector<float> result(rows.size());
      for (size_t n = 0; n < rows.size(); ++n) {
        const size_t j = n % E;
        result[n - j + static_cast<size_t>(map[j])] = rows[n];
      }
      return result;
    };
    const auto plain = at.forward();
    const auto upstream = normal_values<float>(T * E, 9);
    const auto plain_grad = at.backward(upstream, {.3, .2});
    for (int64_t i = 0; i < K; ++i) at.map.insert(at.map.end(), map.begin(), map.end());
    const auto mapped = at.forward();
    const auto grad = at.backward(relabelled(upstream), {.3, .2});
    EXPECT_EQ(mapped.entropy_sum, plain.entropy_sum) << at.name();
    EXPECT_EQ(mapped.penalty_sum, plain.penalty_sum) << at.name();
    if (at.options.renormalize) {  // the sum by experts has another order
      expect_close(mapped.weights, relabelled(plain.weights), 2e-6, at.name());
      expect_close(grad, plain_grad, 2e-5, at.name());
    } else {
      EXPECT_TRUE(same_bits(mapped.weights, relabelled(plain.weights))) << at.name();
      EXPECT_TRUE(same_bits(grad, plain_grad)) << at.name();
    }
  });
}

TEST(DSelectK, GoldenMap) {
  auto at = golden_dselect_k(4);
  // r of selector 1 is (.10125, .055, .54675, .297), of selector 2 (0, 0, .5, .5).
  at.map = {2, 0, 3, 1, 1, 1, 0, 0};
  const double a = 1 / (1 + std::exp(-.5));
  const std::vector<double> expected = {a * .055 + (1 - a), a * .297, a * .10125, a * .54675};
  expect_close(at.forward().weights, expected, 1e-15, "soft");
  EXPECT_EQ(at.forward().entropy_sum, golden_dselect_k(4).forward().entropy_sum);
  EXPECT_EQ(at.forward().penalty_sum, golden_dselect_k(4).forward().penalty_sum);
  const std::vector<double> rho = {7, -2, 5, 3};
  const auto grad = at.backward(rho, {});
  const double mean = .055 * 7 + .297 * -2 + .10125 * 5 + .54675 * 3;  // d of selector 1
  EXPECT_NEAR(grad[4], a * (1 - a) * (mean - 7), 1e-14);
  EXPECT_NEAR(grad[5], -grad[4], 1e-15);
  EXPECT_NEAR(grad[3], 0, 1e-15);  // codes 2 and 3 of selector 2 have one expert
  // Second bit of selector 1, S = .352: S'(-.1) = 1.44 of codes 1 and 3 against 0 and 2.
  EXPECT_NEAR(grad[1], a * 1.44 * (.15625 * (7 - 5) + .84375 * (-2 - 3)), 1e-14);

  at.options.renormalize = true;
  expect_close(at.forward().weights, expected, 1e-15, "the sum is 1");
  at.options.renormalize = false;
  at.options.min_weight = .1;
  expect_close(at.forward().weights, {expected[0], expected[1], 0, expected[3]}, 1e-15, "cut");
  EXPECT_NEAR(at.forward().removed_weight, expected[2], 1e-15);
  at.options.min_weight = 0;
  at.options.hard_eval = true;  // code 2 of selector 1, code 2, the first of two, of selector 2
  expect_close(at.forward().weights, {1 - a, 0, 0, a}, 1e-15, "hard");
  EXPECT_NEAR(at.backward(rho, {})[4], a * (1 - a) * (3 - 7), 1e-15);
  at.omega(0, 1) = std::numeric_limits<double>::quiet_NaN();
  const auto spoilt = at.forward().weights;
  for (size_t m = 0; m < 4; ++m) EXPECT_EQ(std::isnan(spoilt[m]), m < 2) << m;
}

TEST(DSelectK, SharedMap) {
  for (const int64_t E : {3, 7, 16}) {
    for_each_variant(random_dselect_k<double>(7, E, 3), [&](DSelectKCase<double> at) {
      if (at.map.empty()) return;
      for (int64_t x = 0; x < 3 * E; ++x) {
        at.map[static_cast<size_t>(x)] = static_cast<int32_t>(x * x % (E - 1));
      }
      const auto actual = at.forward(), expected = at.forward(true);
      expect_close(actual.weights, expected.weights, tolerance<double>(), at.name());
      for (int64_t t = 0; t < 7; ++t) {
        EXPECT_EQ(actual.weights[static_cast<size_t>(t * E + E - 1)], 0) << at.name();
      }
      const auto upstream = normal_values<double>(7 * E, 21);
      expect_close(at.backward(upstream, {.3, 0}), at.backward(upstream, {.3, 0}, true), 1e-11,
                   at.name());
    });
  }
}

TEST(DSelectK, Threads) {
  const auto at = random_dselect_k<float>(1999, 13, 2);
  const auto upstream = normal_values<float>(1999 * 13, 8);
  const auto expected = at.forward();
  const auto expected_grad = at.backward(upstream, {.3, .2});
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_TRUE(at.forward().has_same_bits(expected)) << count;
    EXPECT_TRUE(same_bits(at.backward(upstream, {.3, .2}), expected_grad)) << count;
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
