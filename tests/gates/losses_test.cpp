// Losses of routers.
//   Balanced        equal counts and scores: exactly the coefficient (times K unnormalised)
//   Collapsed       all tokens and all score on one expert: coefficient * E
//   Monotone        the more tokens and score move to one expert, the larger the loss
//   GradientFormula dL/dz_tj = (c E / T) p_tj (f_j - sum_i f_i p_ti)
//   ZLoss           zero logits: ln(E)^2; gradient 2 c / T lse softmax(z)
//   OtherTensors    strided, narrow and double ones give the same
//   SecondDerivative  through the gradient of the loss
//   NoTokens        0 and a zero gradient, not NaN
#include "gates/losses.h"

#include <cmath>

#include "tests/gates/gate_test.h"
#include "tests/gradcheck.h"

namespace perseid::testing {
namespace {

gates::BalanceTerms terms_of(const Tensor& score_sum, const Tensor& counts, double coeff,
                             int64_t top_k, bool normalize_by_k = true) {
  return {score_sum, counts, coeff, top_k, normalize_by_k};
}

TEST(LoadBalanceLoss, Balanced) {
  const int64_t T = 840;
  for (const auto type : {at::kFloat, at::kDouble}) {
    for (const int64_t E : {1, 2, 3, 5, 7, 8, 60}) {
      for (const int64_t K : {1, 2, 7}) {
        if (K > E) continue;
        const double coeff = 0.013;
        const Tensor counts = at::full({E}, T * K / E, at::kLong);
        const Tensor score_sum = at::full({E}, double(T) / double(E), type);
        const auto loss =
            gates::load_balance_loss(terms_of(score_sum, counts, coeff, K), counts, T);
        const Tensor expected = at::full({}, coeff, type);
        if (T % E == 0) {
          EXPECT_TRUE(close_to(loss.value, expected, type == at::kDouble ? 1e-15 : 0)) << E << K;
        }
        EXPECT_TRUE(close_to(loss.raw, at::ones({}, type), type == at::kDouble ? 1e-15 : 1e-7));
        const auto unnormalised =
            gates::load_balance_loss(terms_of(score_sum, counts, coeff, K, false), counts, T);
        EXPECT_TRUE(close_to(unnormalised.value, expected * K, 2e-7));
        EXPECT_EQ(loss.name, "aux_loss");
        EXPECT_EQ(loss.value.scalar_type(), type);
      }
    }
  }
}

TEST(LoadBalanceLoss, Collapsed) {
  const int64_t T = 37;
  for (const int64_t E : {1, 2, 5, 8}) {
    Tensor counts = at::zeros({E}, at::kLong);
    counts[E / 2] = T;
    const auto loss =
        gates::load_balance_loss(terms_of(counts.to(at::kDouble), counts, .25, 1), counts, T);
    EXPECT_NEAR(loss.value.item<double>(), .25 * double(E), 1e-14);
    EXPECT_NEAR(loss.raw.item<double>(), double(E), 1e-14);
  }
}

TEST(LoadBalanceLoss, Monotone) {
  const int64_t E = 4, T = 40;
  double previous = 0;
  for (int64_t moved = 0; moved <= 10; ++moved) {
    Tensor counts = at::full({E}, 10 - moved, at::kLong);
    counts[1] = 10 + 3 * moved;
    const auto loss =
        gates::load_balance_loss(terms_of(counts.to(at::kDouble), counts, 1, 1), counts, T);
    EXPECT_GT(loss.value.item<double>(), previous) << moved;
    previous = loss.value.item<double>();
  }
}

TEST(LoadBalanceLoss, GradientFormula) {
  const int64_t T = 37, E = 5, K = 2;
  const double coeff = .3;
  const Tensor logits = random_tensor({T, E}, 1, -2, 2).set_requires_grad(true);
  const Tensor p = logits.softmax(1);
  const Tensor counts = at::tensor({10, 4, 37, 20, 3}, at::kLong);
  const auto loss = gates::load_balance_loss(terms_of(p.sum(0), counts, coeff, K), counts, T);
  loss.value.backward();
  const Tensor q = p.detach();
  const Tensor f = counts.to(at::kDouble) / double(K * T);
  const Tensor expected = coeff * E / double(T) * q * (f - (q * f).sum(1, true));
  EXPECT_TRUE(close_to(logits.grad(), expected, 1e-13));
  EXPECT_FALSE(loss.raw.requires_grad());
  EXPECT_NEAR(loss.raw.item<double>() * coeff, loss.value.item<double>(), 1e-14);
}

TEST(LoadBalanceLoss, OtherTensors) {
  // Strided counts, sums that are strided or narrow, and counts in double, which stay as they are.
  const int64_t T = 37, E = 5;
  const Tensor counts = at::tensor({10, 4, 37, 20, 3}, at::kLong);
  const Tensor sums = random_tensor({E}, 1, 0, 1);
  const auto value = [&](const Tensor& score_sum, const Tensor& of_tokens) {
    return gates::load_balance_loss(terms_of(score_sum, of_tokens, .3, 2), of_tokens, T).value;
  };
  const Tensor expected = value(sums, counts);
  const Tensor strided_counts = at::stack({counts, counts + 9}, 1).select(1, 0);
  const Tensor strided_sums = at::stack({sums, sums + 9}, 1).select(1, 0);
  const Tensor wide = counts.to(at::kDouble);
  EXPECT_TRUE(close_to(value(sums, strided_counts), expected, 1e-15));
  EXPECT_TRUE(close_to(value(strided_sums, counts), expected, 1e-15));
  EXPECT_TRUE(close_to(value(sums, wide), expected, 1e-15));
  EXPECT_TRUE(same_bits(wide, counts.to(at::kDouble)));
  const Tensor narrow = sums.to(at::kBFloat16);
  EXPECT_TRUE(
      close_to(value(narrow, counts), value(narrow.to(at::kDouble), counts).to(at::kBFloat16), 0));
}

TEST(LoadBalanceLoss, SecondDerivative) {
  // The loss is linear: its gradient, times a factor with a gradient, passes that on.
  const Tensor counts = at::tensor({10, 4, 37, 20, 3}, at::kLong);
  const Tensor sums = random_tensor({5}, 1, 0, 1).set_requires_grad(true);
  const Tensor factor = at::full({}, 2.0, at::kDouble).set_requires_grad(true);
  const Tensor loss = gates::load_balance_loss(terms_of(sums, counts, .3, 2), counts, 37).value;
  const Tensor slope = torch::autograd::grad({loss}, {sums}, {}, true)[0];
  const Tensor with_graph = torch::autograd::grad({loss * factor}, {sums}, {}, true, true)[0];
  EXPECT_TRUE(close_to(with_graph.detach(), slope * 2, 1e-15));
  const Tensor of_factor = torch::autograd::grad({with_graph.sum()}, {factor})[0];
  EXPECT_TRUE(close_to(of_factor, slope.sum(), 1e-15));
}

TEST(LoadBalanceLoss, NoTokens) {
  const Tensor score_sum = at::zeros({5}, at::kFloat).set_requires_grad(true);
  const Tensor counts = at::zeros({5}, at::kLong);
  const auto loss = gates::load_balance_loss(terms_of(score_sum, counts, 1, 2), counts, 0);
  loss.value.backward();
  EXPECT_EQ(loss.value.item<float>(), 0);
  EXPECT_TRUE(same_bits(score_sum.grad(), at::zeros({5})));
}

TEST(LoadBalanceLoss, RanksAdd) {
  const Tensor counts = at::tensor({10, 4, 37, 20, 3}, at::kLong);
  const Tensor a = random_tensor({5}, 1, 0, 1), b = random_tensor({5}, 2, 0, 1);
  const auto value = [&](const Tensor& score_sum) {
    return gates::load_balance_loss(terms_of(score_sum, counts, .3, 2), counts, 37).value;
  };
  EXPECT_TRUE(close_to(value(a) + value(b), value(a + b), 1e-15));
}

TEST(ZLoss, ZeroLogits) {
  for (const int64_t E : {1, 2, 8}) {
    const TopKGateOptions options = TopKGateOptions(3, E).top_k(1).z_loss_coeff(.5);
    const auto gate = float64_gate(options, at::zeros({E, 3}));
    const GateOutput output = gate->forward(input_of(random_tensor({37, 3}, 1)));
    const double expected = std::pow(std::log(double(E)), 2);
    EXPECT_NEAR(output.losses[0].raw.item<double>(), expected, 1e-14);
    EXPECT_NEAR(output.losses[0].value.item<double>(), .5 * expected, 1e-14);
    EXPECT_EQ(output.losses[0].name, "z_loss");
  }
}

TEST(ZLoss, Gradient) {
  const Tensor logits = random_tensor({37, 5}, 1, -2, 2);
  const Tensor eye = at::eye(5, at::kDouble);
  const auto gate = float64_gate(TopKGateOptions(5, 5).aux_loss_coeff(0).z_loss_coeff(.3), eye);
  logits.set_requires_grad(true);
  gate->forward(input_of(logits)).losses[0].value.backward();
  const Tensor z = logits.detach();
  EXPECT_TRUE(close_to(logits.grad(), 2 * .3 / 37 * z.logsumexp(1, true) * z.softmax(1), 1e-13));
}

TEST(ZLoss, NoTokens) {
  const Tensor sum = at::zeros({}, at::kFloat).set_requires_grad(true);
  const auto loss = gates::z_loss(sum, 1, 0);
  loss.value.backward();
  EXPECT_EQ(loss.value.item<float>(), 0);
  EXPECT_EQ(loss.raw.item<float>(), 0);
  EXPECT_EQ(sum.grad().item<float>(), 0);
}

TEST(CvSquared, ConstantIsZero) {
  const Tensor sum = at::full({5}, 7.5, at::kDouble).set_requires_grad(true);
  const Tensor value = gates::cv_squared_loss("load_loss", sum, .1).loss(sum, 37);
  value.backward();
  EXPECT_EQ(value.item<double>(), 0);
  EXPECT_TRUE(same_bits(sum.grad(), at::zeros({5}, at::kDouble)));
}

TEST(CvSquared, ValueAndGradient) {
  const Tensor v = at::tensor({1., 2., 4., 9.}, at::kDouble).set_requires_grad(true);
  const Tensor value = gates::cv_squared_loss("load_loss", v, .1).loss(v, 37);
  value.backward();
  const double mean = 4, variance = 38. / 4;  // of 9, 4, 0, 25
  EXPECT_NEAR(value.item<double>(), variance / (mean * mean), 1e-10);
  const Tensor expected = 2 / (4 * mean * mean) * ((v.detach() - mean) - variance / mean);
  EXPECT_TRUE(close_to(v.grad(), expected, 1e-10));
}

TEST(Losses, TokensGlobalDividesBoth) {
  const auto gate = float64_gate(TopKGateOptions(6, 8).z_loss_coeff(.1));
  GateInput input = input_of(random_tensor({37, 6}, 1));
  const GateOutput local = gate->forward(input);
  input.tokens_global = 74;
  const GateOutput global = gate->forward(input);
  EXPECT_TRUE(close_to(global.losses[0].value * 2, local.losses[0].value, 1e-15));
  EXPECT_TRUE(close_to(aux_loss(global, 74).value * 4, aux_loss(local).value, 1e-15));
}

}  // namespace
}  // namespace perseid::testing
