// Edges of the DSelect-k gate.
//   InvalidTokens     NaN tokens with valid = false change neither values nor gradients
//   NotANumber        such a token goes to experts 0 .. K-1, the others keep their bits
//   NoTokens          T = 0, none valid: zero losses, zero gradients
//   OneExpert         no bits, no parameters, weight 1, no loss
//   EveryExpert       K = E: the routing is legal, Sigma g = 1
//   SaturationWarning in training only, above 99 % saturated switches
//   Errors            every text
#include <c10/util/Exception.h>

#include <cmath>

#include "tests/gates/dselect_k_fixture.h"
#include "tests/warnings.h"

namespace perseid::testing {
namespace {

TEST(DSelectKEdges, InvalidTokens) {
  for (const bool with_norm : {false, true}) {
    const DSelectKGateOptions options = DSelectKGateOptions(6, 5).gamma(4).balance_coeff(.3);
    const Tensor valid = at::arange(37, at::kLong).remainder(3).ne(1);
    Tensor padded = random_tensor({37, 6}, 1);
    Tensor tokens = padded.index({valid}).clone().set_requires_grad(true);
    padded.index_put_({valid.logical_not()}, NAN);
    padded.set_requires_grad(true);
    const InputNorm norm = with_norm ? InputNorm::kLayerNorm : InputNorm::kNone;
    const auto plain = random_gate(options, 1, at::kDouble, norm);
    const auto masked = random_gate(options, 1, at::kDouble, norm);
    const auto run = [&](DSelectKGate& gate, const GateInput& input) {
      GateOutput output = gate.forward(input);
      const Tensor weights = output.routing.weights;
      ((weights * random_tensor({weights.size(0)}, 4)).sum() + output.losses[0].value +
       output.losses[1].value + global_loss(output))
          .backward();
      return output;
    };
    const GateOutput expected = run(*plain, input_of(tokens));
    const GateOutput output = run(*masked, input_of(padded, valid));
    EXPECT_TRUE(same_bits(output.routing.weights, expected.routing.weights));
    EXPECT_TRUE(same_bits(output.routing.expert_idx, expected.routing.expert_idx));
    for (const size_t i : {0, 1}) {
      EXPECT_TRUE(close_to(output.losses[i].value, expected.losses[i].value, 1e-15));
    }
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

TEST(DSelectKEdges, BFloat16) {
  const Tensor tokens = random_tensor({37, 6}, 1, -3, 3, at::kBFloat16);
  DSelectKGate gate(DSelectKGateOptions(6, 8));
  const GateOutput output = gate.forward(input_of(tokens));
  EXPECT_EQ(output.routing.weights.scalar_type(), at::kFloat);
  const Tensor rows = gates::dense_weights(output.routing, 8);
  EXPECT_TRUE(close_to(rows.sum(1), at::ones({37}), 1e-6));
  EXPECT_TRUE(close_to(rows.to(at::kBFloat16).to(at::kFloat).sum(1), at::ones({37}), 2e-3));
}

TEST(DSelectKEdges, NotANumber) {
  const auto gate = random_gate(DSelectKGateOptions(6, 5).top_k(3).gamma(4));
  Tensor tokens = random_tensor({7, 6}, 1);
  const Tensor clean = dense(gate->forward(input_of(tokens)), 5);
  tokens[2][4] = NAN;
  const GateOutput output = gate->forward(input_of(tokens));
  EXPECT_NO_THROW(gates::validate(output.routing, 5, "test"));
  EXPECT_EQ(output.stats.non_finite_tokens, 1);
  for (const auto& loss : output.losses) EXPECT_TRUE(std::isnan(loss.value.item<double>()));
  const Tensor weights = dense(output, 5);
  EXPECT_TRUE(same_bits(weights[2].isnan(), at::tensor({1, 1, 1, 0, 0}).to(at::kBool)));
  for (const int64_t t : {0, 1, 3, 6}) EXPECT_TRUE(same_bits(weights[t], clean[t])) << t;
}

TEST(DSelectKEdges, NoTokens) {
  for (const bool per_token : {true, false}) {
    for (const int64_t T : {0, 3}) {
      const auto gate = std::make_shared<DSelectKGate>(
          DSelectKGateOptions(6, 5).balance_coeff(.1).per_token(per_token));
      const GateOutput output =
          gate->forward(input_of(at::zeros({T, 6}), at::zeros({T}, at::kBool)));
      EXPECT_EQ(output.stats.num_assignments, 0);
      EXPECT_EQ(output.stats.num_nodes, 0);
      ASSERT_EQ(output.losses.size(), 2u);
      Tensor loss = global_loss(output) + output.routing.weights.sum();
      for (const auto& part : output.losses) {
        EXPECT_EQ(part.value.item<float>(), 0);
        EXPECT_EQ(part.raw.item<float>(), 0);
        loss = loss + part.value;
      }
      EXPECT_EQ(loss.item<float>(), 0);
      loss.backward();
      for (const Tensor& parameter : gate->parameters()) {
        EXPECT_TRUE(same_bits(parameter.grad(), at::zeros_like(parameter)));
      }
    }
  }
}

TEST(DSelectKEdges, OneExpert) {
  for (const bool per_token : {true, false}) {
    DSelectKGate gate(DSelectKGateOptions(6, 1).top_k(1).balance_coeff(.1).per_token(per_token));
    EXPECT_TRUE(gate.parameters().empty());
    const Tensor tokens = random_tensor({3, 6}, 1, -1, 1, at::kFloat).set_requires_grad(true);
    const GateOutput output =
        gate.forward(input_of(tokens, at::tensor({1, 0, 1}, at::kInt).to(at::kBool)));
    EXPECT_TRUE(same_bits(dense(output, 1).reshape({-1}), at::tensor({1.f, 0.f, 1.f})));
    ASSERT_EQ(output.losses.size(), 1u);  // the entropy; every code has an expert
    EXPECT_EQ(output.losses[0].value.item<float>(), 0);
    EXPECT_EQ(global_loss(output).item<float>(), 0);
    EXPECT_FALSE(output.routing.weights.requires_grad());
    EXPECT_EQ(output.stats.num_nodes, 0);
  }
}

TEST(DSelectKEdges, EveryExpert) {
  for (const int64_t E : {2, 8}) {
    const auto gate = random_gate(DSelectKGateOptions(6, E).top_k(E));
    const GateOutput output = gate->forward(input_of(random_tensor({7, 6}, 1)));
    EXPECT_NO_THROW(gates::validate(output.routing, E, "test"));
    EXPECT_TRUE(close_to(dense(output, E).sum(1), at::ones({7}, at::kDouble), 1e-14));
  }
}

TEST(DSelectKEdges, SaturationWarning) {
  const Warnings warnings;
  GateInput input = input_of(random_tensor({37, 6}, 1));
  random_gate(DSelectKGateOptions(6, 8).gamma(1e-5))->forward(input);
  EXPECT_TRUE(warnings.texts.empty());
  input.training = true;
  random_gate(DSelectKGateOptions(6, 8).gamma(1))->forward(input);
  EXPECT_TRUE(warnings.texts.empty());
  random_gate(DSelectKGateOptions(6, 8).gamma(1e-5))->forward(input);
  ASSERT_EQ(warnings.texts.size(), 1u);
  EXPECT_NE(warnings.texts[0].find("[dselect_k_gate] saturated_nodes=222 of 222: "),
            std::string::npos)
      << warnings.texts[0];
}

TEST(DSelectKEdges, Errors) {
  const auto with = [](const std::function<void(DSelectKGateOptions&)>& change) {
    return error_text<ConfigError>([&] {
      DSelectKGateOptions options(4, 8);
      change(options);
      DSelectKGate gate(options);
    });
  };
  const std::string who = "[dselect_k_gate] ";
  EXPECT_EQ(with([](auto& o) { o.top_k(9); }),
            who + "top_k=9 exceeds num_experts=8; choose top_k in [1, 8]");
  EXPECT_EQ(with([](auto& o) { o.top_k(0); }), who + "top_k=0 is below 1; choose top_k in [1, 8]");
  EXPECT_EQ(with([](auto& o) { o.num_experts(0); }),
            who + "num_experts=0 is below 1; a gate needs an expert");
  EXPECT_EQ(with([](auto& o) { o.d_model(0); }),
            who + "d_model=0 is below 1; give the width of the tokens");
  for (const double gamma : {0., -1., double(NAN), double(INFINITY), 1e-60}) {
    EXPECT_EQ(with([&](auto& o) { o.gamma(gamma); }),
              who + "gamma=" + to_text(gamma) +
                  " is not a finite number above 0; choose the width of the switches, 1 by "
                  "default");
  }
  for (const double coeff : {-1., double(NAN), double(INFINITY)}) {
    const std::string text =
        "=" + to_text(coeff) + " is not a finite number from 0 on; choose 0 to switch the loss off";
    EXPECT_EQ(with([&](auto& o) { o.entropy_coeff(coeff); }), who + "entropy_coeff" + text);
    EXPECT_EQ(with([&](auto& o) { o.balance_coeff(coeff); }), who + "balance_coeff" + text);
    EXPECT_EQ(with([&](auto& o) { o.penalty_coeff(coeff); }), who + "penalty_coeff" + text);
  }
  EXPECT_EQ(with([](auto& o) { o.entropy_schedule({1.5}); }),
            who +
                "schedule.ramp_until=1.5 is outside [0, 1]; it is a share of the training, 0 for a "
                "constant coefficient");
  for (const double min_weight : {-.1, .125, double(NAN)}) {
    EXPECT_EQ(with([&](auto& o) { o.min_weight(min_weight); }),
              who + "min_weight=" + to_text(min_weight) +
                  " is outside [0, 1/num_experts=0.125), the weight of an expert at equal shares; "
                  "choose 0 for exact weights");
  }
  DSelectKGate gate(DSelectKGateOptions(4, 8));
  EXPECT_EQ(error_text<ConfigError>([&] {
              gate.forward(input_of(at::zeros({3, 5})));
            }),
            who + "tokens=Float[3, 5] has another width than d_model=4");
  EXPECT_EQ(error_text<ConfigError>([&] {
              gate.forward(input_of(at::empty({3, 4}, at::TensorOptions().device(at::kMeta))));
            }),
            who + "tokens.device=meta differs from code_bias.device=cpu");
  GateInput input = input_of(at::zeros({3, 4}));
  input.progress = NAN;
  EXPECT_EQ(
      error_text<ConfigError>([&] { gate.forward(input); }),
      who + "progress=nan is not a number; give the finished share of the training, in [0, 1]");
}

}  // namespace
}  // namespace perseid::testing
