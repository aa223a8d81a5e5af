// The COMET gate, forward.
//   Golden             two published-formula examples, E = 4 with K = 2 and E = 6 with K = 1, to
//   1e-9 TreeSumsToOne      K = 1, a = 0, E = 1 .. 17: g is v and sums to 1; every leaf has mass
//   Reference          E = 1 .. 33, all variants: 1e-13 in float64, 2e-6 in float32
//   AtMostK            saturated switches: at most K experts, zeros exact, hard_eval changes no bit
//   HardEval           one-hot on the largest v, equal ones on the smaller leaf
//   IdentityMap        no map and the identity: the same bits
//   MapAndLeaves       leaf logits and map permuted together leave g
//   Entropy            K E (0..1e-6) when saturated, K ln E at z = 0 with E a power of two
//   MinWeight          kept weights unchanged, what is left out adds up to removed_weight
//   Threads            1, 2, 3, 7 threads: the same bits
//   Underflow          a product of shares below the smallest normal number is 0, g stays finite
//   Infinite           a = +inf takes all weight, all -inf share by v; both counted
//   NotANumber         experts 0 .. K-1 NaN, other tokens untouched, sums NaN, counted
//   Invalid, Empty     zeros and no counts, whatever the token holds; T = 0
//   Errors             text of every check
#include "tests/kernels/comet_fixture.h"

namespace perseid::kernels::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

CometCase<double> golden() {
  CometCase<double> at;
  at.shape = {1, 4, 2};
  at.splits = {0.25, -0.1, 0.5, 0, 0.6, -0.25};
  at.leaves = {0.1, -0.2, 0.3, 0, 0, 0.5, -0.1, 0.2};
  return at;
}

double row_sum(const std::vector<double>& weights, int64_t E, int64_t t = 0) {
  double sum = 0;
  for (int64_t m = 0; m < E; ++m) sum += weights[static_cast<size_t>(t * E + m)];
  return sum;
}

TEST(Comet, Golden) {
  const auto two = golden().forward();
  const std::vector<double> expected = {.3995807438, .2159635547, .1358602041, .2485954974};
  for (size_t m = 0; m < 4; ++m) EXPECT_NEAR(two.weights[m], expected[m], 1e-9) << m;
  EXPECT_NEAR(two.entropy_sum, 1.8905598098, 1e-9);
  EXPECT_EQ(two.reached_nodes, 6);
  EXPECT_EQ(two.saturated_nodes, 2);
  EXPECT_EQ(two.non_finite_tokens, 0);
  EXPECT_EQ(two.removed_weight, 0);

  // A tree alone with equal leaf logits gives its reach v.
  const std::vector<std::vector<double>> expected_reach = {{.297, .54675, .15625, 0},
                                                           {.5, 0, .078125, .421875}};
  for (size_t i = 0; i < 2; ++i) {
    CometCase<double> tree;
    tree.shape = {1, 4, 1};
    const auto all = golden().splits;
    tree.splits.assign(all.begin() + static_cast<std::ptrdiff_t>(3 * i),
                       all.begin() + static_cast<std::ptrdiff_t>(3 * i + 3));
    tree.leaves.assign(4, 0.0);
    const auto reach = tree.forward().weights;
    for (size_t l = 0; l < 4; ++l) EXPECT_NEAR(reach[l], expected_reach[i][l], 1e-15) << i << l;
  }
  // d g_m / d a_il = w_il (1 - g_m) for m = l gives the weights w before trees are merged.
  const std::vector<double> expected_w = {.1583567096, .2159635547, .1017557460, 0,
                                          .2412240341, 0,           .0341044582, .2485954974};
  for (size_t m = 0; m < 4; ++m) {
    std::vector<double> upstream(4, 0.0);
    upstream[m] = 1;
    const auto grad = golden().backward(upstream, 0);
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_NEAR(grad.leaves[4 * i + m] / (1 - two.weights[m]), expected_w[4 * i + m], 1e-9);
    }
  }

  CometCase<double> one;
  one.shape = {1, 6, 1};
  one.splits = {0.25, -0.1, 0.5, 0, 0.3};
  one.leaves = {0.1, -0.2, 0.3, 0, 0.4, -0.3};
  const std::vector<double> expected_one = {.1326806975, .0982922782, .5346098916,
                                            .0459699440, .1884471887, 0};
  const auto weights = one.forward().weights;
  for (size_t m = 0; m < 6; ++m) EXPECT_NEAR(weights[m], expected_one[m], 1e-9) << m;
  EXPECT_EQ(weights[5], 0);
  one.leaves.assign(6, 0.0);
  const auto v = one.forward().weights;
  const std::vector<double> expected_v = {.1485, .1485, .489888, .056862, .15625, 0};
  for (size_t m = 0; m < 6; ++m) EXPECT_NEAR(v[m], expected_v[m], 1e-15) << m;
}

TEST(Comet, TreeSumsToOne) {
  for (int64_t E = 2; E <= 17; ++E) {
    auto at = random_comet<double>(1, E, 1, static_cast<uint32_t>(E), 0.1);
    std::fill(at.leaves.begin(), at.leaves.end(), 0.0);
    const auto v = at.forward().weights;  // over their sum S
    for (const double g : v) EXPECT_GT(g, 0) << E;
    // A second tree puts 1 on leaf 0: the others become v / (S + 1), half as much if S is 1.
    at.shape.num_trees = 2;
    at.splits.resize(static_cast<size_t>(2 * (E - 1)), 1.0);
    at.leaves.resize(static_cast<size_t>(2 * E), 0.0);
    const auto halves = at.forward().weights;
    EXPECT_NEAR(halves[0], (v[0] + 1) / 2, 1e-15) << E;
    for (size_t m = 1; m < v.size(); ++m) EXPECT_NEAR(halves[m], v[m] / 2, 1e-15) << E;
  }
}

template <typename T>
void expect_reference() {
  for (const int64_t E : {1, 2, 3, 5, 6, 7, 8, 13, 16, 33}) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 2), std::min<int64_t>(E, 5)}) {
      for_each_variant(random_comet<T>(7, E, K), [](const CometCase<T>& at) {
        const auto actual = at.forward(), expected = at.forward(true);
        expect_close(actual.weights, expected.weights, tolerance<T>(), at.name());
        EXPECT_NEAR(actual.entropy_sum, expected.entropy_sum,
                    tolerance<T>() * (1 + expected.entropy_sum))
            << at.name();
        EXPECT_NEAR(actual.removed_weight, expected.removed_weight,
                    tolerance<T>() * (1 + expected.removed_weight))
            << at.name();
        EXPECT_EQ(actual.reached_nodes, expected.reached_nodes) << at.name();
        EXPECT_EQ(actual.saturated_nodes, expected.saturated_nodes) << at.name();
        EXPECT_EQ(actual.non_finite_tokens, 0);
      });
    }
  }
}

TEST(Comet, Reference) {
  expect_reference<float>();
  expect_reference<double>();
}

TEST(Comet, AtMostK) {
  for (const int64_t E : {2, 5, 8, 17}) {
    for (const int64_t K : {1, 2, 4}) {
      if (K > E) continue;
      auto at = random_comet<float>(37, E, K);
      for (float& z : at.splits) z = z > 0 ? 0.5f : -0.5f;
      const auto soft = at.forward();
      EXPECT_EQ(soft.saturated_nodes, soft.reached_nodes);
      EXPECT_GE(soft.reached_nodes, 37 * K * static_cast<int64_t>(std::log2(E)));
      EXPECT_LE(soft.reached_nodes, 37 * K * static_cast<int64_t>(std::ceil(std::log2(E))));
      for (int64_t t = 0; t < 37; ++t) {
        const auto row = soft.weights.begin() + t * E;
        EXPECT_LE(std::count_if(row, row + E, [](float g) { return g != 0.0f; }), K);
        if (K == 1) {
          EXPECT_EQ(*std::max_element(row, row + E), 1.0f);
        }
      }
      at.options.hard_eval = true;
      EXPECT_TRUE(at.forward().has_same_bits(soft));
    }
  }
}

TEST(Comet, HardEval) {
  auto at = golden();
  at.options.hard_eval = true;
  const auto result = at.forward();  // tree 1 takes leaf 1 (v .54675), tree 2 leaf 0 (v .5)
  const double first = std::exp(-0.2), second = std::exp(0.0);
  EXPECT_NEAR(result.weights[1], first / (first + second), 1e-15);
  EXPECT_NEAR(result.weights[0], second / (first + second), 1e-15);
  EXPECT_EQ(result.weights[2], 0);
  EXPECT_EQ(result.weights[3], 0);
  EXPECT_EQ(result.entropy_sum, golden().forward().entropy_sum);
  at.splits.assign(6, 0.0);  // all leaves equal: both trees take leaf 0
  EXPECT_EQ(at.forward().weights, (std::vector<double>{1, 0, 0, 0}));
}

TEST(Comet, IdentityMap) {
  for (const int64_t E : {1, 5, 16}) {
    auto at = random_comet<float>(37, E, std::min<int64_t>(E, 3));
    const auto expected = at.forward();
    const auto expected_grad = at.backward(normal_values<float>(37 * E, 9), 0.3);
    for (int64_t i = 0; i < at.shape.num_trees; ++i) {
      for (int32_t l = 0; l < E; ++l) at.map.push_back(l);
    }
    EXPECT_TRUE(at.forward().has_same_bits(expected));
    const auto grad = at.backward(normal_values<float>(37 * E, 9), 0.3);
    EXPECT_TRUE(same_bits(grad.splits, expected_grad.splits));
    EXPECT_TRUE(same_bits(grad.leaves, expected_grad.leaves));
  }
}

TEST(Comet, MapAndLeaves) {
  // z = 0: all leaves of a power of two are alike, so leaf logits may move with the map.
  const int64_t E = 8, K = 2, T = 3;
  auto at = random_comet<double>(T, E, K, 3, 0.0);
  const auto expected = at.forward();
  auto moved = at;
  moved.map = shuffled_map(K, E);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t l = 0; l < E; ++l) {
        const int64_t base = (t * K + i) * E;
        moved.leaves[static_cast<size_t>(base + l)] =
            at.leaves[static_cast<size_t>(base + moved.map[static_cast<size_t>(i * E + l)])];
      }
    }
  }
  expect_close(moved.forward().weights, expected.weights, 1e-15, "moved");
  // Any tree: the map alone relabels the experts.
  auto one = random_comet<double>(T, E, 1, 4);
  const auto plain = one.forward().weights;
  one.map = shuffled_map(1, E);
  const auto mapped = one.forward().weights;
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t l = 0; l < E; ++l) {
      EXPECT_NEAR(mapped[static_cast<size_t>(t * E + one.map[static_cast<size_t>(l)])],
                  plain[static_cast<size_t>(t * E + l)], 1e-15);
    }
  }
}

TEST(Comet, Entropy) {
  for (const int64_t E : {2, 5, 8}) {
    auto at = random_comet<double>(1, E, 2);
    for (double& z : at.splits) z = z > 0 ? 1 : -1;
    EXPECT_LE(std::abs(at.forward().entropy_sum), 1e-6 * 2 * static_cast<double>(E)) << E;
    std::fill(at.splits.begin(), at.splits.end(), 0.0);
    if (E == 5) continue;
    const double uniform = std::log(static_cast<double>(E));
    EXPECT_NEAR(at.forward().entropy_sum, 2 * uniform, 2.1e-6 * static_cast<double>(E)) << E;
  }
}

TEST(Comet, MinWeight) {
  auto at = random_comet<double>(37, 16, 2);
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

TEST(Comet, Threads) {
  const auto at = random_comet<float>(1999, 16, 2);
  const auto upstream = normal_values<float>(1999 * 16, 8);
  const auto expected = at.forward();
  const auto expected_grad = at.backward(upstream, 0.3);
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_TRUE(at.forward().has_same_bits(expected)) << count;
    const auto grad = at.backward(upstream, 0.3);
    EXPECT_TRUE(same_bits(grad.splits, expected_grad.splits)) << count;
    EXPECT_TRUE(same_bits(grad.leaves, expected_grad.leaves)) << count;
  }
}

TEST(Comet, Underflow) {
  CometCase<float> at;
  at.shape = {1, 16, 1};
  at.splits.assign(15, -0.499999f);  // four shares of 1e-11 to the first leaf
  at.leaves.assign(16, 0.0f);
  at.leaves[0] = 300.0f;  // would win if its v counted
  const auto weights = at.forward().weights;
  EXPECT_EQ(weights[0], 0.0f);
  EXPECT_NEAR(weights[15], 1.0f, 1e-6f);
  const auto grad = at.backward(normal_values<float>(16, 3), 0.1);
  for (const float g : grad.splits) EXPECT_TRUE(std::isfinite(g));
  for (const float g : grad.leaves) EXPECT_TRUE(std::isfinite(g));
}

TEST(Comet, Infinite) {
  auto at = golden();
  at.leaves[1] = at.leaves[4] = kInf;  // v = .54675 and .5, experts 1 and 0
  auto result = at.forward();
  EXPECT_NEAR(result.weights[0], .5 / 1.04675, 1e-15);
  EXPECT_NEAR(result.weights[1], .54675 / 1.04675, 1e-15);
  EXPECT_EQ(result.weights[2], 0);
  EXPECT_EQ(result.non_finite_tokens, 1);
  const auto grad = at.backward({1, 2, 3, 4}, 0);
  for (const double g : grad.leaves) EXPECT_EQ(g, 0);
  at.leaves.assign(8, -kInf);
  result = at.forward();
  EXPECT_NEAR(result.weights[0], (.297 + .5) / 2, 1e-15);
  EXPECT_NEAR(result.weights[3], .421875 / 2, 1e-15);
  at = golden();
  at.leaves[3] = kInf;  // not reached
  result = at.forward();
  EXPECT_TRUE(same_bits(result.weights, golden().forward().weights));
  EXPECT_EQ(result.non_finite_tokens, 1);
  at = golden();
  at.splits[2] = kInf;  // as saturated as 0.5
  EXPECT_TRUE(same_bits(at.forward().weights, golden().forward().weights));
}

TEST(Comet, NotANumber) {
  for (const bool in_split : {true, false}) {
    auto at = random_comet<double>(5, 6, 3);
    const auto clean = at.forward();
    const auto clean_grad = at.backward(normal_values<double>(30, 3), 0.2);
    (in_split ? at.splits[2 * 15 + 14] : at.leaves[2 * 18 + 17]) = kNaN;
    const auto result = at.forward();
    EXPECT_EQ(result.non_finite_tokens, 1);
    EXPECT_TRUE(std::isnan(result.entropy_sum));
    const auto grad = at.backward(normal_values<double>(30, 3), 0.2);
    for (size_t i = 0; i < 30; ++i) {
      if (i / 6 != 2) {
        EXPECT_EQ(result.weights[i], clean.weights[i]);
      } else {
        EXPECT_EQ(std::isnan(result.weights[i]), i % 6 < 3);
        if (i % 6 >= 3) {
          EXPECT_EQ(result.weights[i], 0);
        }
      }
    }
    for (size_t i = 0; i < grad.splits.size(); ++i) {
      EXPECT_TRUE(i / 15 == 2 ? std::isnan(grad.splits[i])
                              : grad.splits[i] == clean_grad.splits[i]);
    }
  }
}

TEST(Comet, Invalid) {
  auto at = random_comet<double>(5, 6, 2);
  at.valid = {1, 1, 0, 1, 0};
  for (size_t i = 2 * 10; i < 3 * 10; ++i) at.splits[i] = kNaN;
  for (size_t i = 4 * 12; i < 5 * 12; ++i) at.leaves[i] = kInf;
  const auto result = at.forward();
  EXPECT_EQ(result.non_finite_tokens, 0);
  EXPECT_TRUE(std::isfinite(result.entropy_sum));
  for (const int64_t t : {2, 4}) EXPECT_EQ(row_sum(result.weights, 6, t), 0);
  const auto grad = at.backward(normal_values<double>(30, 3), 0.2);
  for (size_t i = 2 * 10; i < 3 * 10; ++i) EXPECT_EQ(grad.splits[i], 0);
  for (size_t i = 4 * 12; i < 5 * 12; ++i) EXPECT_EQ(grad.leaves[i], 0);
}

TEST(Comet, Empty) {
  const auto result = random_comet<float>(0, 6, 2).forward();
  EXPECT_EQ(result.entropy_sum, 0);
  EXPECT_EQ(result.removed_weight, 0);
  EXPECT_EQ(result.reached_nodes, 0);
  EXPECT_EQ(result.saturated_nodes, 0);
  EXPECT_EQ(result.non_finite_tokens, 0);
  EXPECT_EQ(random_comet<float>(3, 1, 1).forward().weights, (std::vector<float>{1, 1, 1}));
}

TEST(Comet, Errors) {
  const auto with = [](auto change) {
    return config_error([&] {
      CometCase<float> at = random_comet<float>(2, 4, 2);
      CometInput input = at.input();
      change(at.shape, at.options, input);
      comet(at.shape, at.options, DType::kFloat32, input, {});
    });
  };
  EXPECT_EQ(with([](auto& s, auto&, auto&) { s.num_tokens = -1; }),
            "[comet] num_tokens=-1 is negative; choose 0 or more");
  EXPECT_EQ(with([](auto& s, auto&, auto&) { s.num_experts = 0; }),
            "[comet] num_experts=0 is below 1; a gate needs an expert");
  EXPECT_EQ(with([](auto& s, auto&, auto&) { s.num_trees = 5; }),
            "[comet] num_trees=5 is outside [1, num_experts=4]");
  for (const double gamma : {0.0, -1.0, kNaN, kInf, 1e-50}) {
    EXPECT_EQ(with([&](auto&, auto& o, auto&) { o.gamma = gamma; }),
              "[comet] gamma=" + to_text(gamma) + " is not a finite number above 0");
  }
  EXPECT_EQ(with([](auto&, auto& o, auto&) { o.min_weight = 1; }),
            "[comet] min_weight=1 is outside [0, 1)");
  EXPECT_EQ(with([](auto&, auto&, auto& i) { i.split_logits = nullptr; }),
            "[comet] split_logits=null but 12 elements are needed; pass a buffer");
  EXPECT_EQ(with([](auto&, auto&, auto& i) { i.leaf_logits = nullptr; }),
            "[comet] leaf_logits=null but 16 elements are needed; pass a buffer");
  const auto at = random_comet<float>(2, 4, 2);
  EXPECT_EQ(config_error([&] { comet(at.shape, at.options, DType::kBFloat16, at.input(), {}); }),
            "[comet] dtype=bf16 is not supported; choose fp32 or fp64");
}

}  // namespace
}  // namespace perseid::kernels::testing
