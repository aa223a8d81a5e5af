// GShard: the best expert and, by policy, the second.
//   Contract        empty and padded batches, batches add, purity, threads: gate_contract.h
//   Policies        which second experts stay, by the definition of each policy
//   RandomShare     the second stays with probability min(1, g2 / threshold); all in evaluation
//   Gumbel          the second is a sample of the softmax without the first; chi-square
//   Weights         before and after the drop
//   AuxLoss         E^2 mean(f p) over first choices; ranks add; balanced and collapsed
//   Gradients       central differences of weights and losses, 1e-7
#include "gates/gshard_gate.h"

#include <cmath>

#include "tests/gates/gate_contract.h"

namespace perseid::testing {
namespace {

using gates::GShardGate;
using gates::GShardGateOptions;
using gates::SecondPolicy;

constexpr SecondPolicy kPolicies[] = {SecondPolicy::kAll, SecondPolicy::kNone,
                                      SecondPolicy::kThreshold, SecondPolicy::kRandom};

std::shared_ptr<GShardGate> make_gate(const GShardGateOptions& options,
                                      at::ScalarType type = at::kDouble) {
  auto gate = std::make_shared<GShardGate>(options);
  gate->to(type);
  gate->weight.set_data(random_tensor(gate->weight.sizes(), 2, -1, 1, type));
  return gate;
}
GShardGateOptions with(SecondPolicy policy) {
  return GShardGateOptions(kWidth, 8).second_policy(policy).seed(7).layer_id(2);
}

TEST(GShardGate, Contract) {
  for (const SecondPolicy policy : kPolicies) {
    for (const bool gumbel : {false, true}) {
      expect_gate_contract([&] {
        return make_gate(with(policy).gumbel_second(gumbel).z_loss_coeff(.1), at::kFloat);
      });
    }
  }
}

TEST(GShardGate, Policies) {
  const int64_t T = 37;
  const Tensor tokens = random_tensor({T, kWidth}, 1, -2, 2);
  const Tensor p = tokens.mm(make_gate(with(SecondPolicy::kAll))->weight.t()).softmax(1).detach();
  const auto [best, order] = p.sort(1, /*descending=*/true);
  const Tensor top = best.slice(1, 0, 2), share = top / top.sum(1, true);
  for (const SecondPolicy policy : kPolicies) {
    for (const bool after : {false, true}) {
      const auto gate = make_gate(with(policy).second_threshold(.3).normalize_after_drop(after));
      const GateOutput output = gate->forward(training_input(tokens));
      EXPECT_TRUE(same_bits(output.routing.expert_idx,
                            gate->forward(training_input(tokens)).routing.expert_idx));
      const std::vector<int64_t> offset = ids_of(gates::explicit_offsets(output.routing));
      int64_t num_second = 0;
      for (int64_t t = 0; t < T; ++t) {
        const auto i = static_cast<size_t>(t);
        const int64_t count = offset[i + 1] - offset[i];
        const double g1 = share[t][0].item<double>(), g2 = share[t][1].item<double>();
        if (policy == SecondPolicy::kAll) {
          EXPECT_EQ(count, 2);
        }
        if (policy == SecondPolicy::kNone) {
          EXPECT_EQ(count, 1);
        }
        if (policy == SecondPolicy::kThreshold) {
          EXPECT_EQ(count, g2 > .3 ? 2 : 1);
        }
        if (policy == SecondPolicy::kRandom && g2 >= .3) {
          EXPECT_EQ(count, 2);
        }
        for (int64_t k = 0; k < count; ++k) {
          EXPECT_EQ(output.routing.expert_idx[offset[i] + k].item<int64_t>(),
                    order[t][k].item<int64_t>());
          const double expected = after && count == 1 ? 1 : (k == 0 ? g1 : g2);
          EXPECT_NEAR(output.routing.weights[offset[i] + k].item<double>(), expected, 1e-8);
        }
        num_second += count - 1;
      }
      EXPECT_EQ(output.stats.tokens_with_one_expert, T - num_second);
      if (policy == SecondPolicy::kThreshold || policy == SecondPolicy::kRandom) {
        EXPECT_GT(num_second, 0);
        EXPECT_LT(num_second, T);
      }
    }
  }
}

TEST(GShardGate, RandomShare) {
  const int64_t T = 20000;
  const auto gate = std::make_shared<GShardGate>(
      GShardGateOptions(1, 2).second_policy(SecondPolicy::kRandom).second_threshold(.4));
  gate->weight.set_data(at::tensor({1.5f, 0.f}).unsqueeze(1));
  const double g2 = 1 / (1 + std::exp(1.5)), expected = g2 / .4;
  const Tensor tokens = at::ones({T, 1});
  const GateOutput output = gate->forward(training_input(tokens));
  EXPECT_NEAR(output.stats.tokens_per_expert[1].item<double>() / double(T), expected,
              4 * .5 / std::sqrt(double(T)));
  EXPECT_EQ(output.stats.tokens_per_expert[0].item<int64_t>(), T);
  EXPECT_EQ(gate->forward(input_of(tokens)).routing.top_k, 2);
}

TEST(GShardGate, Gumbel) {
  const int64_t T = 20000;
  const std::vector<double> logits = {2, .5, 1, -1, 0, .3, -.5, 1.2};
  auto gate =
      make_gate(GShardGateOptions(1, 8).second_policy(SecondPolicy::kAll).gumbel_second(true));
  gate->weight.set_data(vector_of(logits).unsqueeze(1));
  const Tensor tokens = at::ones({T, 1}, at::kDouble);
  const GateOutput output = gate->forward(training_input(tokens));
  const Tensor p = vector_of(logits).softmax(0);
  double chi_square = 0;
  EXPECT_EQ(output.stats.tokens_per_expert[0].item<int64_t>(), T);
  for (int64_t e = 1; e < 8; ++e) {
    const double mean = double(T) * p[e].item<double>() / (1 - p[0].item<double>());
    chi_square += std::pow(output.stats.tokens_per_expert[e].item<double>() - mean, 2) / mean;
  }
  EXPECT_LT(chi_square, 6 + 5 * std::sqrt(12.));
  // Weights are those of the plain softmax; evaluation takes the best two.
  const Tensor rows = output.routing.weights.view({T, 2});
  const Tensor second = output.routing.expert_idx.view({T, 2}).select(1, 1).to(at::kLong);
  const Tensor p2 = p.index_select(0, second);
  EXPECT_TRUE(close_to(rows.select(1, 1), p2 / (p2 + p[0] + 1e-9), 1e-14));
  const GateOutput plain = gate->forward(input_of(tokens));
  EXPECT_EQ(plain.stats.tokens_per_expert[7].item<int64_t>(), T);
}

TEST(GShardGate, AuxLoss) {
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  const auto gate = make_gate(with(SecondPolicy::kNone).aux_loss_coeff(.3));
  const auto expected = [&](const Tensor& x) {
    const Tensor p = x.mm(gate->weight.t()).softmax(1);
    const Tensor f = at::bincount(p.argmax(1), {}, 8).to(at::kDouble) / double(x.size(0));
    return .3 * 8 * 8 * (f * p.mean(0)).mean();
  };
  const GateOutput output = gate->forward(training_input(tokens));
  ASSERT_EQ(output.global_losses.size(), 1u);
  EXPECT_EQ(output.global_losses[0].name, "aux_loss");
  EXPECT_TRUE(close_to(losses_of(output)[0], expected(tokens), 1e-13));
  // Two ranks: values and gradients add up to those of one process.
  const GateOutput a = gate->forward(training_input(tokens.slice(0, 0, 20)));
  const GateOutput b = gate->forward(training_input(tokens.slice(0, 20), 20));
  const Tensor sum = (a.global_losses[0].local_sum + b.global_losses[0].local_sum).detach();
  const Tensor loss = gates::finish_global_loss(a.global_losses[0], sum, 37, 2).value +
                      gates::finish_global_loss(b.global_losses[0], sum, 37, 2).value;
  EXPECT_TRUE(close_to(loss, expected(tokens), 1e-13));
  loss.backward();
  const Tensor parts = gate->weight.grad().clone();
  gate->weight.mutable_grad() = Tensor();
  expected(tokens).backward();
  EXPECT_TRUE(close_to(parts, gate->weight.grad(), 1e-13));
  // All tokens on one expert whose score is 1: coefficient * E.
  gate->weight.set_data(at::tensor({900., 0., 0., 0., 0., 0., 0., 0.}, at::kDouble)
                            .unsqueeze(1)
                            .expand({8, kWidth})
                            .contiguous());
  EXPECT_NEAR(losses_of(gate->forward(training_input(at::ones({5, kWidth}, at::kDouble))))[0]
                  .item<double>(),
              .3 * 8, 1e-12);
}

TEST(GShardGate, Gradients) {
  const Tensor tokens = random_tensor({11, kWidth}, 1, -2, 2);
  for (const SecondPolicy policy : kPolicies) {
    for (const bool gumbel : {false, true}) {
      for (const bool after : {false, true}) {
        GShardGateOptions options = with(policy).second_threshold(.3).gumbel_second(gumbel);
        const auto gate =
            make_gate(options.normalize_after_drop(after).aux_loss_coeff(.5).z_loss_coeff(.2));
        EXPECT_TRUE(gradients_match(
            [&] {
              const GateOutput output = gate->forward(training_input(tokens));
              std::vector<Tensor> values = losses_of(output);
              values.push_back(output.routing.weights);
              return values;
            },
            {gate->weight, tokens}));
      }
    }
  }
}

TEST(GShardGate, LossScales) {
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  const auto gradient = [&](double main, double aux) {
    const auto gate = make_gate(with(SecondPolicy::kAll).aux_loss_coeff(aux));
    const GateOutput output = gate->forward(training_input(tokens));
    Tensor total = main * output.routing.weights.square().sum();
    for (const Tensor& loss : losses_of(output)) total = total + loss;
    total.backward();
    return gate->weight.grad();
  };
  for (const double c : {.01, 3.}) {
    EXPECT_TRUE(close_to(gradient(1, c), gradient(1, 0) + c * gradient(0, 1), 1e-13));
  }
}

TEST(GShardGate, Edges) {
  GShardGate one(GShardGateOptions(kWidth, 1).gumbel_second(true));
  EXPECT_EQ(one.top_k(), 1);
  const Tensor tokens = random_tensor({5, kWidth}, 1, -1, 1, at::kFloat);
  const GateOutput single = one.forward(training_input(tokens));
  EXPECT_TRUE(close_to(single.routing.weights, at::ones({5}), 1e-7));
  single.routing.weights.sum().backward();
  EXPECT_FALSE(one.weight.grad().ne(0).any().item<bool>());
  // Scores that underflow, and a NaN: still two different experts for each token.
  for (const bool gumbel : {false, true}) {
    const auto gate = make_gate(with(SecondPolicy::kAll).gumbel_second(gumbel), at::kFloat);
    Tensor bad = tokens.clone();
    bad.mul_(1e4);
    bad[2][1] = NAN;
    const GateOutput output = gate->forward(training_input(bad));
    EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
    EXPECT_EQ(output.stats.non_finite_tokens, 1);
    EXPECT_EQ(output.stats.num_assignments, 10);
    EXPECT_TRUE(gates::dense_weights(output.routing, 8)[2].isnan().any().item<bool>());
  }
}

}  // namespace
}  // namespace perseid::testing
