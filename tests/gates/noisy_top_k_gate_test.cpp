// Noisy top-k of Shazeer et al. and its V-MoE variant.
//   Contract         empty and padded batches, batches add, purity, threads: gate_contract.h
//   ZeroStart        both matrices are 0: experts 0..K-1 in evaluation, others in training
//   NoNoise          in evaluation: the plain top-k gate; load is the count, without gradient
//   Formulas         weights, importance and load of one batch by ordinary operations
//   MonteCarlo       Pr(t, i): noise of expert i alone drawn anew
//   Gradients        both matrices and tokens, noise fixed: central differences, 1e-7
//   LossScales       d(loss + c aux) = d(loss) + c d(aux), for each loss
#include "gates/noisy_top_k_gate.h"

#include <cmath>

#include "gates/draws.h"
#include "tests/gates/gate_contract.h"

namespace perseid::testing {
namespace {

using gates::NoisyTopKGate;
using gates::NoisyTopKGateOptions;
using gates::RouterNoise;

constexpr RouterNoise kNoises[] = {RouterNoise::kLearned, RouterNoise::kFixed};

std::shared_ptr<NoisyTopKGate> make_gate(const NoisyTopKGateOptions& options,
                                         at::ScalarType type = at::kDouble) {
  auto gate = std::make_shared<NoisyTopKGate>(options);
  gate->to(type);
  gate->weight.set_data(random_tensor(gate->weight.sizes(), 2, -1, 1, type));
  if (gate->noise_weight.defined()) {
    gate->noise_weight.set_data(random_tensor(gate->noise_weight.sizes(), 3, -.5, .5, type));
  }
  return gate;
}

NoisyTopKGateOptions with(RouterNoise noise, int64_t top_k) {
  return NoisyTopKGateOptions(kWidth, 8).noise(noise).top_k(top_k).seed(7).layer_id(2).gate_id(1);
}

/// The noise of training_input(T tokens), by the definition of its key.
Tensor noise_of(const NoisyTopKGateOptions& options, int64_t T) {
  const Tensor noise = at::empty({T, options.num_experts()}, at::kDouble);
  kernels::fill_normal(noise.mutable_data_ptr(), noise.numel(), kernels::DType::kFloat64,
                       gates::draw_key(options.seed(), 3, options.layer_id(), options.gate_id(),
                                       gates::Draw::kNoise));
  return noise;
}

struct Reference {
  Tensor clean, sigma, noisy;
};
Reference reference(const NoisyTopKGate& gate, const Tensor& tokens) {
  Reference result;
  result.clean = tokens.mm(gate.weight.detach().t());
  result.sigma = gate.noise_weight.defined()
                     ? at::softplus(tokens.mm(gate.noise_weight.detach().t())) + 1e-2
                     : at::full_like(result.clean, 1. / 8);
  result.noisy = result.clean + result.sigma * noise_of(gate.options(), tokens.size(0));
  return result;
}

TEST(NoisyTopKGate, Contract) {
  for (const RouterNoise noise : kNoises) {
    for (const int64_t K : {1, 2, 8}) {
      expect_gate_contract([&] { return make_gate(with(noise, K), at::kFloat); });
    }
  }
}

TEST(NoisyTopKGate, ZeroStart) {
  NoisyTopKGate gate(with(RouterNoise::kLearned, 2));
  EXPECT_EQ(gate.named_parameters().keys(), (std::vector<std::string>{"weight", "noise_weight"}));
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2, at::kFloat);
  const GateOutput output = gate.forward(input_of(tokens));
  EXPECT_EQ(ids_of(output.stats.tokens_per_expert),
            (std::vector<int64_t>{37, 37, 0, 0, 0, 0, 0, 0}));
  EXPECT_TRUE(same_bits(output.routing.weights, at::full({74}, .5f)));
  EXPECT_GT(gate.forward(training_input(tokens)).stats.tokens_per_expert.min().item<int64_t>(), 0);
  EXPECT_FALSE(NoisyTopKGate(with(RouterNoise::kFixed, 2)).noise_weight.defined());
}

TEST(NoisyTopKGate, NoNoise) {
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  for (const RouterNoise noise : kNoises) {
    for (const int64_t K : {1, 2}) {
      const auto gate = make_gate(with(noise, K));
      const bool is_all = noise == RouterNoise::kFixed || K == 1;
      const auto plain = float64_gate(TopKGateOptions(kWidth, 8).top_k(K).normalization(
                                          is_all ? Normalization::kAll : Normalization::kSelected),
                                      gate->weight);
      const GateOutput a = gate->forward(input_of(tokens));
      const GateOutput b = plain->forward(input_of(tokens));
      EXPECT_TRUE(same_bits(a.routing.weights, b.routing.weights));
      EXPECT_TRUE(same_bits(a.routing.expert_idx, b.routing.expert_idx));
      ASSERT_EQ(a.global_losses.size(), 2u);
      EXPECT_EQ(a.global_losses[0].name, "importance_loss");
      EXPECT_EQ(a.global_losses[1].name, "load_loss");
      EXPECT_TRUE(
          same_bits(a.global_losses[1].local_sum, b.stats.tokens_per_expert.to(at::kDouble)));
      EXPECT_FALSE(a.global_losses[1].local_sum.requires_grad());
    }
  }
  // K = E: nobody can fall out.
  const auto gate = make_gate(with(RouterNoise::kLearned, 8));
  const GateOutput output = gate->forward(training_input(tokens));
  EXPECT_TRUE(same_bits(output.global_losses[1].local_sum, at::full({8}, 37., at::kDouble)));
}

TEST(NoisyTopKGate, Formulas) {
  const int64_t T = 37;
  const Tensor tokens = random_tensor({T, kWidth}, 1, -2, 2);
  for (const RouterNoise noise : kNoises) {
    for (const int64_t K : {1, 2, 5}) {
      const auto gate = make_gate(with(noise, K));
      const GateOutput output = gate->forward(training_input(tokens));
      const Reference r = reference(*gate, tokens);
      const auto [sorted, order] = r.noisy.sort(/*dim=*/1, /*descending=*/true);
      const Tensor selected = at::zeros_like(r.noisy).scatter(1, order.slice(1, 0, K), 1);
      const bool is_all = noise == RouterNoise::kFixed || K == 1;
      Tensor weights = r.noisy.softmax(1) * selected;
      if (!is_all) weights = weights / weights.sum(1, true);
      EXPECT_TRUE(close_to(gates::dense_weights(output.routing, 8), weights, 1e-13));
      const Tensor importance =
          noise == RouterNoise::kFixed ? r.clean.softmax(1).sum(0) : weights.sum(0);
      EXPECT_TRUE(close_to(output.global_losses[0].local_sum, importance, 1e-13));
      const Tensor kth = sorted.slice(1, K - 1, K), next = sorted.slice(1, K, K + 1);
      const Tensor bound = noise == RouterNoise::kFixed ? kth.expand_as(r.noisy)
                                                        : at::where(r.noisy > next, next, kth);
      const Tensor load = at::special_ndtr((r.clean - bound) / r.sigma).sum(0);
      EXPECT_TRUE(close_to(output.global_losses[1].local_sum, load, 1e-12));
      const auto losses = losses_of(output);
      const auto cv = [](const Tensor& v) { return v.var(false) / v.mean().square(); };
      EXPECT_TRUE(close_to(losses[0], .1 * cv(importance), 1e-9));
      EXPECT_TRUE(close_to(losses[1], .1 * cv(load), 1e-9));
    }
  }
}

TEST(NoisyTopKGate, MonteCarlo) {
  const int64_t K = 3, E = 8, draws = 40000;
  const Tensor token = random_tensor({1, kWidth}, 1, -2, 2);
  const auto gate = make_gate(with(RouterNoise::kLearned, K));
  const Tensor load = gate->forward(training_input(token)).global_losses[1].local_sum.detach();
  const Reference r = reference(*gate, token);
  std::vector<double> noise(draws);
  for (int64_t i = 0; i < E; ++i) {
    kernels::fill_normal(noise.data(), draws, kernels::DType::kFloat64,
                         kernels::random_key(static_cast<uint64_t>(100 + i)));
    std::vector<double> others;
    for (int64_t j = 0; j < E; ++j) {
      if (j != i) others.push_back(r.noisy[0][j].item<double>());
    }
    std::sort(others.begin(), others.end(), std::greater<double>());
    const double clean = r.clean[0][i].item<double>(), sigma = r.sigma[0][i].item<double>();
    int64_t hits = 0;
    for (const double x : noise) hits += clean + sigma * x > others[K - 1];
    EXPECT_NEAR(load[i].item<double>(), double(hits) / double(draws),
                4 * .5 / std::sqrt(double(draws)))
        << i;
  }
}

TEST(NoisyTopKGate, Gradients) {
  const Tensor tokens = random_tensor({11, kWidth}, 1, -2, 2);
  for (const RouterNoise noise : kNoises) {
    for (const int64_t K : {1, 2, 8}) {
      const auto gate = make_gate(with(noise, K).importance_coeff(.5).load_coeff(.7));
      std::vector<Tensor> inputs = gate->parameters();
      inputs.push_back(tokens);
      // The routing and each loss alone, so that a missing term is not hidden by another's size.
      for (size_t part = 0; part < 3; ++part) {
        EXPECT_TRUE(gradients_match(
            [&]() -> std::vector<Tensor> {
              const GateOutput output = gate->forward(training_input(tokens));
              if (part == 0) return {output.routing.weights};
              return {losses_of(output)[part - 1]};
            },
            inputs))
            << "noise " << int(noise) << " K " << K << " part " << part;
      }
    }
  }
  const auto gate = make_gate(with(RouterNoise::kLearned, 2));
  const auto losses = losses_of(gate->forward(training_input(tokens)));
  losses[1].backward();
  EXPECT_GT(gate->weight.grad().abs().max().item<double>(), 1e-4);
  EXPECT_GT(gate->noise_weight.grad().abs().max().item<double>(), 1e-4);
}

TEST(NoisyTopKGate, LossScales) {
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  const auto gradient = [&](double main, double importance, double load) {
    const auto gate =
        make_gate(with(RouterNoise::kLearned, 2).importance_coeff(importance).load_coeff(load));
    const GateOutput output = gate->forward(training_input(tokens));
    Tensor total = main * output.routing.weights.square().sum();
    for (const Tensor& loss : losses_of(output)) total = total + loss;
    total.backward();
    return gate->weight.grad();
  };
  const Tensor plain = gradient(1, 0, 0);
  for (const double c : {.01, 3.}) {
    EXPECT_TRUE(close_to(gradient(1, c, 0), plain + c * gradient(0, 1, 0), 1e-13));
    EXPECT_TRUE(close_to(gradient(1, 0, c), plain + c * gradient(0, 0, 1), 1e-13));
  }
}

TEST(NoisyTopKGate, Edges) {
  NoisyTopKGate one(NoisyTopKGateOptions(kWidth, 1).top_k(1));
  const Tensor tokens = random_tensor({5, kWidth}, 1, -1, 1, at::kFloat);
  const Tensor alone = one.forward(training_input(tokens)).routing.weights;
  EXPECT_TRUE(same_bits(alone, at::ones({5})));
  alone.sum().backward();
  for (const Tensor& parameter : one.parameters()) {
    EXPECT_FALSE(parameter.grad().ne(0).any().item<bool>());
  }
  // A NaN stays with its token and is counted.
  const auto gate = make_gate(with(RouterNoise::kLearned, 2), at::kFloat);
  Tensor bad = tokens.clone();
  bad[2][1] = NAN;
  const GateOutput output = gate->forward(training_input(bad));
  const GateOutput good = gate->forward(training_input(tokens));
  EXPECT_EQ(output.stats.non_finite_tokens, 1);
  const Tensor rows = output.routing.weights.view({5, 2}),
               expected = good.routing.weights.view({5, 2});
  EXPECT_TRUE(rows[2].isnan().all().item<bool>());
  for (const int64_t t : {0, 1, 3, 4}) EXPECT_TRUE(same_bits(rows[t], expected[t]));
}

}  // namespace
}  // namespace perseid::testing
