// Gradients of the DSelect-k gate.
//   CentralDifferences  float64, 1e-7: tokens, all parameters, weights and all losses, switches
//                       partly saturated; per token and static, several widths, with a cut-off,
//                       with renormalize
//   EachLossAlone       so that a missing term of one is not hidden by another's size
//   LayerNorm           through the normalised input
//   EqualsReference     plain operations, more than one block of tokens: 1e-12, 1e-5 in float32
//   NotResurrected      no loss moves a switch that only leads to experts of weight exactly 0
//   LossScales          the gradient changes by exactly the coefficient times that of the loss
//   PenaltyIsMean       twice the batch: the same gradient, of the size of a mean
//   Threads             static: 1, 2 and 3 threads, outputs and gradients the same bits
//   Unused              outputs that reach no loss; NotTwice: a second derivative is refused
//   SavedBytes          the graph keeps features, logits and weights, no further [T, ...] tensor
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include "kernels/parallel.h"
#include "tests/gates/dselect_k_fixture.h"
#include "tests/gates/live_bytes.h"
#include "tests/gradcheck.h"

namespace perseid::testing {
namespace {

using Outputs = std::vector<Tensor>;

Outputs outputs_of(DSelectKGate& gate, const Tensor& tokens) {
  const GateOutput output = gate.forward(input_of(tokens));
  Outputs outputs = {dense(output, gate.num_experts()), global_loss(output)};
  for (const auto& loss : output.losses) outputs.push_back(loss.value);
  return outputs;
}

/// The penalty is small beside the rest, or its size would hide an error of the others.
DSelectKGateOptions with_losses(int64_t d_model, int64_t num_experts) {
  return DSelectKGateOptions(d_model, num_experts)
      .entropy_coeff(.7)
      .balance_coeff(.4)
      .penalty_coeff(1e-3);
}

Tensor total_of(const GateOutput& output) {
  Tensor loss = output.routing.weights.square().sum() + global_loss(output);
  for (const auto& part : output.losses) loss = loss + part.value;
  return loss;
}

TEST(DSelectKGradient, CentralDifferences) {
  const int64_t D = 3;
  for (const int64_t E : {1, 2, 5, 8}) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 3)}) {
      for (const int64_t T : {0, 1, 11}) {
        for (const double gamma : {1.5, 5.}) {
          for (const bool per_token : {true, false}) {
            if (T < 2 && gamma > 2) continue;
            const bool renormalize = (K > 1) == per_token;
            const double min_weight = gamma > 2 ? .05 : 0;
            const auto gate = random_gate(with_losses(D, E)
                                              .top_k(K)
                                              .gamma(gamma)
                                              .per_token(per_token)
                                              .min_weight(min_weight)
                                              .renormalize(renormalize));
            const Tensor tokens = random_tensor({T, D}, 1);
            std::vector<Tensor> inputs = gate->parameters();
            if (per_token) inputs.push_back(tokens);
            EXPECT_TRUE(gradients_match([&] { return outputs_of(*gate, tokens); }, inputs))
                << "E " << E << " K " << K << " T " << T << " gamma " << gamma << " per token "
                << per_token;
          }
        }
      }
    }
  }
}

TEST(DSelectKGradient, EachLossAlone) {
  const auto gate = random_gate(with_losses(3, 6));
  const Tensor tokens = random_tensor({11, 3}, 1);
  const auto stats = gate->forward(input_of(tokens)).stats;
  EXPECT_GT(stats.saturated_nodes, stats.num_nodes / 5);
  EXPECT_LT(stats.saturated_nodes, stats.num_nodes * 4 / 5);
  std::vector<Tensor> inputs = gate->parameters();
  inputs.push_back(tokens);
  for (size_t o = 0; o < 4; ++o) {
    EXPECT_TRUE(gradients_match([&] { return Outputs{outputs_of(*gate, tokens)[o]}; }, inputs))
        << o;
  }
}

TEST(DSelectKGradient, LayerNorm) {
  DSelectKGate gate(with_losses(5, 3).gamma(.01));
  gate.to(at::kDouble);
  const Tensor tokens = random_tensor({7, 5}, 1, -2, 2);
  std::vector<Tensor> inputs = gate.parameters();
  inputs.push_back(tokens);
  EXPECT_TRUE(gradients_match([&] { return outputs_of(gate, tokens); }, inputs));
}

TEST(DSelectKGradient, EqualsReference) {
  const int64_t T = 601, D = 70, E = 11, K = 3;
  for (const auto type : {at::kDouble, at::kFloat}) {
    const auto options = DSelectKGateOptions(D, E).top_k(K).entropy_coeff(.5).penalty_coeff(.01);
    const auto gate = random_gate(options, .1, type);
    const Tensor tokens = random_tensor({T, D}, 1, -1, 1, type).set_requires_grad(true);
    const GateOutput output = gate->forward(input_of(tokens));
    const Tensor cotangent = random_tensor({T, E}, 4);
    ((dense(output, E) * cotangent).sum() + output.losses[0].value + output.losses[1].value)
        .backward();

    const auto exact = random_gate(options, .1);
    for (size_t p = 0; p < 4; ++p) {
      exact->parameters()[p].set_data(gate->parameters()[p].detach().to(at::kDouble).clone());
    }
    const Tensor x = tokens.detach().to(at::kDouble).requires_grad_(true);
    const auto expected = reference_of(*exact, x);
    ((expected.weights * cotangent).sum() + expected.entropy_sum * (.5 / T) +
     expected.penalty_sum * (.01 / T))
        .backward();
    const double tolerance = type == at::kDouble ? 1e-12 : 1e-5;
    EXPECT_TRUE(close_to(dense(output, E), expected.weights, tolerance));
    EXPECT_TRUE(close_to(tokens.grad(), x.grad(), tolerance)) << type;
    for (size_t p = 0; p < 4; ++p) {
      EXPECT_TRUE(close_to(gate->parameters()[p].grad(), exact->parameters()[p].grad(), tolerance))
          << type << p;
    }
  }
}

TEST(DSelectKGradient, NotResurrected) {
  const int64_t E = 6, K = 2, bits = 3;
  const auto gate = random_gate(with_losses(3, E).gamma(4));
  // The first bit of both selectors is 0 for every token: experts 4 and 5 are out of reach.
  gate->code_weight.data().view({K, bits, 3}).select(1, 0).zero_();
  gate->code_bias.data().view({K, bits}).select(1, 0).fill_(-2);
  const GateOutput output = gate->forward(input_of(random_tensor({11, 3}, 1)));
  const Tensor counts = output.stats.tokens_per_expert;
  EXPECT_EQ(counts[4].item<int64_t>() + counts[5].item<int64_t>(), 0);
  EXPECT_EQ(output.stats.num_assignments, 11 * 4);
  total_of(output).backward();
  const Tensor gradient = gate->code_weight.grad().view({K, bits, 3});
  EXPECT_EQ(gradient.select(1, 0).abs().max().item<double>(), 0);
  EXPECT_GT(gradient.slice(1, 1).abs().min().item<double>(), 0);
}

TEST(DSelectKGradient, LossScales) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const auto gradient = [&](double main_scale, double entropy, double balance, double penalty) {
    const auto gate = random_gate(DSelectKGateOptions(6, 5)
                                      .gamma(4)
                                      .entropy_coeff(entropy)
                                      .balance_coeff(balance)
                                      .penalty_coeff(penalty));
    const GateOutput output = gate->forward(input_of(tokens));
    Tensor loss = main_scale * output.routing.weights.square().sum();
    for (const auto& part : output.losses) loss = loss + part.value;
    if (balance > 0) loss = loss + global_loss(output);
    loss.backward();
    return gate->code_weight.grad();
  };
  const Tensor main = gradient(1, 0, 0, 0);
  for (const double c : {.01, 3.}) {
    EXPECT_TRUE(close_to(gradient(1, c, 0, 0), main + c * gradient(0, 1, 0, 0), 1e-13)) << c;
    EXPECT_TRUE(close_to(gradient(1, 0, c, 0), main + c * gradient(0, 0, 1, 0), 1e-13)) << c;
    EXPECT_TRUE(close_to(gradient(1, 0, 0, c), main + c * gradient(0, 0, 0, 1), 1e-13)) << c;
  }
}

TEST(DSelectKGradient, PenaltyIsMean) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const auto run = [&](const Tensor& given) {
    const auto gate = random_gate(DSelectKGateOptions(6, 5).gamma(4).entropy_coeff(0));
    const auto losses = gate->forward(input_of(given)).losses;
    losses.at(0).value.backward();
    return Outputs{losses[0].value, gate->code_weight.grad()};
  };
  const Outputs one = run(tokens), two = run(at::cat({tokens, tokens}));
  EXPECT_TRUE(close_to(two[0], one[0], 1e-14));
  EXPECT_TRUE(close_to(two[1], one[1], 1e-14));
  EXPECT_LT(one[0].item<double>(), 2 * 5);  // K selectors of 1 / (share of the experts)
}

TEST(DSelectKGradient, Threads) {
  const int before = at::get_num_threads();
  kernels::set_parallel_for(
      [](int64_t begin, int64_t end, int64_t grain,
         const std::function<void(int64_t, int64_t)>& body) {
        at::parallel_for(begin, end, grain, body);
      },
      [] { return at::get_num_threads(); });
  const auto run = [](int threads, int64_t T, int64_t D, int64_t E, bool per_token) {
    at::set_num_threads(threads);
    const auto gate = random_gate(with_losses(D, E).per_token(per_token), .1, at::kFloat);
    const Tensor tokens = random_tensor({T, D}, 1, -1, 1, at::kFloat).set_requires_grad(per_token);
    const GateOutput output = gate->forward(input_of(tokens));
    const Tensor weights = output.routing.weights;
    Tensor loss =
        (weights * random_tensor({weights.size(0)}, 4, -1, 1, at::kFloat)).sum(at::kDouble);
    Outputs found = {weights, output.routing.expert_idx};
    for (const auto& part : output.losses) {
      found.push_back(part.value);
      loss = loss + part.value;
    }
    loss.backward();
    if (per_token) found.push_back(tokens.grad());
    for (const Tensor& parameter : gate->parameters()) found.push_back(parameter.grad());
    return found;
  };
  for (const auto& [T, D, E] : {std::array<int64_t, 3>{2047, 127, 13}, {201, 64, 5}, {1, 33, 7}}) {
    for (const bool per_token : {true, false}) {
      const Outputs expected = run(1, T, D, E, per_token);
      for (const int threads : {2, 3}) {
        const Outputs found = run(threads, T, D, E, per_token);
        for (size_t o = 0; o < found.size(); ++o) {
          EXPECT_TRUE(same_bits(found[o], expected[o])) << T << " " << threads << " " << o;
        }
      }
    }
  }
  at::set_num_threads(before);
  kernels::set_parallel_for(nullptr, nullptr);
}

TEST(DSelectKGradient, Unused) {
  const Tensor tokens = random_tensor({7, 6}, 1);
  const auto gradient = [&](bool weights, bool entropy, bool penalty) {
    const auto gate = random_gate(DSelectKGateOptions(6, 5).gamma(4));
    const GateOutput output = gate->forward(input_of(tokens));
    Tensor loss = at::zeros({}, at::kDouble);
    if (weights) loss = loss + output.routing.weights.square().sum();
    if (entropy) loss = loss + output.losses[0].value;
    if (penalty) loss = loss + output.losses[1].value;
    loss.backward();
    return gate->code_weight.grad();
  };
  EXPECT_TRUE(close_to(
      gradient(true, true, true),
      gradient(true, false, false) + gradient(false, true, false) + gradient(false, false, true),
      1e-13));
}

TEST(DSelectKGradient, NotTwice) {
  const auto gate = random_gate(DSelectKGateOptions(6, 5));
  const Tensor loss = gate->forward(input_of(random_tensor({3, 6}, 1))).routing.weights.sum();
  EXPECT_EQ(error_text<ConfigError>([&] {
              torch::autograd::grad({loss}, {gate->code_weight}, {}, true, /*create_graph=*/true);
            }),
            "[dselect_k_gate] create_graph=1 is not supported: the gate has no second derivative");
}

TEST(DSelectKGradient, SavedBytes) {
  const int64_t T = 2048, D = 64, E = 40, K = 2;
  const Tensor tokens = random_tensor({T, D}, 1, -1, 1, at::kFloat);
  const auto gate = random_gate(DSelectKGateOptions(D, E).top_k(K), .1, at::kFloat);
  const auto live = std::make_shared<LiveBytes>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, live);
  const GateOutput output = gate->forward(input_of(tokens));
  const int64_t A = output.stats.num_assignments;
  const int64_t logits = K * (kernels::dselect_k_bits(E) + 1) * T, dense_weights = T * E;
  EXPECT_LE(live->peak, 4 * (logits + dense_weights) + 8 * A + 8 * T + 65536);
  EXPECT_GE(live->bytes, 4 * (logits + dense_weights) + 8 * A);
}

}  // namespace
}  // namespace perseid::testing
