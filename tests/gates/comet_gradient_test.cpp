// Gradients of the COMET gate.
//   CentralDifferences  float64, 1e-7: tokens, all parameters, weights and both losses, switches
//                       partly saturated; per token and static, several widths, with a cut-off
//   EachLossAlone       so that a missing term of one is not hidden by another's size
//   LayerNorm           through the normalised input
//   EqualsReference     plain operations, more than one block of tokens: 1e-12, 1e-5 in float32
//   NotResurrected      no loss gives an expert of weight exactly 0 a gradient in its leaf logits
//   LossScales          the gradient changes by exactly the coefficient times that of the loss
//   Threads             1, 2 and 3 threads: outputs and gradients the same bits
//   LazyEqualsDense     logits along active paths and products without zeros: 1e-12, same support
//   Unused              outputs that reach no loss; NotTwice: a second derivative is refused
//   SavedBytes          the graph keeps features, logits and weights, no further [T, ...] tensor
#include <ATen/Parallel.h>

#include "kernels/parallel.h"
#include "tests/gates/comet_fixture.h"
#include "tests/gates/live_bytes.h"
#include "tests/gradcheck.h"

namespace perseid::testing {
namespace {

using Outputs = std::vector<Tensor>;

Outputs outputs_of(CometGate& gate, const Tensor& tokens) {
  const GateOutput output = gate.forward(input_of(tokens));
  return {dense(output, gate.num_experts()), output.losses[0].value, global_loss(output)};
}

CometGateOptions with_losses(int64_t d_model, int64_t num_experts) {
  return CometGateOptions(d_model, num_experts).entropy_coeff(.7).balance_coeff(.4);
}

TEST(CometGradient, CentralDifferences) {
  const int64_t D = 3;
  for (const int64_t E : {1, 2, 5, 8}) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 3)}) {
      for (const int64_t T : {0, 1, 11}) {
        for (const double gamma : {.7, 5.}) {
          for (const bool per_token : {true, false}) {
            const double min_weight = gamma > 1 ? .05 : 0;
            const auto gate =
                random_gate(with_losses(D, E).top_k(K).gamma(gamma).per_token(per_token).min_weight(
                    min_weight));
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

TEST(CometGradient, EachLossAlone) {
  const auto gate = random_gate(with_losses(3, 6));
  const Tensor tokens = random_tensor({11, 3}, 1);
  const auto stats = gate->forward(input_of(tokens)).stats;
  EXPECT_GT(stats.saturated_nodes, stats.num_nodes / 5);
  EXPECT_LT(stats.saturated_nodes, stats.num_nodes * 4 / 5);
  std::vector<Tensor> inputs = gate->parameters();
  inputs.push_back(tokens);
  for (size_t o = 0; o < 3; ++o) {
    EXPECT_TRUE(gradients_match([&] { return Outputs{outputs_of(*gate, tokens)[o]}; }, inputs))
        << o;
  }
}

TEST(CometGradient, LayerNorm) {
  CometGate gate(with_losses(5, 4).gamma(.01));
  gate.to(at::kDouble);
  const Tensor tokens = random_tensor({7, 5}, 1, -2, 2);
  std::vector<Tensor> inputs = gate.parameters();
  inputs.push_back(tokens);
  EXPECT_TRUE(gradients_match([&] { return outputs_of(gate, tokens); }, inputs));
}

TEST(CometGradient, EqualsReference) {
  const int64_t T = 301, D = 70, E = 11, K = 3;
  for (const auto type : {at::kDouble, at::kFloat}) {
    const auto gate = random_gate(CometGateOptions(D, E).top_k(K).entropy_coeff(.5), .1, type);
    const Tensor tokens = random_tensor({T, D}, 1, -1, 1, type).set_requires_grad(true);
    const GateOutput output = gate->forward(input_of(tokens));
    const Tensor cotangent = random_tensor({T, E}, 4);
    ((dense(output, E) * cotangent).sum() + output.losses[0].value).backward();

    const auto exact = random_gate(CometGateOptions(D, E).top_k(K), .1);
    for (size_t p = 0; p < 4; ++p) {
      exact->parameters()[p].set_data(gate->parameters()[p].detach().to(at::kDouble).clone());
    }
    const Tensor x = tokens.detach().to(at::kDouble).requires_grad_(true);
    const auto expected =
        reference_comet(at::linear(x, exact->split_weight, exact->split_bias).view({T, K, E - 1}),
                        at::linear(x, exact->leaf_weight, exact->leaf_bias).view({T, K, E}), 1);
    ((expected.weights * cotangent).sum() + expected.entropy_sum * (.5 / T)).backward();
    const double tolerance = type == at::kDouble ? 1e-12 : 1e-5;
    EXPECT_TRUE(close_to(output.routing.weights.sum(), expected.weights.sum(), tolerance));
    EXPECT_TRUE(close_to(tokens.grad(), x.grad(), tolerance)) << type;
    for (size_t p = 0; p < 4; ++p) {
      EXPECT_TRUE(close_to(gate->parameters()[p].grad(), exact->parameters()[p].grad(), tolerance))
          << type << p;
    }
  }
}

TEST(CometGradient, NotResurrected) {
  const int64_t E = 4, K = 2;
  const auto gate = random_gate(with_losses(3, E));
  // The last leaf of both trees is out of reach: the root goes left for every token.
  gate->split_weight.data().view({K, E - 1, 3}).select(1, 0).zero_();
  gate->split_bias.data().view({K, E - 1}).select(1, 0).fill_(1);
  const Tensor tokens = random_tensor({11, 3}, 1);
  const GateOutput output = gate->forward(input_of(tokens));
  const Tensor counts = output.stats.tokens_per_expert;
  EXPECT_EQ(counts[2].item<int64_t>() + counts[3].item<int64_t>(), 0);
  (output.losses[0].value + global_loss(output) + output.routing.weights.square().sum()).backward();
  const Tensor leaf_gradient = gate->leaf_weight.grad().view({K, E, 3});
  EXPECT_TRUE(same_bits(leaf_gradient.slice(1, 2), at::zeros({K, 2, 3}, at::kDouble)));
  EXPECT_GT(leaf_gradient.slice(1, 0, 2).abs().min().item<double>(), 0);
  const Tensor split_gradient = gate->split_weight.grad().view({K, E - 1, 3});
  EXPECT_EQ(split_gradient.select(1, 0).abs().max().item<double>(), 0);  // the saturated root
  EXPECT_EQ(split_gradient.select(1, 2).abs().max().item<double>(), 0);  // below it, not reached
  EXPECT_GT(split_gradient.select(1, 1).abs().max().item<double>(), 0);
}

TEST(CometGradient, LossScales) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const auto gradient = [&](double main_scale, double entropy, double balance) {
    const auto gate =
        random_gate(CometGateOptions(6, 5).entropy_coeff(entropy).balance_coeff(balance));
    const GateOutput output = gate->forward(input_of(tokens));
    Tensor loss = main_scale * output.routing.weights.square().sum();
    if (entropy > 0) loss = loss + output.losses[0].value;
    if (balance > 0) loss = loss + global_loss(output);
    loss.backward();
    return gate->split_weight.grad();
  };
  const Tensor main = gradient(1, 0, 0);
  for (const double c : {.01, 3.}) {
    EXPECT_TRUE(close_to(gradient(1, c, 0), main + c * gradient(0, 1, 0), 1e-13)) << c;
    EXPECT_TRUE(close_to(gradient(1, 0, c), main + c * gradient(0, 0, 1), 1e-13)) << c;
  }
}

TEST(CometGradient, Threads) {
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
    ((weights * random_tensor({weights.size(0)}, 4, -1, 1, at::kFloat)).sum(at::kDouble) +
     output.losses[0].value)
        .backward();
    Outputs found = {weights, output.routing.expert_idx, output.losses[0].value};
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

TEST(CometGradient, Unused) {
  const Tensor tokens = random_tensor({7, 6}, 1);
  const auto only = [&](bool weights) {
    const auto gate = random_gate(CometGateOptions(6, 5));
    const GateOutput output = gate->forward(input_of(tokens));
    (weights ? output.routing.weights.square().sum() : output.losses[0].value).backward();
    return gate->split_weight.grad();
  };
  const auto gate = random_gate(CometGateOptions(6, 5));
  const GateOutput output = gate->forward(input_of(tokens));
  (output.routing.weights.square().sum() + output.losses[0].value).backward();
  EXPECT_TRUE(close_to(gate->split_weight.grad(), only(true) + only(false), 1e-14));
}

TEST(CometGradient, LazyEqualsDense) {
  using gates::Descent;
  // Open, half saturated, saturated; kAuto takes the dense way in the first case and the lazy one
  // in the last.
  for (const double gamma : {100., 1., 1e-6}) {
    for (const bool with_mask : {false, true}) {
      const Tensor valid = at::arange(301, at::kLong).remainder(5).ne(1);
      std::vector<Outputs> found;
      for (const Descent descent : {Descent::kDense, Descent::kLazy, Descent::kAuto}) {
        const auto gate = random_gate(with_losses(9, 40).gamma(gamma).descent(descent));
        const Tensor tokens = random_tensor({301, 9}, 1).set_requires_grad(true);
        const GateOutput output = gate->forward(
            input_of(tokens, with_mask ? std::optional<Tensor>(valid) : std::nullopt));
        const Tensor weights = dense(output, 40);
        ((weights * random_tensor({301, 40}, 4)).sum() + output.losses[0].value +
         global_loss(output))
            .backward();
        Outputs outputs = {
            weights, output.losses[0].value, tokens.grad(),
            at::tensor({double(output.stats.num_nodes), double(output.stats.saturated_nodes)})};
        for (const Tensor& parameter : gate->parameters()) outputs.push_back(parameter.grad());
        found.push_back(outputs);
      }
      for (size_t o = 0; o < found[0].size(); ++o) {
        EXPECT_TRUE(close_to(found[1][o], found[0][o], 1e-12)) << gamma << " " << o;
        const size_t same = gamma > 1 ? 0 : 1;
        if (gamma != 1) {
          EXPECT_TRUE(same_bits(found[2][o], found[same][o])) << gamma << " " << o;
        }
      }
      EXPECT_TRUE(at::equal(found[1][0].eq(0), found[0][0].eq(0)));
    }
  }
}

TEST(CometGradient, NotTwice) {
  const auto gate = random_gate(CometGateOptions(6, 5));
  const Tensor loss = gate->forward(input_of(random_tensor({3, 6}, 1))).routing.weights.sum();
  EXPECT_EQ(error_text<ConfigError>([&] {
              torch::autograd::grad({loss}, {gate->leaf_weight}, {}, true, /*create_graph=*/true);
            }),
            "[comet_gate] create_graph=1 is not supported: the gate has no second derivative");
}

TEST(CometGradient, SavedBytes) {
  const int64_t T = 2048, D = 64, E = 40, K = 2;
  const Tensor tokens = random_tensor({T, D}, 1, -1, 1, at::kFloat);
  const auto gate = random_gate(CometGateOptions(D, E).top_k(K), .1, at::kFloat);
  const auto live = std::make_shared<LiveBytes>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, live);
  const GateOutput output = gate->forward(input_of(tokens));
  const int64_t A = output.stats.num_assignments;
  const int64_t logits = K * (2 * E - 1) * T, dense_weights = T * E;
  EXPECT_LE(live->peak, 4 * (logits + dense_weights) + 8 * A + 8 * T + 65536);
}

}  // namespace
}  // namespace perseid::testing
