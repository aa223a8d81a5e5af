// Gradients of the top-k gate.
//   CentralDifferences   tokens, weight and bias through weights, aux loss and z-loss: 1e-7
//   EqualsReference      the same against ordinary differentiable operations, float64 and float32
//   OneExpert            K = 1: softmax over all has a gradient, over the selection it has none
//   IdleExpert           an expert that is never chosen: gradient exactly 0, not undefined
//   AuxLossScales        d(loss + c aux) = d(loss) + c d(aux)
//   LayerNorm            through the norm of the input
//   NotTwice             a second derivative is refused, not wrong
#include "tests/gates/gate_test.h"
#include "tests/gradcheck.h"

namespace perseid::testing {
namespace {

using Losses = std::vector<Tensor>;

Losses outputs_of(TopKGate& gate, const Tensor& tokens) {
  const GateOutput output = gate.forward(input_of(tokens));
  Losses losses = {output.routing.weights};
  if (output.balance.score_sum.defined()) losses.push_back(aux_loss(output).value);
  for (const auto& loss : output.losses) losses.push_back(loss.value);
  return losses;
}

TEST(TopKGradient, CentralDifferences) {
  const int64_t D = 3;
  for (const int64_t E : {1, 5, 8}) {
    for (int64_t K = 1; K <= E; ++K) {
      for (const int64_t T : {0, 1, 37}) {
        for (const auto score : kScoreFunctions) {
          for (const auto normalization : {Normalization::kSelected, Normalization::kAll}) {
            TopKGateOptions options = TopKGateOptions(D, E).top_k(K).bias(true).route_scale(1.5);
            options.score_function(score).normalization(normalization);
            options.aux_loss_coeff(.7).z_loss_coeff(.3);
            const auto gate =
                float64_gate(options, random_tensor({E, D}, 2), random_tensor({E}, 3));
            const Tensor tokens = random_tensor({T, D}, 1, -2, 2);
            EXPECT_TRUE(gradients_match([&] { return outputs_of(*gate, tokens); },
                                        {tokens, gate->weight, gate->bias}))
                << "E " << E << " K " << K << " T " << T << " score " << int(score)
                << " normalization " << int(normalization);
          }
        }
      }
    }
  }
}

// Each output alone, so that a missing term of one loss is not hidden by another's size.
TEST(TopKGradient, EachLossAlone) {
  const Tensor tokens = random_tensor({37, 3}, 1, -2, 2);
  for (const auto score : kScoreFunctions) {
    for (const bool aux : {false, true}) {
      TopKGateOptions options = TopKGateOptions(3, 5).top_k(2).bias(true).score_function(score);
      options.aux_loss_coeff(aux ? .7 : 0).z_loss_coeff(aux ? 0 : .3);
      const auto gate = float64_gate(options, random_tensor({5, 3}, 2), random_tensor({5}, 3));
      EXPECT_TRUE(gradients_match([&] { return Losses{outputs_of(*gate, tokens)[1]}; },
                                  {tokens, gate->weight, gate->bias}));
      EXPECT_TRUE(gradients_match([&] { return Losses{outputs_of(*gate, tokens)[0]}; },
                                  {tokens, gate->weight, gate->bias}));
    }
  }
}

TEST(TopKGradient, EqualsReference) {
  const int64_t T = 301, D = 70, E = 8;  // more than one block of rows and of columns
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const int64_t K : {1, 2, 8}) {
      const Tensor tokens = random_tensor({T, D}, 1, -1, 1, type);
      const Tensor exact_tokens = tokens.to(at::kDouble).set_requires_grad(true);
      const TopKGateOptions options =
          TopKGateOptions(D, E).top_k(K).aux_loss_coeff(.5).z_loss_coeff(.1);
      TopKGate gate(options);
      if (type == at::kDouble) gate.to(type);
      tokens.set_requires_grad(true);
      const Tensor exact_weight =
          gate.weight.detach().to(at::kDouble).clone().set_requires_grad(true);
      const auto expected = reference_router(exact_tokens.mm(exact_weight.t()), options);
      const Tensor cotangent = random_tensor({T, E}, 4);
      const GateOutput output = gate.forward(input_of(tokens));
      EXPECT_EQ(output.routing.weights.scalar_type(),
                type == at::kDouble ? at::kDouble : at::kFloat);
      const Tensor f = output.balance.tokens_per_expert.to(at::kDouble) / double(K * T);
      ((expected.weights * cotangent).sum() + .5 * E * (f * expected.score_sum / double(T)).sum() +
       .1 * expected.lse_square_sum / double(T))
          .backward();
      ((gates::dense_weights(output.routing, E) * cotangent).sum() + aux_loss(output).value +
       output.losses[0].value)
          .backward();
      const double tolerance = type == at::kDouble ? 1e-12 : 1e-5;
      EXPECT_TRUE(close_to(gate.weight.grad(), exact_weight.grad(), tolerance)) << type << K;
      EXPECT_TRUE(
          close_to(tokens.grad(), exact_tokens.grad(), type == at::kBFloat16 ? 4e-3 : tolerance))
          << type << K;
      EXPECT_EQ(tokens.grad().scalar_type(), type);
    }
  }
}

TEST(TopKGradient, OneExpert) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const auto gradient = [&](ScoreFunction score, Normalization normalization) {
    TopKGateOptions options = TopKGateOptions(6, 8).top_k(1).aux_loss_coeff(0);
    const auto gate = float64_gate(options.score_function(score).normalization(normalization));
    const Tensor weights = gate->forward(input_of(tokens)).routing.weights;
    (weights * random_tensor({37}, 2)).sum().backward();
    return gate->weight.grad().abs().max().item<double>();
  };
  for (const auto score : kScoreFunctions) {
    EXPECT_GT(gradient(score, Normalization::kAuto), 1e-3);
    EXPECT_GT(gradient(score, Normalization::kAll), 1e-3);
    EXPECT_EQ(gradient(score, Normalization::kSelected), 0);
  }
}

TEST(TopKGradient, IdleExpert) {
  const auto gate = float64_gate(TopKGateOptions(6, 4).aux_loss_coeff(0).bias(true), {},
                                 vector_of({0, -100, 0, 0}));
  const GateOutput output = gate->forward(input_of(random_tensor({37, 6}, 1)));
  EXPECT_EQ(output.stats.tokens_per_expert[1].item<int64_t>(), 0);
  EXPECT_FALSE(output.balance.score_sum.defined());
  EXPECT_TRUE(output.losses.empty());
  output.routing.weights.square().sum().backward();
  EXPECT_TRUE(same_bits(gate->weight.grad()[1], at::zeros({6}, at::kDouble)));
  EXPECT_GT(gate->weight.grad()[0].abs().max().item<double>(), 0);
}

TEST(TopKGradient, AuxLossScales) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const auto gradient = [&](double main_scale, double coeff) {
    const auto gate = float64_gate(TopKGateOptions(6, 8).aux_loss_coeff(coeff));
    const GateOutput output = gate->forward(input_of(tokens));
    Tensor loss = main_scale * output.routing.weights.square().sum();
    if (coeff > 0) loss = loss + aux_loss(output).value;
    loss.backward();
    return gate->weight.grad();
  };
  const Tensor aux = gradient(0, 1);
  EXPECT_GT(aux.abs().max().item<double>(), 0);
  for (const double c : {.01, 3.}) {
    EXPECT_TRUE(close_to(gradient(1, c), gradient(1, 0) + c * aux, 1e-14)) << c;
  }
}

TEST(TopKGradient, LayerNorm) {
  const Tensor tokens = random_tensor({7, 5}, 1, -2, 2);
  TopKGateOptions options = TopKGateOptions(5, 4).input_norm(gates::InputNorm::kLayerNorm);
  const auto gate = float64_gate(options.z_loss_coeff(.3), random_tensor({4, 5}, 2, -3, 3));
  EXPECT_TRUE(gradients_match([&] { return outputs_of(*gate, tokens); }, {tokens, gate->weight}));
  const Tensor features = gates::gate_features(tokens, gates::InputNorm::kLayerNorm, at::kDouble);
  EXPECT_TRUE(close_to(features.square().sum(1), at::ones({7}, at::kDouble), 1e-4));
  EXPECT_TRUE(close_to(features.sum(1) + 1, at::ones({7}, at::kDouble), 1e-12));
}

TEST(TopKGradient, NotTwice) {
  const auto gate = float64_gate(TopKGateOptions(6, 8));
  const Tensor loss = gate->forward(input_of(random_tensor({3, 6}, 1))).routing.weights.sum();
  EXPECT_EQ(error_text<ConfigError>([&] {
              torch::autograd::grad({loss}, {gate->weight}, {}, true, /*create_graph=*/true);
            }),
            "[top_k_gate] create_graph=1 is not supported: the router has no second derivative");
}

}  // namespace
}  // namespace perseid::testing
