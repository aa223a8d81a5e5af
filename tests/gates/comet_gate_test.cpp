// The COMET gate: values and statistics. Formulas are proven in tests/kernels.
//   Golden            E = 4, K = 2: weights, order of the row, entropy loss and its raw value, 1e-9
//   EqualsReference   every E = 1 .. 17: weights and entropy of plain operations; Sigma g = 1
//   AtMostK           saturated switches: at most K pairs per token, hard_eval the same bits
//   HardEval          outside training only; at most K pairs though no switch is saturated
//   MinWeight         pairs below it are gone, the mass is reported, others keep their bits
//   Start             near uniform, all experts; equal by seed, layer and gate, else different
//   Static            equals a per-token gate with the same logits, K(2E-1) parameters
//   Schedule          of the entropy coefficient, progress clamped
//   BatchesAdd        three batches with one tokens_global = their concatenation
//   SaveAndLoad       same bits after a round trip
#include "tests/gates/comet_fixture.h"

#include <torch/serialize.h>

#include <cmath>
#include <sstream>

namespace perseid::testing {
namespace {

const std::vector<double> kGoldenSplits = {.25, -.1, .5, 0, .6, -.25};
const std::vector<double> kGoldenLeaves = {.1, -.2, .3, 0, 0, .5, -.1, .2};

std::shared_ptr<CometGate> golden_gate(const CometGateOptions& options) {
  return gate_with_logits(options, vector_of(kGoldenSplits), vector_of(kGoldenLeaves));
}

TEST(CometGate, Golden) {
  const auto gate = golden_gate(CometGateOptions(1, 4).entropy_coeff(.5));
  const GateOutput output = gate->forward(one_token());
  EXPECT_NO_THROW(gates::validate(output.routing, 4, "test"));
  EXPECT_EQ(ids_of(output.routing.expert_idx), (std::vector<int64_t>{0, 3, 1, 2}));
  EXPECT_TRUE(close_to(dense(output, 4).reshape({-1}),
                       vector_of({.3995807438, .2159635547, .1358602041, .2485954974}), 2e-10));
  ASSERT_EQ(output.losses.size(), 1u);
  EXPECT_EQ(output.losses[0].name, "entropy_loss");
  EXPECT_NEAR(output.losses[0].raw.item<double>(), 1.8905598098, 1e-9);
  EXPECT_NEAR(output.losses[0].value.item<double>(), .5 * 1.8905598098, 1e-9);
  EXPECT_TRUE(output.global_losses.empty());
  EXPECT_FALSE(output.balance.score_sum.defined());
  EXPECT_EQ(output.stats.num_nodes, 6);
  EXPECT_EQ(output.stats.saturated_nodes, 2);
  EXPECT_EQ(output.stats.num_assignments, 4);
  EXPECT_EQ(output.stats.max_experts_per_token, 4);
  EXPECT_EQ(output.stats.removed_weight, 0);
  const Tensor g = output.routing.weights.detach();
  EXPECT_NEAR(output.stats.entropy_sum, -(g * g.log()).sum().item<double>(), 1e-6);
}

TEST(CometGate, EqualsReference) {
  const int64_t T = 37, D = 6;
  for (int64_t E = 1; E <= 17; ++E) {
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 3)}) {
      for (const double gamma : {.3, 1., 4.}) {
        if (E == 1 && gamma != 1) continue;
        const auto gate = random_gate(CometGateOptions(D, E).top_k(K).gamma(gamma));
        const Tensor tokens = random_tensor({T, D}, 1);
        const GateOutput output = gate->forward(input_of(tokens));
        EXPECT_NO_THROW(gates::validate(output.routing, E, "test"));
        EXPECT_TRUE(close_to(dense(output, E).sum(1), at::ones({T}, at::kDouble), 1e-14));
        if (E == 1) continue;
        const Tensor splits = at::linear(tokens, gate->split_weight, gate->split_bias);
        const Tensor leaves = at::linear(tokens, gate->leaf_weight, gate->leaf_bias);
        const auto expected =
            reference_comet(splits.view({T, K, E - 1}), leaves.view({T, K, E}), gamma);
        EXPECT_TRUE(close_to(dense(output, E), expected.weights, 1e-13)) << E << " " << K;
        EXPECT_TRUE(close_to(output.losses[0].raw * T, expected.entropy_sum, 1e-13)) << E;
        EXPECT_TRUE(at::equal(dense(output, E).eq(0), expected.weights.eq(0))) << E << " " << K;
      }
    }
  }
}

TEST(CometGate, AtMostK) {
  for (const int64_t E : {2, 5, 8}) {
    for (int64_t K = 1; K <= std::min<int64_t>(E, 4); ++K) {
      CometGateOptions options = CometGateOptions(6, E).top_k(K).gamma(1e-5);
      const GateInput input = input_of(random_tensor({37, 6}, 1));
      const GateOutput soft = random_gate(options)->forward(input);
      EXPECT_EQ(soft.stats.saturated_nodes, soft.stats.num_nodes);
      EXPECT_GE(soft.stats.num_nodes, 37 * K * int64_t(std::log2(E)));
      EXPECT_LE(soft.stats.num_nodes, 37 * K * int64_t(std::ceil(std::log2(E))));
      EXPECT_LE(soft.stats.max_experts_per_token, K);
      EXPECT_LE(std::abs(soft.losses[0].raw.item<double>()), 1e-6 * double(K * E));
      const GateOutput hard = random_gate(options.hard_eval(true))->forward(input);
      EXPECT_TRUE(same_bits(hard.routing.expert_idx, soft.routing.expert_idx));
      EXPECT_TRUE(same_bits(hard.routing.weights, soft.routing.weights));
      EXPECT_TRUE(same_bits(hard.losses[0].value, soft.losses[0].value));
    }
  }
}

TEST(CometGate, HardEval) {
  const CometGateOptions options = CometGateOptions(6, 8).hard_eval(true).gamma(10);
  const auto gate = random_gate(options);
  GateInput input = input_of(random_tensor({37, 6}, 1));
  const GateOutput hard = gate->forward(input);
  EXPECT_LE(hard.stats.max_experts_per_token, 2);
  EXPECT_EQ(hard.stats.saturated_nodes, 0);
  EXPECT_TRUE(close_to(dense(hard, 8).sum(1), at::ones({37}, at::kDouble), 1e-15));
  input.training = true;
  EXPECT_EQ(gate->forward(input).stats.num_assignments, 37 * 8);
}

TEST(CometGate, MinWeight) {
  const GateInput input = input_of(random_tensor({37, 6}, 1));
  const CometGateOptions options = CometGateOptions(6, 8).gamma(4);
  const Tensor full = dense(random_gate(options)->forward(input), 8);
  const GateOutput cut = random_gate(CometGateOptions(options).min_weight(.1))->forward(input);
  const Tensor kept = full.ge(.1);
  EXPECT_TRUE(same_bits(dense(cut, 8), full.masked_fill(kept.logical_not(), 0)));
  const double removed = full.masked_fill(kept, 0).sum().item<double>();
  EXPECT_GT(removed, 1);
  EXPECT_NEAR(cut.stats.removed_weight, removed, 1e-13);
}

TEST(CometGate, Start) {
  CometGate gate(CometGateOptions(512, 16));
  const GateOutput output = gate.forward(input_of(random_tensor({37, 512}, 1, -3, 3, at::kFloat)));
  EXPECT_EQ(output.stats.num_assignments, 37 * 16);
  EXPECT_LT(output.routing.weights.sub(1. / 16).abs().max().item<float>(), .02f);
  EXPECT_EQ(output.stats.saturated_nodes, 0);
  EXPECT_LE(gate.split_weight.abs().max().item<float>(), .01f);
  EXPECT_LE(gate.leaf_weight.abs().max().item<float>(), .05f);
  EXPECT_GT(gate.leaf_weight.abs().max().item<float>(), .049f);
  EXPECT_EQ(gate.split_weight.sizes(), at::IntArrayRef({30, 512}));
  EXPECT_EQ(gate.leaf_weight.sizes(), at::IntArrayRef({32, 512}));
  EXPECT_EQ(gate.parameters().size(), 4u);
  EXPECT_TRUE(same_bits(gate.leaf_weight, CometGate(CometGateOptions(512, 16)).leaf_weight));
  for (const auto& other :
       {CometGateOptions(512, 16).seed(1), CometGateOptions(512, 16).layer_id(1),
        CometGateOptions(512, 16).gate_id(1)}) {
    EXPECT_FALSE(at::equal(gate.leaf_weight, CometGate(other).leaf_weight));
    EXPECT_FALSE(at::equal(gate.split_bias, CometGate(other).split_bias));
  }
  EXPECT_LE(CometGate(CometGateOptions(512, 16).gamma(.1)).split_weight.abs().max().item<float>(),
            .001f);
}

TEST(CometGate, Static) {
  const CometGateOptions options = CometGateOptions(1, 4).balance_coeff(.2);
  const auto one = std::make_shared<CometGate>(CometGateOptions(options).per_token(false));
  one->to(at::kDouble);
  EXPECT_EQ(one->parameters().size(), 2u);
  EXPECT_EQ(one->split_bias.numel() + one->leaf_bias.numel(), 2 * (2 * 4 - 1));
  one->split_bias.set_data(vector_of(kGoldenSplits));
  one->leaf_bias.set_data(vector_of(kGoldenLeaves));
  const auto each = golden_gate(options);
  const Tensor valid = at::arange(37, at::kLong).remainder(3).ne(1);
  const Tensor cotangent = random_tensor({37, 4}, 3);
  std::vector<GateOutput> outputs;
  for (const auto& gate : {each, one}) {
    outputs.push_back(gate->forward(input_of(at::ones({37, 1}, at::kDouble), valid)));
    ((dense(outputs.back(), 4) * cotangent).sum() + outputs.back().losses[0].value +
     global_loss(outputs.back()))
        .backward();
  }
  EXPECT_TRUE(same_bits(outputs[1].routing.weights, outputs[0].routing.weights));
  EXPECT_TRUE(same_bits(outputs[1].routing.expert_idx, outputs[0].routing.expert_idx));
  EXPECT_TRUE(close_to(outputs[1].losses[0].value, outputs[0].losses[0].value, 1e-14));
  EXPECT_TRUE(close_to(one->split_bias.grad(), each->split_bias.grad(), 1e-13));
  EXPECT_TRUE(close_to(one->leaf_bias.grad(), each->leaf_bias.grad(), 1e-13));
  EXPECT_EQ(outputs[1].stats.num_nodes, outputs[0].stats.num_nodes);
  EXPECT_EQ(outputs[1].stats.saturated_nodes, outputs[0].stats.saturated_nodes);
}

TEST(CometGate, Schedule) {
  const auto gate =
      golden_gate(CometGateOptions(1, 4).entropy_coeff(.5).entropy_schedule({/*ramp_until=*/.4}));
  GateInput input = one_token();
  for (const auto& [progress, factor] :
       {std::pair{0., 0.}, {.1, .25}, {.4, 1.}, {.9, 1.}, {2., 1.}, {-1., 0.}}) {
    input.progress = progress;
    const auto losses = gate->forward(input).losses;
    EXPECT_NEAR(losses[0].value.item<double>(), .5 * factor * 1.8905598098, 1e-9) << progress;
    EXPECT_NEAR(losses[0].raw.item<double>(), 1.8905598098, 1e-9) << progress;
  }
  EXPECT_TRUE(golden_gate(CometGateOptions(1, 4).entropy_coeff(0))->forward(input).losses.empty());
}

TEST(CometGate, BatchesAdd) {
  const Tensor tokens = random_tensor({37, 6}, 1), cotangent = random_tensor({37, 5}, 3);
  struct Total {
    Tensor weights, loss, gradient;
  };
  const auto run = [&](const std::vector<int64_t>& sizes) {
    const auto gate = random_gate(CometGateOptions(6, 5));
    std::vector<Tensor> weights;
    Tensor loss = at::zeros({}, at::kDouble);
    int64_t first = 0;
    for (const int64_t size : sizes) {
      GateInput input = input_of(tokens.narrow(0, first, size));
      input.tokens_global = 37;
      const GateOutput output = gate->forward(input);
      weights.push_back(dense(output, 5));
      loss = loss + output.losses[0].value;
      first += size;
    }
    const Tensor all = at::cat(weights);
    (loss + (all * cotangent).sum()).backward();
    return Total{all.detach(), loss.detach(), gate->split_weight.grad()};
  };
  const Total one = run({37}), three = run({20, 0, 17});
  EXPECT_TRUE(same_bits(three.weights, one.weights));
  EXPECT_TRUE(close_to(three.loss, one.loss, 1e-14));
  EXPECT_TRUE(close_to(three.gradient, one.gradient, 1e-14));
}

TEST(CometGate, SaveAndLoad) {
  const auto first = std::make_shared<CometGate>(CometGateOptions(6, 5).seed(3));
  const auto second = std::make_shared<CometGate>(CometGateOptions(6, 5).seed(4));
  const GateInput input = input_of(random_tensor({7, 6}, 1, -1, 1, at::kFloat));
  std::stringstream file;
  torch::serialize::OutputArchive saved;
  first->save(saved);
  saved.save_to(file);
  torch::serialize::InputArchive loaded;
  loaded.load_from(file);
  second->load(loaded);
  EXPECT_TRUE(
      same_bits(second->forward(input).routing.weights, first->forward(input).routing.weights));
}

}  // namespace
}  // namespace perseid::testing
