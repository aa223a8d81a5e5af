// The DSelect-k gate: values and statistics. Formulas are proven in tests/kernels.
//   Contract          empty and padded batches, batches add, purity, threads: gate_contract.h
//   Golden            E = 4 and E = 3, K = 2: weights, order of the row, losses and raw values,
//   1e-9 EqualsReference   every E = 2 .. 17: weights and losses of plain operations; Sigma g = 1
//   if E is
//                     a power of two, or with renormalize
//   Gamma             changes the forward
//   AtMostK           saturated switches: at most K pairs per token, hard_eval the same bits
//   ReportsActive     open switches: more than K pairs, reported; hard_eval, outside training, K
//   MinWeight         pairs below it are gone, the mass is reported, others keep their bits
//   Start             near uniform, all experts; equal by seed, layer and gate, else different
//   Static            equals a per-token gate with the same logits, K(bits + 1) parameters
//   Schedule          of the entropy coefficient, progress clamped
//   Reductions        entropy as mean or sum, penalty always as mean over tokens_global
//   Unreachable       all mass on codes without an expert: no expert, finite penalty
//   SaveAndLoad       same bits after a round trip
#include <torch/serialize.h>

#include <cmath>
#include <sstream>

#include "tests/gates/dselect_k_fixture.h"
#include "tests/gates/gate_contract.h"

namespace perseid::testing {
namespace {

using gates::EntropyReduction;

const std::vector<double> kGoldenCodes = {.25, -.1, .6, 0};
const std::vector<double> kGoldenSelectors = {.3, -.2};

std::shared_ptr<DSelectKGate> golden_gate(const DSelectKGateOptions& options) {
  return gate_with_logits(options, kGoldenCodes, kGoldenSelectors);
}

double golden_entropy(int64_t num_experts) {
  double sum = 0;
  const std::vector<std::vector<double>> reach = {{.10125, .055, .54675, .297}, {0, 0, .5, .5}};
  for (const auto& r : reach) {
    for (size_t j = 0; j < static_cast<size_t>(num_experts); ++j) {
      sum -= r[j] * std::log(r[j] + 1e-6);
    }
  }
  return sum;
}

TEST(DSelectKGate, Contract) {
  for (const double gamma : {1., 5.}) {
    for (const bool renormalize : {false, true}) {
      expect_gate_contract([&] {
        return random_gate(
            DSelectKGateOptions(kWidth, 8).gamma(gamma).balance_coeff(.2).renormalize(renormalize),
            .5, at::kFloat, InputNorm::kLayerNorm);
      });
    }
  }
}

TEST(DSelectKGate, Golden) {
  const GateOutput output =
      golden_gate(DSelectKGateOptions(1, 4).entropy_coeff(.5))->forward(one_token());
  EXPECT_NO_THROW(gates::validate(output.routing, 4, "test"));
  EXPECT_EQ(ids_of(output.routing.expert_idx), (std::vector<int64_t>{2, 3, 0, 1}));
  EXPECT_TRUE(close_to(dense(output, 4).reshape({-1}),
                       vector_of({.0630240073, .0342352632, .5290999737, .3736407558}), 2e-10));
  ASSERT_EQ(output.losses.size(), 1u);  // no code is without an expert
  EXPECT_EQ(output.losses[0].name, "entropy_loss");
  EXPECT_NEAR(output.losses[0].raw.item<double>(), golden_entropy(4), 1e-12);
  EXPECT_NEAR(output.losses[0].value.item<double>(), .5 * golden_entropy(4), 1e-12);
  EXPECT_TRUE(output.global_losses.empty());
  EXPECT_FALSE(output.balance.score_sum.defined());
  EXPECT_EQ(output.stats.num_nodes, 4);
  EXPECT_EQ(output.stats.saturated_nodes, 1);
  EXPECT_EQ(output.stats.num_assignments, 4);
  EXPECT_EQ(output.stats.removed_weight, 0);

  const GateOutput three =
      golden_gate(DSelectKGateOptions(1, 3).penalty_coeff(2))->forward(one_token());
  EXPECT_TRUE(close_to(dense(three, 3).reshape({-1}),
                       vector_of({.0630240073, .0342352632, .5290999737}), 2e-10));
  EXPECT_NEAR(dense(three, 3).sum().item<double>(), .6263592442, 1e-9);
  ASSERT_EQ(three.losses.size(), 2u);
  EXPECT_NEAR(three.losses[0].raw.item<double>(), golden_entropy(3), 1e-12);
  EXPECT_EQ(three.losses[1].name, "penalty_loss");
  EXPECT_NEAR(three.losses[1].raw.item<double>(), 3.4224751067, 1e-5);  // without epsilon
  EXPECT_NEAR(three.losses[1].raw.item<double>(), 1 / (.703 + 1e-6) + 1 / (.5 + 1e-6), 1e-12);
  EXPECT_NEAR(three.losses[1].value.item<double>(), 2 * three.losses[1].raw.item<double>(), 1e-12);
}

TEST(DSelectKGate, EqualsReference) {
  const int64_t T = 37, D = 6;
  for (int64_t E = 2; E <= 17; ++E) {
    const bool is_power = (E & (E - 1)) == 0;
    for (const int64_t K : {int64_t{1}, std::min<int64_t>(E, 3)}) {
      for (const double gamma : {.3, 1., 4.}) {
        const DSelectKGateOptions options = DSelectKGateOptions(D, E).top_k(K).gamma(gamma);
        const auto gate = random_gate(options);
        const Tensor tokens = random_tensor({T, D}, 1);
        const GateOutput output = gate->forward(input_of(tokens));
        EXPECT_NO_THROW(gates::validate(output.routing, E, "test"));
        const auto expected = reference_of(*gate, tokens);
        EXPECT_TRUE(close_to(dense(output, E), expected.weights, 1e-13)) << E << " " << K;
        EXPECT_TRUE(at::equal(dense(output, E).eq(0), expected.weights.eq(0))) << E << " " << K;
        EXPECT_TRUE(close_to(output.losses[0].raw * T, expected.entropy_sum, 1e-13)) << E;
        ASSERT_EQ(output.losses.size(), is_power ? 1u : 2u) << E;
        if (is_power) {
          EXPECT_TRUE(close_to(dense(output, E).sum(1), at::ones({T}, at::kDouble), 1e-14));
        } else {
          EXPECT_TRUE(close_to(output.losses[1].raw * T, expected.penalty_sum, 1e-12)) << E;
        }
        const auto renormalized = random_gate(DSelectKGateOptions(options).renormalize(true));
        const Tensor sum = expected.weights.sum(1, true);
        EXPECT_TRUE(close_to(dense(renormalized->forward(input_of(tokens)), E),
                             expected.weights / sum.where(sum.gt(0), at::ones_like(sum)), 1e-12));
      }
    }
  }
}

TEST(DSelectKGate, Gamma) {
  const GateInput input = input_of(random_tensor({37, 6}, 1));
  std::vector<Tensor> weights;
  for (const double gamma : {.1, 1., 10.}) {
    weights.push_back(
        dense(random_gate(DSelectKGateOptions(6, 8).gamma(gamma))->forward(input), 8));
  }
  EXPECT_GT((weights[0] - weights[1]).abs().max().item<double>(), .1);
  EXPECT_GT((weights[1] - weights[2]).abs().max().item<double>(), .1);
}

TEST(DSelectKGate, AtMostK) {
  for (const int64_t E : {2, 5, 8}) {
    for (int64_t K = 1; K <= std::min<int64_t>(E, 4); ++K) {
      DSelectKGateOptions options = DSelectKGateOptions(6, E).top_k(K).gamma(1e-5);
      const GateInput input = input_of(random_tensor({37, 6}, 1));
      const GateOutput soft = random_gate(options)->forward(input);
      EXPECT_EQ(soft.stats.num_nodes, 37 * K * kernels::dselect_k_bits(E));
      EXPECT_EQ(soft.stats.saturated_nodes, soft.stats.num_nodes);
      EXPECT_LE(soft.stats.max_experts_per_token, K);
      EXPECT_LE(std::abs(soft.losses[0].raw.item<double>()), 1e-6 * double(K * E));
      const GateOutput hard = random_gate(options.hard_eval(true))->forward(input);
      EXPECT_TRUE(same_bits(hard.routing.expert_idx, soft.routing.expert_idx));
      EXPECT_TRUE(same_bits(hard.routing.weights, soft.routing.weights));
      EXPECT_TRUE(same_bits(hard.losses[0].value, soft.losses[0].value));
    }
  }
}

TEST(DSelectKGate, ReportsActive) {
  const DSelectKGateOptions options = DSelectKGateOptions(6, 8).hard_eval(true).gamma(10);
  const auto gate = random_gate(options);
  GateInput input = input_of(random_tensor({37, 6}, 1));
  const GateOutput hard = gate->forward(input);
  EXPECT_LE(hard.stats.max_experts_per_token, 2);
  EXPECT_EQ(hard.stats.saturated_nodes, 0);
  EXPECT_TRUE(close_to(dense(hard, 8).sum(1), at::ones({37}, at::kDouble), 1e-15));
  input.training = true;
  const GateOutput soft = gate->forward(input);
  EXPECT_EQ(soft.stats.num_assignments, 37 * 8);
  EXPECT_EQ(soft.stats.max_experts_per_token, 8);
}

TEST(DSelectKGate, MinWeight) {
  const GateInput input = input_of(random_tensor({37, 6}, 1));
  const DSelectKGateOptions options = DSelectKGateOptions(6, 8).gamma(4);
  const Tensor full = dense(random_gate(options)->forward(input), 8);
  const GateOutput cut = random_gate(DSelectKGateOptions(options).min_weight(.1))->forward(input);
  const Tensor kept = full.ge(.1);
  EXPECT_TRUE(same_bits(dense(cut, 8), full.masked_fill(kept.logical_not(), 0)));
  const double removed = full.masked_fill(kept, 0).sum().item<double>();
  EXPECT_GT(removed, 1);
  EXPECT_NEAR(cut.stats.removed_weight, removed, 1e-13);
}

TEST(DSelectKGate, Start) {
  DSelectKGate gate(DSelectKGateOptions(512, 16));
  const GateOutput output = gate.forward(input_of(random_tensor({37, 512}, 1, -3, 3, at::kFloat)));
  EXPECT_EQ(output.stats.num_assignments, 37 * 16);
  EXPECT_LT(output.routing.weights.sub(1. / 16).abs().max().item<float>(), .02f);
  EXPECT_EQ(output.stats.saturated_nodes, 0);
  EXPECT_LE(gate.code_weight.abs().max().item<float>(), .01f);
  EXPECT_LE(gate.selector_weight.abs().max().item<float>(), .05f);
  EXPECT_GT(gate.selector_weight.abs().max().item<float>(), .049f);
  EXPECT_EQ(gate.code_weight.sizes(), at::IntArrayRef({8, 512}));
  EXPECT_EQ(gate.selector_weight.sizes(), at::IntArrayRef({2, 512}));
  EXPECT_EQ(gate.parameters().size(), 4u);
  EXPECT_TRUE(same_bits(gate.code_weight, DSelectKGate(DSelectKGateOptions(512, 16)).code_weight));
  for (const auto& other :
       {DSelectKGateOptions(512, 16).seed(1), DSelectKGateOptions(512, 16).layer_id(1),
        DSelectKGateOptions(512, 16).gate_id(1)}) {
    EXPECT_FALSE(at::equal(gate.code_weight, DSelectKGate(other).code_weight));
    EXPECT_FALSE(at::equal(gate.selector_bias, DSelectKGate(other).selector_bias));
  }
  EXPECT_LE(
      DSelectKGate(DSelectKGateOptions(512, 16).gamma(.1)).code_weight.abs().max().item<float>(),
      .001f);
}

TEST(DSelectKGate, Static) {
  for (const int64_t E : {4, 3}) {
    const DSelectKGateOptions options = DSelectKGateOptions(1, E).balance_coeff(.2);
    const auto one = std::make_shared<DSelectKGate>(DSelectKGateOptions(options).per_token(false));
    one->to(at::kDouble);
    EXPECT_EQ(one->parameters().size(), 2u);
    EXPECT_EQ(one->code_bias.numel() + one->selector_bias.numel(), 2 * (2 + 1));
    one->code_bias.set_data(vector_of(kGoldenCodes));
    one->selector_bias.set_data(vector_of(kGoldenSelectors));
    const auto each = golden_gate(options);
    const Tensor valid = at::arange(37, at::kLong).remainder(3).ne(1);
    const Tensor cotangent = random_tensor({37, E}, 3);
    std::vector<GateOutput> outputs;
    for (const auto& gate : {each, one}) {
      outputs.push_back(gate->forward(input_of(at::ones({37, 1}, at::kDouble), valid)));
      Tensor loss = (dense(outputs.back(), E) * cotangent).sum() + global_loss(outputs.back());
      for (const auto& part : outputs.back().losses) loss = loss + part.value;
      loss.backward();
    }
    EXPECT_TRUE(same_bits(outputs[1].routing.weights, outputs[0].routing.weights));
    EXPECT_TRUE(same_bits(outputs[1].routing.expert_idx, outputs[0].routing.expert_idx));
    ASSERT_EQ(outputs[1].losses.size(), outputs[0].losses.size());
    for (size_t i = 0; i < outputs[0].losses.size(); ++i) {
      EXPECT_TRUE(close_to(outputs[1].losses[i].value, outputs[0].losses[i].value, 1e-14));
    }
    EXPECT_TRUE(close_to(one->code_bias.grad(), each->code_bias.grad(), 1e-13));
    EXPECT_TRUE(close_to(one->selector_bias.grad(), each->selector_bias.grad(), 1e-13));
    EXPECT_EQ(outputs[1].stats.num_nodes, outputs[0].stats.num_nodes);
    EXPECT_EQ(outputs[1].stats.saturated_nodes, outputs[0].stats.saturated_nodes);
  }
}

TEST(DSelectKGate, Schedule) {
  const auto gate = golden_gate(
      DSelectKGateOptions(1, 3).entropy_coeff(.5).entropy_schedule({/*ramp_until=*/.4}));
  GateInput input = one_token();
  for (const auto& [progress, factor] :
       {std::pair{0., 0.}, {.1, .25}, {.4, 1.}, {.9, 1.}, {2., 1.}, {-1., 0.}}) {
    input.progress = progress;
    const auto losses = gate->forward(input).losses;
    EXPECT_NEAR(losses[0].value.item<double>(), .5 * factor * golden_entropy(3), 1e-12) << progress;
    EXPECT_NEAR(losses[0].raw.item<double>(), golden_entropy(3), 1e-12) << progress;
    EXPECT_NEAR(losses[1].value.item<double>(), 3.4224751067, 1e-5) << progress;
  }
  const auto none = golden_gate(DSelectKGateOptions(1, 3).entropy_coeff(0).penalty_coeff(0));
  EXPECT_TRUE(none->forward(input).losses.empty());
}

TEST(DSelectKGate, Reductions) {
  for (const auto reduction : {EntropyReduction::kMean, EntropyReduction::kSum}) {
    const auto gate =
        golden_gate(DSelectKGateOptions(1, 3).entropy_coeff(.5).entropy_reduction(reduction));
    GateInput input = input_of(at::ones({10, 1}, at::kDouble));
    input.tokens_global = 40;
    const double share = reduction == EntropyReduction::kMean ? .25 : 10;
    const auto losses = gate->forward(input).losses;
    EXPECT_NEAR(losses[0].raw.item<double>(), share * golden_entropy(3), 1e-12);
    EXPECT_NEAR(losses[0].value.item<double>(), .5 * share * golden_entropy(3), 1e-12);
    EXPECT_NEAR(losses[1].value.item<double>(), .25 * 3.4224751067, 1e-5);
  }
}

TEST(DSelectKGate, Unreachable) {
  for (const bool renormalize : {false, true}) {
    const auto gate =
        gate_with_logits(DSelectKGateOptions(1, 3).renormalize(renormalize), {1, 1, 1, 1}, {0, 0});
    const GateOutput output = gate->forward(one_token());
    EXPECT_EQ(output.stats.num_assignments, 0);
    EXPECT_EQ(output.stats.tokens_without_expert, 1);
    EXPECT_NEAR(output.losses[1].raw.item<double>(), 2e6, 1e-6);
    (output.losses[0].value + output.losses[1].value + output.routing.weights.sum()).backward();
    EXPECT_TRUE(same_bits(gate->code_bias.grad(), at::zeros({4}, at::kDouble)));
    EXPECT_TRUE(same_bits(gate->selector_bias.grad(), at::zeros({2}, at::kDouble)));
  }
}

TEST(DSelectKGate, SaveAndLoad) {
  const auto first = std::make_shared<DSelectKGate>(DSelectKGateOptions(6, 5).seed(3));
  const auto second = std::make_shared<DSelectKGate>(DSelectKGateOptions(6, 5).seed(4));
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
