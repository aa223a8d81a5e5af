// Options of the top-k gate beyond the plain router.
//   SqrtSoftplus       weights of the formula, K = 1 has a gradient
//   Groups             experts of the best groups only, gradient against central differences
//   Jitter             in training only, keyed by token: batches add; the gradient is through it
//   SequenceLoss       equals the sum of the losses of each sequence alone; gradient; padding
//   BalanceLoss        is balance_entropy_loss of the importance, with its gradient
//   Statistics         equal those counted from the routing
//   Warns...           of weights without a gradient, once and only of these
#include <c10/util/Exception.h>

#include <cmath>

#include "tests/gates/gate_test.h"
#include "tests/gradcheck.h"
#include "tests/warnings.h"

namespace perseid::testing {
namespace {

using gates::AuxScope;

TEST(TopKOptions, SqrtSoftplus) {
  const auto score = [](double z) { return std::sqrt(std::log1p(std::exp(z))); };
  TopKGateOptions options(1, 4);
  options.score_function(ScoreFunction::kSqrtSoftplus);
  const auto weights = [&](int64_t top_k) {
    const auto gate = gate_with_logits(options.top_k(top_k), {1, 2, .5, -1});
    return gates::dense_weights(gate->forward(one_token()).routing, 4).reshape({-1});
  };
  const double sum = score(1) + score(2);
  EXPECT_TRUE(close_to(weights(2), vector_of({score(1) / sum, score(2) / sum, 0, 0}), 1e-14));
  EXPECT_TRUE(close_to(weights(1), vector_of({0, score(2), 0, 0}), 1e-14));
  const auto gate =
      float64_gate(TopKGateOptions(6, 8).top_k(1).score_function(ScoreFunction::kSqrtSoftplus));
  gate->forward(input_of(random_tensor({37, 6}, 1))).routing.weights.sum().backward();
  EXPECT_GT(gate->weight.grad().abs().max().item<double>(), 1e-3);
}

TEST(TopKOptions, Groups) {
  const Tensor tokens = random_tensor({37, 6}, 1, -2, 2);
  for (const auto score : kScoreFunctions) {
    TopKGateOptions options = TopKGateOptions(6, 12).top_k(3).num_groups(4).topk_groups(2);
    options.score_function(score).z_loss_coeff(.1).bias_update_rate(1e-3);
    const auto gate = float64_gate(options, random_tensor({12, 6}, 2));
    gate->expert_bias.copy_(random_tensor({12}, 3, -.4, .2, at::kFloat));
    const GateOutput output = gate->forward(input_of(tokens));
    const Tensor groups = output.routing.expert_idx.view({37, 3}).to(at::kLong).div(3, "floor");
    for (int64_t t = 0; t < 37; ++t) {
      EXPECT_LE(std::get<0>(at::_unique(groups[t])).numel(), 2);
    }
    EXPECT_TRUE(gradients_match(
        [&] {
          const GateOutput out = gate->forward(input_of(tokens));
          return std::vector<Tensor>{out.routing.weights, aux_loss(out).value, out.losses[0].value};
        },
        {tokens, gate->weight}));
  }
}

TEST(TopKOptions, Jitter) {
  const Tensor tokens = random_tensor({37, 6}, 1, -2, 2);
  const TopKGateOptions options = TopKGateOptions(6, 8).jitter_eps(.1).seed(5).layer_id(1);
  const auto gate = float64_gate(options, random_tensor({8, 6}, 2));
  const auto weights = [&](int64_t first, int64_t count, bool training, int64_t step = 3) {
    GateInput input = input_of(tokens.narrow(0, first, count));
    input.first_token = first;
    input.training = training;
    input.step = step;
    return gates::dense_weights(gate->forward(input).routing, 8);
  };
  const Tensor plain =
      float64_gate(TopKGateOptions(6, 8), gate->weight)->forward(input_of(tokens)).routing.weights;
  EXPECT_TRUE(same_bits(gate->forward(input_of(tokens)).routing.weights, plain));
  const Tensor noisy = weights(0, 37, true);
  EXPECT_FALSE(close_to(noisy, weights(0, 37, false), 1e-4));
  EXPECT_TRUE(same_bits(weights(0, 37, true), noisy));
  EXPECT_TRUE(close_to(at::cat({weights(0, 20, true), weights(20, 17, true)}), noisy, 1e-15));
  EXPECT_FALSE(close_to(weights(0, 37, true, 4), noisy, 1e-4));
  // The logit of one token is its feature times the weight: the factors lie in the interval.
  TopKGateOptions one(1, 1);
  const auto single = float64_gate(one.top_k(1).jitter_eps(.1).z_loss_coeff(1), at::ones({1, 1}));
  double lowest = 2, highest = 0;
  for (int64_t step = 0; step < 200; ++step) {
    GateInput input = one_token();
    input.training = true;
    input.step = step;
    const double factor = std::sqrt(single->forward(input).losses[0].raw.item<double>());
    lowest = std::min(lowest, factor), highest = std::max(highest, factor);
  }
  EXPECT_GT(lowest, .9 - 1e-6);
  EXPECT_LT(lowest, .91);
  EXPECT_LT(highest, 1.1 + 1e-6);
  EXPECT_GT(highest, 1.09);
  EXPECT_TRUE(gradients_match(
      [&] {
        GateInput input = input_of(tokens);
        input.training = true;
        return std::vector<Tensor>{gate->forward(input).routing.weights};
      },
      {tokens, gate->weight}));
}

/// Gate with a loss per sequence.
std::shared_ptr<TopKGate> sequence_gate(ScoreFunction score, AuxScope scope) {
  TopKGateOptions options = TopKGateOptions(6, 8).top_k(2).aux_loss_coeff(.3).aux_scope(scope);
  return float64_gate(options.score_function(score), random_tensor({8, 6}, 2));
}

TEST(TopKOptions, SequenceLoss) {
  const Tensor tokens = random_tensor({37, 6}, 1, -2, 2);
  const Tensor sequence = at::arange(37, at::kLong).remainder(3).mul(1000000007).sub(5);
  const Tensor valid = at::arange(37, at::kLong).remainder(5).ne(2);
  for (const auto score : kScoreFunctions) {
    const auto gate = sequence_gate(score, AuxScope::kSequence);
    const auto alone = sequence_gate(score, AuxScope::kStep);
    for (const bool is_masked : {false, true}) {
      GateInput input = input_of(tokens.clone());
      input.sequence = sequence;
      input.tokens_global = 50;  // other ranks hold the rest
      if (is_masked) {
        input.valid = valid;
        input.tokens.index_put_({valid.logical_not()}, NAN);
      }
      Tensor expected = at::zeros({}, at::kDouble);
      for (int64_t s = 0; s < 3; ++s) {
        Tensor members = sequence.eq(s * 1000000007 - 5);
        if (is_masked) members = members.logical_and(valid);
        const GateOutput part = alone->forward(input_of(tokens.index({members})));
        expected = expected + aux_loss(part).value * double(part.stats.num_tokens) / 50.;
      }
      const GateOutput output = gate->forward(input);
      ASSERT_EQ(output.losses.size(), 1u);
      EXPECT_EQ(output.losses[0].name, "aux_loss");
      EXPECT_FALSE(output.balance.score_sum.defined());
      EXPECT_TRUE(close_to(output.losses[0].value, expected, 1e-14));
      EXPECT_TRUE(close_to(output.losses[0].raw * .3, expected, 1e-14));
      output.losses[0].value.backward();
      expected.backward();
      EXPECT_TRUE(close_to(gate->weight.grad(), alone->weight.grad(), 1e-13));
      gate->weight.mutable_grad() = Tensor();
      alone->weight.mutable_grad() = Tensor();
    }
    EXPECT_TRUE(gradients_match(
        [&] {
          GateInput input = input_of(tokens);
          input.sequence = sequence;
          const GateOutput out = gate->forward(input);
          return std::vector<Tensor>{out.losses[0].value, out.routing.weights};
        },
        {tokens, gate->weight}));
  }
}

TEST(TopKOptions, SequenceLossOfNothing) {
  const auto gate = sequence_gate(ScoreFunction::kSoftmax, AuxScope::kSequence);
  for (const bool is_masked : {false, true}) {
    const int64_t T = is_masked ? 4 : 0;
    GateInput input = input_of(at::zeros({T, 6}, at::kDouble));
    input.sequence = at::zeros({T}, at::kLong);
    if (is_masked) input.valid = at::zeros({T}, at::kBool);
    const GateOutput output = gate->forward(input);
    EXPECT_EQ(output.losses[0].value.item<double>(), 0);
    output.losses[0].value.backward();
    EXPECT_TRUE(same_bits(gate->weight.grad(), at::zeros({8, 6}, at::kDouble)));
  }
}

TEST(TopKOptions, BalanceLoss) {
  const Tensor tokens = random_tensor({37, 6}, 1, -2, 2);
  const auto gate =
      float64_gate(TopKGateOptions(6, 8).top_k(2).balance_coeff(.4), random_tensor({8, 6}, 2));
  const auto loss_of = [&] {
    const GateOutput output = gate->forward(input_of(tokens));
    const gates::GlobalLoss& loss = output.global_losses.at(0);
    return gates::finish_global_loss(loss, loss.local_sum, 37, 1);
  };
  const GateOutput output = gate->forward(input_of(tokens));
  const Tensor p = gates::dense_weights(output.routing, 8).sum(0) / 37;
  EXPECT_TRUE(close_to(loss_of().value, .4 * (p * p.log()).sum(), 1e-13));
  EXPECT_EQ(loss_of().name, "balance_loss");
  EXPECT_TRUE(gradients_match([&] { return std::vector<Tensor>{loss_of().value}; },
                              {tokens, gate->weight}));
}

TEST(TopKOptions, Statistics) {
  const Tensor tokens = random_tensor({37, 6}, 1, -2, 2, at::kFloat);
  const Tensor valid = at::arange(37, at::kLong).remainder(5).ne(2);
  for (const int64_t K : {1, 2, 8}) {
    for (const auto score : kScoreFunctions) {
      for (const bool is_masked : {false, true}) {
        TopKGate gate(TopKGateOptions(6, 8).top_k(K).score_function(score));
        GateInput input = input_of(tokens);
        if (is_masked) input.valid = valid;
        const GateOutput output = gate.forward(input);
        const auto counted = gates::count_assignments(output.routing, 8, output.stats.num_tokens);
        EXPECT_EQ(output.stats.num_assignments, counted.num_assignments);
        EXPECT_EQ(output.stats.tokens_without_expert, 0);
        EXPECT_EQ(output.stats.tokens_with_one_expert, counted.tokens_with_one_expert);
        EXPECT_EQ(output.stats.max_experts_per_token, counted.max_experts_per_token);
        EXPECT_NEAR(output.stats.entropy_sum, counted.entropy_sum, 1e-4);
        EXPECT_TRUE(same_bits(output.stats.tokens_per_expert, counted.tokens_per_expert));
      }
    }
  }
}

TEST(TopKOptions, WarnsOfConstantWeights) {
  Warnings warnings;
  TopKGate(TopKGateOptions(4, 8).top_k(1));
  TopKGate(TopKGateOptions(4, 8).top_k(1).normalization(Normalization::kAll));
  TopKGate(TopKGateOptions(4, 8).top_k(2).normalization(Normalization::kSelected));
  EXPECT_TRUE(warnings.texts.empty());
  for (const kernels::ScoreFunction score : kScoreFunctions) {
    TopKGate(TopKGateOptions(4, 8).top_k(1).score_function(score).normalization(
        Normalization::kSelected));
    ASSERT_EQ(warnings.texts.size(), 1u);
    EXPECT_NE(warnings.texts[0].find("[top_k_gate] top_k=1 with normalization=selected"),
              std::string::npos);
    warnings.texts.clear();
  }
}

}  // namespace
}  // namespace perseid::testing
