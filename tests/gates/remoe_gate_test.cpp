// ReMoE: weights relu(z), sparse by an adaptive L1 loss.
//   Contract        empty and padded batches, batches add, purity, threads: gate_contract.h
//   IsRelu          weights, tokens without expert, statistics
//   Loss            l1_coeff E / (K T^2) sum_i count_i sum_t relu(z_ti); counts of all ranks
//   Gradients       central differences, 1e-7; exact scaling with the coefficient
//   AfterStep       times or over 1.2, clamped; evaluation leaves it
//   ReachesDensity  a toy problem: K experts per token within 10 %
//   KeepsItsType    casts leave float64 and the bits
#include "gates/remoe_gate.h"

#include <c10/core/GradMode.h>

#include <cmath>

#include "tests/gates/gate_contract.h"

namespace perseid::testing {
namespace {

using gates::ReMoEGate;
using gates::ReMoEGateOptions;

std::shared_ptr<ReMoEGate> make_gate(const ReMoEGateOptions& options,
                                     at::ScalarType type = at::kDouble) {
  auto gate = std::make_shared<ReMoEGate>(options);
  gate->to(type);
  gate->weight.set_data(random_tensor(gate->weight.sizes(), 2, -1, 1, type));
  return gate;
}
ReMoEGateOptions options_with(double coeff, bool balance = true) {
  return ReMoEGateOptions(kWidth, 8).l1_coeff_start(coeff).l1_balance(balance);
}

TEST(ReMoEGate, Contract) {
  for (const bool balance : {false, true}) {
    expect_gate_contract([&] { return make_gate(options_with(.1, balance), at::kFloat); });
  }
}

TEST(ReMoEGate, IsRelu) {
  Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  tokens[5].fill_(0);
  const auto gate = make_gate(options_with(1e-8));
  const GateOutput output = gate->forward(input_of(tokens));
  const Tensor weights = tokens.mm(gate->weight.t()).relu();
  EXPECT_TRUE(close_to(gates::dense_weights(output.routing, 8), weights, 1e-14));
  EXPECT_EQ(output.stats.tokens_without_expert, weights.sum(1).eq(0).sum().item<int64_t>());
  EXPECT_GE(output.stats.tokens_without_expert, 1);
  EXPECT_EQ(output.stats.num_assignments, weights.gt(0).sum().item<int64_t>());
  EXPECT_EQ(output.stats.max_experts_per_token, weights.gt(0).sum(1).max().item<int64_t>());
  EXPECT_EQ(output.routing.top_k, 0);
}

TEST(ReMoEGate, Loss) {
  const int64_t T = 37, K = 2, E = 8;
  const Tensor tokens = random_tensor({T, kWidth}, 1, -2, 2);
  const auto gate = make_gate(options_with(.3));
  const Tensor weights = tokens.mm(gate->weight.t()).relu();
  const Tensor counts = weights.gt(0).sum(0).to(at::kDouble);
  const Tensor expected = .3 * double(E) / double(K * T * T) * (counts * weights.sum(0)).sum();
  const GateOutput output = gate->forward(input_of(tokens));
  EXPECT_TRUE(close_to(losses_of(output).at(0), expected, 1e-13));
  // Two ranks: each with the counts of both.
  const GateOutput a = gate->forward(input_of(tokens.slice(0, 0, 20)));
  const GateOutput b = gate->forward(input_of(tokens.slice(0, 20)));
  const Tensor all = a.stats.tokens_per_expert + b.stats.tokens_per_expert;
  const Tensor sum = gates::load_balance_loss(a.balance, all, T).value +
                     gates::load_balance_loss(b.balance, all, T).value;
  EXPECT_TRUE(close_to(sum, expected, 1e-13));
  sum.backward();
  const Tensor parts = gate->weight.grad().clone();
  gate->weight.mutable_grad() = Tensor();
  expected.backward();
  EXPECT_TRUE(close_to(parts, gate->weight.grad(), 1e-13));

  const auto plain = make_gate(options_with(.3, false));
  const GateOutput unbalanced = plain->forward(input_of(tokens));
  EXPECT_EQ(unbalanced.losses.at(0).name, "l1_loss");
  EXPECT_TRUE(close_to(unbalanced.losses[0].value, .3 * weights.sum() / double(T), 1e-13));
  EXPECT_TRUE(close_to(unbalanced.losses[0].raw, weights.sum() / double(T), 1e-13));
  EXPECT_FALSE(unbalanced.balance.score_sum.defined());
}

TEST(ReMoEGate, Gradients) {
  const Tensor tokens = random_tensor({11, kWidth}, 1, -2, 2);
  for (const bool balance : {false, true}) {
    const auto gate = make_gate(options_with(.3, balance));
    for (const bool is_loss : {false, true}) {
      EXPECT_TRUE(gradients_match(
          [&]() -> std::vector<Tensor> {
            const GateOutput output = gate->forward(input_of(tokens));
            if (is_loss) return losses_of(output);
            return {output.routing.weights};
          },
          {gate->weight, tokens}));
    }
    const auto gradient = [&](double main, double coeff) {
      const auto fresh = make_gate(options_with(coeff, balance));
      const GateOutput output = fresh->forward(input_of(tokens));
      (main * output.routing.weights.square().sum() + losses_of(output)[0]).backward();
      return fresh->weight.grad();
    };
    const Tensor aux = gradient(0, 1);
    EXPECT_TRUE(close_to(gradient(1, 3) - gradient(1, 1), 2 * aux, 1e-12));
  }
}

TEST(ReMoEGate, AfterStep) {
  const auto gate = make_gate(options_with(1.));
  gates::GateStats stats;
  const auto after = [&](int64_t tokens, int64_t assignments) {
    stats.num_tokens = tokens;
    stats.num_assignments = assignments;
    gate->after_step(stats);
    return gate->l1_coeff.item<double>();
  };
  EXPECT_EQ(after(10, 21), 1.2);
  EXPECT_NEAR(after(10, 20), 1., 1e-15);  // not denser than the target
  EXPECT_NEAR(after(10, 0), 1 / 1.2, 1e-15);
  EXPECT_NEAR(after(0, 0), 1 / 1.2, 1e-15);  // nothing was measured
  for (int i = 0; i < 200; ++i) after(10, 80);
  EXPECT_EQ(gate->l1_coeff.item<double>(), 1e2);
  for (int i = 0; i < 400; ++i) after(10, 0);
  EXPECT_EQ(gate->l1_coeff.item<double>(), 1e-12);
}

TEST(ReMoEGate, ReachesDensity) {
  // Gradient descent on a task that wants every expert. The first feature is a constant: without it
  // half of all logits were positive, whatever the weight.
  const int64_t T = 256, E = 8, K = 2;
  Tensor tokens = random_tensor({T, kWidth}, 1, -1, 1, at::kFloat);
  tokens.select(1, 0).fill_(1);
  const Tensor target = random_tensor({T, E}, 5, 0, 1, at::kFloat);
  ReMoEGate gate(ReMoEGateOptions(kWidth, E).top_k(K).l1_coeff_start(1e-4));
  double assignments = 0, count = 0;
  for (int step = 0; step < 600; ++step) {
    const GateOutput output = gate.forward(input_of(tokens));
    const Tensor weights = gates::dense_weights(output.routing, E);
    ((weights - target).square().sum() / double(T) + losses_of(output)[0]).backward();
    {
      const c10::NoGradGuard no_grad;
      gate.weight.add_(gate.weight.grad(), -.1);
      gate.weight.mutable_grad() = Tensor();
    }
    gate.after_step(output.stats);
    if (step < 500) continue;
    assignments += double(output.stats.num_assignments);
    count += double(T);
  }
  EXPECT_NEAR(assignments / count, double(K), .1 * double(K));
  EXPECT_GT(gate.l1_coeff.item<double>(), 1e-3);
  EXPECT_LT(gate.l1_coeff.item<double>(), 1e2);
}

TEST(ReMoEGate, KeepsItsType) {
  ReMoEGate gate(options_with(1. / 3));
  gate.to(at::kBFloat16);
  gate.to(at::kCPU, at::kFloat);
  EXPECT_EQ(gate.l1_coeff.scalar_type(), at::kDouble);
  EXPECT_EQ(gate.l1_coeff.item<double>(), 1. / 3);
  EXPECT_EQ(gate.named_buffers().keys(), (std::vector<std::string>{"l1_coeff"}));
  gate.named_buffers()["l1_coeff"].fill_(.5);
  EXPECT_EQ(gate.l1_coeff.item<double>(), .5);
}

TEST(ReMoEGate, NonFinite) {
  const auto gate = make_gate(options_with(1e-8), at::kFloat);
  Tensor tokens = random_tensor({5, kWidth}, 1, -1, 1, at::kFloat);
  const Tensor good = gates::dense_weights(gate->forward(input_of(tokens)).routing, 8);
  tokens[2][1] = NAN;
  const GateOutput output = gate->forward(input_of(tokens));
  EXPECT_EQ(output.stats.non_finite_tokens, 1);
  const Tensor rows = gates::dense_weights(output.routing, 8);
  for (const int64_t t : {0, 1, 3, 4}) EXPECT_TRUE(same_bits(rows[t], good[t]));
  EXPECT_TRUE(rows[2].isnan().any().item<bool>());
}

}  // namespace
}  // namespace perseid::testing
