// Loss-free balancing of the top-k gate: a bias for the selection that moves in after_step.
//   Update           b += u sign(mean - count), exact; balanced counts and no tokens leave it
//   SelectionOnly    another bias with the same selection: weights equal bit for bit; no gradient
//   ReachesBalance   stationary skewed logits: MaxVio below 0.1 after some steps
//   EvaluationIsPure forward never moves it
//   KeepsItsType     casts leave float32 and the bits; in the state dict
#include <cmath>

#include "tests/gates/gate_test.h"

namespace perseid::testing {
namespace {

gates::GateStats counts_of(const std::vector<int64_t>& counts) {
  gates::GateStats stats;
  stats.tokens_per_expert = at::tensor(counts, at::kLong);
  return stats;
}

TEST(TopKBalance, Update) {
  TopKGate gate(TopKGateOptions(6, 4).bias_update_rate(.25));
  gate.after_step(counts_of({5, 5, 5, 5}));
  EXPECT_TRUE(same_bits(gate.expert_bias, at::zeros({4})));
  gate.after_step(counts_of({0, 0, 0, 0}));
  EXPECT_TRUE(same_bits(gate.expert_bias, at::zeros({4})));
  gate.after_step(counts_of({9, 5, 4, 2}));  // mean 5
  EXPECT_TRUE(same_bits(gate.expert_bias, at::tensor({-.25f, 0.f, .25f, .25f})));
  gate.after_step(counts_of({1, 0, 0, 0}));  // mean 0.25
  EXPECT_TRUE(same_bits(gate.expert_bias, at::tensor({-.5f, .25f, .5f, .5f})));
  TopKGate without(TopKGateOptions(6, 4));
  without.after_step(counts_of({9, 5, 4, 2}));
  EXPECT_FALSE(without.expert_bias.defined());
}

TEST(TopKBalance, SelectionOnly) {
  const Tensor tokens = random_tensor({37, 6}, 1, -2, 2, at::kFloat);
  for (const auto score : kScoreFunctions) {
    TopKGate gate(TopKGateOptions(6, 8).bias_update_rate(1e-3).score_function(score));
    const GateOutput plain = gate.forward(input_of(tokens));
    gate.expert_bias.fill_(12);  // s + b - b would lose s
    const GateOutput lifted = gate.forward(input_of(tokens));
    if (at::equal(lifted.routing.expert_idx, plain.routing.expert_idx)) {
      EXPECT_TRUE(same_bits(lifted.routing.weights, plain.routing.weights));
    }
    gate.expert_bias.copy_(random_tensor({8}, 3, -1e-7, 1e-7, at::kFloat));
    const GateOutput same = gate.forward(input_of(tokens));
    ASSERT_TRUE(same_bits(same.routing.expert_idx, plain.routing.expert_idx));
    EXPECT_TRUE(same_bits(same.routing.weights, plain.routing.weights));
    gate.expert_bias[5] = 20;
    const GateOutput moved = gate.forward(input_of(tokens));
    EXPECT_EQ(moved.stats.tokens_per_expert[5].item<int64_t>(), 37);
    EXPECT_FALSE(gate.expert_bias.requires_grad());
  }
}

TEST(TopKBalance, ReachesBalance) {
  // Logits of a fixed batch whose experts differ by up to 3 in their mean.
  const int64_t T = 512, E = 8, K = 2;
  const Tensor tokens = random_tensor({T, E}, 1, -1, 1, at::kFloat);
  for (const auto score : kScoreFunctions) {
    TopKGate gate(TopKGateOptions(E, E).top_k(K).score_function(score).bias(true).bias_update_rate(
        score == ScoreFunction::kSoftmax ? 1e-3 : 4e-3));
    gate.weight.set_data(at::eye(E));
    gate.bias.set_data(at::linspace(0, 1.5, E));
    const auto max_vio = [&] {
      const Tensor counts = gate.forward(input_of(tokens)).stats.tokens_per_expert.to(at::kDouble);
      return (counts.max() / counts.mean()).item<double>() - 1;
    };
    EXPECT_GT(max_vio(), .8);
    for (int step = 0; step < 400; ++step) gate.after_step(gate.forward(input_of(tokens)).stats);
    double worst = 0;
    for (int step = 0; step < 20; ++step) {
      worst = std::max(worst, max_vio());
      gate.after_step(gate.forward(input_of(tokens)).stats);
    }
    EXPECT_LT(worst, .1) << int(score);
  }
}

TEST(TopKBalance, EvaluationIsPure) {
  TopKGate gate(TopKGateOptions(6, 8).bias_update_rate(.1));
  gate.after_step(counts_of({9, 5, 4, 2, 0, 0, 0, 0}));
  const Tensor before = gate.expert_bias.clone();
  for (const bool training : {false, true}) {
    GateInput input = input_of(random_tensor({37, 6}, 1, -1, 1, at::kFloat));
    input.training = training;
    gate.forward(input);
    gate.forward(input);  // as a recomputation does
    EXPECT_TRUE(same_bits(gate.expert_bias, before));
  }
}

TEST(TopKBalance, KeepsItsType) {
  const auto gate = std::make_shared<TopKGate>(TopKGateOptions(6, 8).bias_update_rate(1e-3));
  gate->after_step(counts_of({9, 5, 4, 2, 0, 0, 0, 0}));
  const Tensor before = gate->expert_bias.clone();
  gate->to(at::kBFloat16);
  EXPECT_EQ(gate->weight.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(same_bits(gate->expert_bias, before));
  gate->to(at::kCPU, at::kDouble);
  EXPECT_EQ(gate->weight.scalar_type(), at::kDouble);
  EXPECT_TRUE(same_bits(gate->expert_bias, before));
  torch::nn::Module parent("parent");
  parent.register_module("gate", gate);
  parent.to(at::kBFloat16);
  EXPECT_TRUE(same_bits(gate->expert_bias, before));
  EXPECT_TRUE(same_bits(parent.named_buffers()["gate.expert_bias"], before));
  // As a checkpoint does: values are written into the tensor of the dictionary.
  parent.named_buffers()["gate.expert_bias"].fill_(2);
  EXPECT_TRUE(same_bits(gate->expert_bias, at::full({8}, 2.f)));
}

}  // namespace
}  // namespace perseid::testing
