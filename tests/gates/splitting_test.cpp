// Splitting test of top-k mixtures (Nguyen, Akbarian, Yan, Ho 2024, arXiv 2309.13850). A mixture of
// 3 Gaussian experts of which a point x uses the best K = 2; then every expert is split into 2
// copies that share its mass: bias - log 2. The density with the best K of the copies is the same
// exactly for K = 2 * 2.
//   FourIsExact     total variation below 1e-14 at K = 4
//   OthersAreOff    K = 2, 3, 5, 6 within 15 % of the golden values (the draws of x differ)
// It exercises selection, equal scores of copies and the softmax over the selection.
#include <cmath>

#include "tests/gates/gate_test.h"

namespace perseid::testing {
namespace {

const std::vector<double> kSlope = {25, 0, -10}, kOffset = {-8, 0, 4};  // beta1, beta0
const std::vector<double> kRate = {-20, 20, 5}, kShift = {15, -5, 0};   // a, b: mean a x + b
const std::vector<double> kDeviation = {.3, .4, .5};                    // sigma
constexpr int64_t kDraws = 2000, kPoints = 400;
constexpr double kLow = -6, kHigh = 16;

/// Each entry `copies` times in a row: copies of expert j get the ids copies * j and following.
Tensor split(const std::vector<double>& values, int64_t copies) {
  return vector_of(values).repeat_interleave(copies);
}

/// p(y | x) = sum over experts of weight * N(y; a x + b, sigma). [draws, points]
Tensor density(const Tensor& x, const Tensor& y, int64_t copies, int64_t top_k) {
  const auto num_experts = static_cast<int64_t>(kSlope.size()) * copies;
  const auto gate = float64_gate(TopKGateOptions(1, num_experts)
                                     .top_k(top_k)
                                     .bias(true)
                                     .normalization(Normalization::kSelected),
                                 split(kSlope, copies).unsqueeze(1),
                                 split(kOffset, copies).sub(std::log(double(copies))));
  const Tensor weights =
      gates::dense_weights(gate->forward(input_of(x.unsqueeze(1))).routing, num_experts);
  const Tensor deviation = split(kDeviation, copies).unsqueeze(1);                    // [E, 1]
  const Tensor mean = split(kRate, copies) * x.unsqueeze(1) + split(kShift, copies);  // [draws, E]
  const Tensor distance = (y - mean.unsqueeze(2)) / deviation;  // [draws, E, points]
  const Tensor normal = distance.square().mul(-.5).exp() / (deviation * std::sqrt(2 * M_PI));
  return weights.unsqueeze(1).bmm(normal).squeeze(1);
}

/// Mean over x of 1/2 sum over y of |difference| dy, of the split mixture and the original.
double total_variation(int64_t top_k) {
  // Uniform in [0, 1], one draw in each of equal parts.
  const Tensor x = at::arange(kDraws, at::kDouble).add(random_tensor({kDraws}, 1, 0, 1)) / kDraws;
  const Tensor y = at::linspace(kLow, kHigh, kPoints, at::kDouble);
  const Tensor difference = density(x, y, 2, top_k) - density(x, y, 1, 2);
  const double step = (kHigh - kLow) / double(kPoints - 1);
  return difference.abs().sum(1).mean().item<double>() * step / 2;
}

TEST(Splitting, FourIsExact) { EXPECT_LT(total_variation(4), 1e-14); }

TEST(Splitting, OthersAreOff) {
  EXPECT_NEAR(total_variation(2), 5.7e-2, .15 * 5.7e-2);
  EXPECT_NEAR(total_variation(3), 2.5e-2, .15 * 2.5e-2);
  EXPECT_NEAR(total_variation(5), 1.1e-2, .15 * 1.1e-2);
  EXPECT_NEAR(total_variation(6), 2.0e-2, .15 * 2.0e-2);
}

}  // namespace
}  // namespace perseid::testing
