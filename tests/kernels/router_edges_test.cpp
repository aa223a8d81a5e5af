// route on values that are no numbers, in closed form (specification of the gates, section 16).
// Each case runs on the reference and on the parallel version.
#include "tests/kernels/router_fixture.h"

namespace perseid::kernels::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
const double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr auto kSoftmax = ScoreFunction::kSoftmax;
constexpr auto kSigmoid = ScoreFunction::kSigmoid;

struct Edge {
  std::vector<double> logits;
  int64_t top_k;
  ScoreFunction score_function;
  bool normalize;
  std::vector<int32_t> expert_idx;
  std::vector<double> weights;
  int64_t non_finite;
};

template <typename T>
void expect_edge(const Edge& edge, bool is_reference) {
  const auto at = one_token<T>(std::vector<T>(edge.logits.begin(), edge.logits.end()), edge.top_k,
                               edge.score_function, edge.normalize);
  const Routed<T> routed = at.route(is_reference);
  EXPECT_EQ(routed.expert_idx, edge.expert_idx) << at.name();
  EXPECT_EQ(routed.non_finite_tokens[0], edge.non_finite) << at.name();
  expect_close(routed.weights, std::vector<T>(edge.weights.begin(), edge.weights.end()), 1e-6,
               at.name());
}

void expect_edges(const std::vector<Edge>& edges) {
  for (const Edge& edge : edges) {
    for (const bool is_reference : {false, true}) {
      expect_edge<float>(edge, is_reference);
      expect_edge<double>(edge, is_reference);
    }
  }
}

const double kS = 1 / (1 + std::exp(-1.0));  // sigmoid(1) = softmax(1, 0)[0]

TEST(RouterEdges, NaNLosesAndStaysVisible) {
  expect_edges({
      // After the selection: only a selected NaN shows.
      {{kNaN, 1, kNaN, 2}, 2, kSoftmax, true, {3, 1}, {kS, 1 - kS}, 1},
      {{kNaN, 1, kNaN}, 2, kSoftmax, true, {1, 0}, {kNaN, kNaN}, 1},
      // Before the selection: the sum over all experts is NaN.
      {{kNaN, 1, kNaN, 2}, 2, kSoftmax, false, {3, 1}, {kNaN, kNaN}, 1},
      // Sigmoid scores without normalisation have nothing in common.
      {{kNaN, 1, kNaN}, 2, kSigmoid, false, {1, 0}, {kS, kNaN}, 1},
      {{kNaN, 1, kNaN}, 2, kSigmoid, true, {1, 0}, {kNaN, kNaN}, 1},
      {{kNaN, 1, 1}, 2, kSigmoid, true, {1, 2}, {0.5, 0.5}, 1},
      {{kNaN, kNaN, kNaN}, 2, kSoftmax, true, {0, 1}, {kNaN, kNaN}, 1},
      // NaN counts as -inf: the smaller id of the two goes first.
      {{-kInf, kNaN, 1}, 2, kSoftmax, true, {2, 0}, {1, 0}, 1},
      {{kNaN, -kInf, 1}, 2, kSoftmax, true, {2, 0}, {kNaN, kNaN}, 1},
  });
}

TEST(RouterEdges, Infinities) {
  expect_edges({
      {{0, 1, kInf, 2}, 2, kSoftmax, true, {2, 3}, {1, 0}, 1},
      {{0, 1, kInf, 2}, 2, kSoftmax, false, {2, 3}, {1, 0}, 1},
      {{kInf, 1, kInf, 2}, 3, kSoftmax, true, {0, 2, 3}, {0.5, 0.5, 0}, 1},
      {{kInf, 1, kInf, kInf}, 2, kSoftmax, true, {0, 2}, {0.5, 0.5}, 1},
      {{kInf, 1, kInf, kInf}, 2, kSoftmax, false, {0, 2}, {1. / 3, 1. / 3}, 1},
      {{-kInf, -kInf, -kInf}, 2, kSoftmax, true, {0, 1}, {0.5, 0.5}, 1},
      {{-kInf, -kInf, -kInf}, 2, kSoftmax, false, {0, 1}, {0.5, 0.5}, 1},
      // Sigmoid scores are finite at the infinities, so their formula holds as it is.
      {{kInf, 1}, 2, kSigmoid, true, {0, 1}, {1 / (1 + kS), kS / (1 + kS)}, 1},
      {{-kInf, -kInf}, 1, kSigmoid, true, {0}, {0}, 1},
      // -inf as a mask.
      {{-kInf, 1, -kInf, 0}, 2, kSoftmax, true, {1, 3}, {kS, 1 - kS}, 1},
      {{-kInf, 1, -kInf, 0}, 2, kSoftmax, false, {1, 3}, {kS, 1 - kS}, 1},
      {{-kInf, 1, -kInf}, 2, kSoftmax, true, {1, 0}, {1, 0}, 1},
  });
}

TEST(RouterEdges, EqualScores) {
  expect_edges({
      {{3, 3, 3, 3}, 3, kSoftmax, true, {0, 1, 2}, {1. / 3, 1. / 3, 1. / 3}, 0},
      {{-0.0, 0.0, -0.0}, 2, kSoftmax, true, {0, 1}, {0.5, 0.5}, 0},
      {{0.0, -0.0, 0.0}, 3, kSigmoid, true, {0, 1, 2}, {1. / 3, 1. / 3, 1. / 3}, 0},
      {{1, 2, 1, 2}, 3, kSoftmax, false, {1, 3, 0}, {kS / 2, kS / 2, (1 - kS) / 2}, 0},
  });
}

TEST(RouterEdges, OneExpertAndAllExperts) {
  expect_edges({
      {{7}, 1, kSoftmax, true, {0}, {1}, 0},
      {{7}, 1, kSoftmax, false, {0}, {1}, 0},
      {{0}, 1, kSigmoid, true, {0}, {1}, 0},
      {{0}, 1, kSigmoid, false, {0}, {0.5}, 0},
      {{0, 1}, 2, kSoftmax, true, {1, 0}, {kS, 1 - kS}, 0},
  });
}

TEST(RouterEdges, DistinctLogitsWithEqualScores) {
  // sigmoid(30) and sigmoid(40) are both 1 in float32; the logits still decide.
  expect_edges({{{30, 40, 20}, 2, kSigmoid, true, {1, 0}, {0.5, 0.5}, 0},
                {{-200, 0, -300}, 3, kSoftmax, false, {1, 0, 2}, {1, 0, 0}, 0}});
}

TEST(RouterEdges, VeryNegativeLogitsKeepTheirShares) {
  // sigmoid underflows to 0 here; softmax(log sigmoid) does not.
  for (const bool is_reference : {false, true}) {
    const auto at = one_token<float>({-200, -201, -250}, 1, kSigmoid);
    const Routed<float> routed = at.route(is_reference);
    EXPECT_NEAR(routed.score_sum[0], kS, 1e-6);
    EXPECT_NEAR(routed.score_sum[1], 1 - kS, 1e-6);
    EXPECT_NEAR(routed.lse_square_sum[0], std::pow(-200 + std::log1p(std::exp(-1.0)), 2), 0.01);
  }
}

TEST(RouterEdges, BiasDoesNotLiftAMaskedExpert) {
  for (const auto score : {kSoftmax, kSigmoid}) {
    for (const bool is_reference : {false, true}) {
      auto at = one_token<float>({-INFINITY, 1, 0, NAN}, 2, score);
      at.bias = {5, -2, -1, 9};
      EXPECT_EQ(at.route(is_reference).expert_idx, (std::vector<int32_t>{1, 2}));
    }
  }
}

TEST(RouterEdges, OneBrokenTokenTouchesItselfOnly) {
  for (const double bad : {kNaN, kInf, -kInf}) {
    RouterCase<float> at;
    at.shape = {5, 8, 3};
    at.logits = normal_values<float>(40, 6);
    const Routed<float> clean = at.route();
    at.logits[2 * 8 + 4] = static_cast<float>(bad);
    const Routed<float> broken = at.route();
    EXPECT_EQ(broken.non_finite_tokens[0], 1);
    for (int64_t i = 0; i < 15; ++i) {
      if (i / 3 == 2) continue;
      EXPECT_EQ(broken.expert_idx[i], clean.expert_idx[i]);
      EXPECT_EQ(broken.weights[i], clean.weights[i]);
    }
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
