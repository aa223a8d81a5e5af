// Edges of the COMET gate.
//   InvalidTokens     NaN tokens with valid = false change neither values nor gradients
//   NotANumber        such a token goes to experts 0 .. K-1, the others keep their bits
//   NoTokens          T = 0, none valid: zero losses, zero gradients
//   OneExpert         no parameters, weight 1
//   SaturationWarning in training only, above 99 % saturated nodes
#include <c10/util/Exception.h>

#include <cmath>

#include "tests/gates/comet_fixture.h"
#include "tests/warnings.h"

namespace perseid::testing {
namespace {

TEST(CometEdges, InvalidTokens) {
  for (const bool with_norm : {false, true}) {
    CometGateOptions options = CometGateOptions(6, 5).balance_coeff(.3);
    const Tensor valid = at::arange(37, at::kLong).remainder(3).ne(1);
    Tensor padded = random_tensor({37, 6}, 1);
    Tensor tokens = padded.index({valid}).clone().set_requires_grad(true);
    padded.index_put_({valid.logical_not()}, NAN);
    padded.set_requires_grad(true);
    const InputNorm norm = with_norm ? InputNorm::kLayerNorm : InputNorm::kNone;
    const auto plain = random_gate(options, 1, at::kDouble, norm);
    const auto masked = random_gate(options, 1, at::kDouble, norm);
    const auto run = [&](CometGate& gate, const GateInput& input) {
      GateOutput output = gate.forward(input);
      const Tensor weights = output.routing.weights;
      ((weights * random_tensor({weights.size(0)}, 4)).sum() + output.losses[0].value +
       global_loss(output))
          .backward();
      return output;
    };
    const GateOutput expected = run(*plain, input_of(tokens));
    const GateOutput output = run(*masked, input_of(padded, valid));
    EXPECT_TRUE(same_bits(output.routing.weights, expected.routing.weights));
    EXPECT_TRUE(same_bits(output.routing.expert_idx, expected.routing.expert_idx));
    EXPECT_TRUE(close_to(output.losses[0].value, expected.losses[0].value, 1e-15));
    EXPECT_TRUE(close_to(global_loss(output), global_loss(expected), 1e-14));
    EXPECT_EQ(output.stats.non_finite_tokens, 0);
    EXPECT_EQ(output.stats.num_nodes, expected.stats.num_nodes);
    EXPECT_EQ(output.stats.tokens_without_expert, 0);
    for (size_t p = 0; p < 4; ++p) {
      EXPECT_TRUE(close_to(masked->parameters()[p].grad(), plain->parameters()[p].grad(), 1e-13));
    }
    EXPECT_TRUE(close_to(padded.grad().index({valid}), tokens.grad(), 1e-14));
    EXPECT_TRUE(same_bits(padded.grad().index({valid.logical_not()}),
                          at::zeros({37 - tokens.size(0), 6}, at::kDouble)));
  }
}

TEST(CometEdges, BFloat16) {
  const Tensor tokens = random_tensor({37, 6}, 1, -3, 3, at::kBFloat16);
  CometGate gate(CometGateOptions(6, 8));
  const GateOutput output = gate.forward(input_of(tokens));
  EXPECT_EQ(output.routing.weights.scalar_type(), at::kFloat);
  const Tensor rows = gates::dense_weights(output.routing, 8);
  EXPECT_TRUE(close_to(rows.sum(1), at::ones({37}), 1e-6));
  EXPECT_TRUE(close_to(rows.to(at::kBFloat16).to(at::kFloat).sum(1), at::ones({37}), 2e-3));
}

TEST(CometEdges, NotANumber) {
  const auto gate = random_gate(CometGateOptions(6, 5).top_k(3));
  Tensor tokens = random_tensor({7, 6}, 1);
  const Tensor clean = dense(gate->forward(input_of(tokens)), 5);
  tokens[2][4] = NAN;
  const GateOutput output = gate->forward(input_of(tokens));
  EXPECT_NO_THROW(gates::validate(output.routing, 5, "test"));
  EXPECT_EQ(output.stats.non_finite_tokens, 1);
  EXPECT_TRUE(std::isnan(output.losses[0].value.item<double>()));
  const Tensor weights = dense(output, 5);
  EXPECT_TRUE(same_bits(weights[2].isnan(), at::tensor({1, 1, 1, 0, 0}).to(at::kBool)));
  for (const int64_t t : {0, 1, 3, 6}) EXPECT_TRUE(same_bits(weights[t], clean[t])) << t;
}

TEST(CometEdges, NoTokens) {
  for (const bool per_token : {true, false}) {
    for (const int64_t T : {0, 3}) {
      const auto gate = std::make_shared<CometGate>(
          CometGateOptions(6, 5).balance_coeff(.1).per_token(per_token));
      const GateOutput output =
          gate->forward(input_of(at::zeros({T, 6}), at::zeros({T}, at::kBool)));
      EXPECT_EQ(output.stats.num_assignments, 0);
      EXPECT_EQ(output.stats.num_nodes, 0);
      EXPECT_EQ(output.losses[0].value.item<float>(), 0);
      EXPECT_EQ(output.losses[0].raw.item<float>(), 0);
      const Tensor loss = output.losses[0].value + global_loss(output);
      EXPECT_EQ(loss.item<float>(), 0);
      (loss + output.routing.weights.sum()).backward();
      for (const Tensor& parameter : gate->parameters()) {
        EXPECT_TRUE(same_bits(parameter.grad(), at::zeros_like(parameter)));
      }
    }
  }
}

TEST(CometEdges, OneExpert) {
  for (const bool per_token : {true, false}) {
    CometGate gate(CometGateOptions(6, 1).top_k(1).balance_coeff(.1).per_token(per_token));
    EXPECT_TRUE(gate.parameters().empty());
    const Tensor tokens = random_tensor({3, 6}, 1, -1, 1, at::kFloat).set_requires_grad(true);
    const GateOutput output =
        gate.forward(input_of(tokens, at::tensor({1, 0, 1}, at::kInt).to(at::kBool)));
    EXPECT_TRUE(same_bits(dense(output, 1).reshape({-1}), at::tensor({1.f, 0.f, 1.f})));
    EXPECT_EQ(output.losses[0].value.item<float>(), 0);
    EXPECT_EQ(global_loss(output).item<float>(), 0);
    EXPECT_FALSE(output.routing.weights.requires_grad());
    EXPECT_EQ(output.stats.num_nodes, 0);
  }
}

TEST(CometEdges, SaturationWarning) {
  const Warnings warnings;
  GateInput input = input_of(random_tensor({37, 6}, 1));
  random_gate(CometGateOptions(6, 8).gamma(1e-5))->forward(input);
  EXPECT_TRUE(warnings.texts.empty());
  input.training = true;
  random_gate(CometGateOptions(6, 8).gamma(1))->forward(input);
  EXPECT_TRUE(warnings.texts.empty());
  random_gate(CometGateOptions(6, 8).gamma(1e-5))->forward(input);
  ASSERT_EQ(warnings.texts.size(), 1u);
  EXPECT_NE(warnings.texts[0].find("[comet_gate] saturated_nodes=222 of 222: "), std::string::npos)
      << warnings.texts[0];
}

}  // namespace
}  // namespace perseid::testing
