// BASE: balanced assignment in training, the best expert else; alpha f(x) + (1 - alpha) x.
//   Contract         empty and padded batches, whole groups add, purity, threads: gate_contract.h
//   Balanced         in training each group's loads differ by at most 1 and the sum of scores is
//   that
//                    of kernels::assign_balanced_reference; evaluation: the best score, smaller id
//   Weights          sigmoid of the chosen score; the residual weight is the rest, 0 for padding
//   Gradients        central differences, 1e-7, of weight and residual weight
//   InitialWeight    orthogonal rows (columns for E > D) of length init_gain; the same for a seed
//   NonFinite        a NaN touches its token alone; the balance stays
//   Edges            E = 1, fewer tokens than experts
#include "gates/base_gate.h"

#include <algorithm>
#include <cmath>

#include "kernels/assignment.h"
#include "tests/gates/gate_contract.h"

namespace perseid::testing {
namespace {

using gates::BaseGate;
using gates::BaseGateOptions;
using kernels::AssignmentShape;

std::shared_ptr<BaseGate> make_gate(const BaseGateOptions& options,
                                    at::ScalarType type = at::kDouble) {
  auto gate = std::make_shared<BaseGate>(options);
  gate->to(type);
  gate->weight.set_data(random_tensor(gate->weight.sizes(), 2, -1, 1, type));
  return gate;
}
BaseGateOptions options_with(int64_t group_size) {
  return BaseGateOptions(kWidth, 8).group_size(group_size);
}

TEST(BaseGate, Contract) {
  expect_group_gate_contract(
      [](int64_t group_size) { return make_gate(options_with(group_size), at::kFloat); });
}

TEST(BaseGate, Balanced) {
  const int64_t T = 24, E = 3;
  const Tensor tokens = random_tensor({T, kWidth}, 1, -2, 2);
  const Tensor valid = random_tensor({T}, 8).gt(-.6);
  for (const int64_t group_size : {6, 8}) {
    const auto gate = make_gate(BaseGateOptions(kWidth, E).group_size(group_size));
    const Tensor scores = tokens.mm(gate->weight.t()).detach();
    GateInput input = training_input(tokens);
    input.valid = valid;
    const Tensor chosen = gates::dense_weights(gate->forward(input).routing, E).ne(0);
    EXPECT_TRUE(at::equal(chosen.sum(1).gt(0), valid));
    for (int64_t begin = 0; begin < T; begin += group_size) {
      const Tensor is_here = valid.narrow(0, begin, group_size);
      const Tensor rows = scores.narrow(0, begin, group_size).index({is_here}).contiguous();
      const Tensor picked = chosen.narrow(0, begin, group_size).index({is_here});
      const AssignmentShape shape{rows.size(0), E};
      std::vector<int32_t> expected(static_cast<size_t>(rows.size(0)));
      kernels::assign_balanced_reference(shape, kernels::DType::kFloat64, rows.const_data_ptr(),
                                         expected.data());
      EXPECT_EQ(ids_of(picked.to(at::kInt).argmax(1)),
                std::vector<int64_t>(expected.begin(), expected.end()))
          << begin;
    }
    input.training = false;
    const Tensor best = gates::dense_weights(gate->forward(input).routing, E).ne(0);
    EXPECT_TRUE(at::equal(best, scores.eq(scores.amax(1, true)).logical_and(valid.unsqueeze(1))));
  }
  // Skewed scores: evaluation follows them, training does not.
  const auto gate = make_gate(options_with(0));
  gate->weight.set_data(at::zeros({8, kWidth}, at::kDouble));
  GateInput input = training_input(tokens);
  EXPECT_EQ(ids_of(gate->forward(input).stats.tokens_per_expert), std::vector<int64_t>(8, 3));
  input.training = false;
  EXPECT_EQ(ids_of(gate->forward(input).routing.expert_idx), std::vector<int64_t>(24, 0));
}

TEST(BaseGate, Weights) {
  const auto gate = make_gate(options_with(0));
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  const Tensor valid = at::arange(37, at::kLong).remainder(5).ne(3);
  for (const bool training : {false, true}) {
    GateInput input = training_input(tokens);
    input.training = training;
    input.valid = valid;
    const GateOutput output = gate->forward(input);
    const Tensor weights = gates::dense_weights(output.routing, 8);
    const Tensor chosen = weights.detach().ne(0);
    EXPECT_TRUE(close_to(weights, tokens.mm(gate->weight.t()).sigmoid() * chosen, 1e-14));
    EXPECT_TRUE(close_to(output.residual_weight, valid * (1 - weights.sum(1)), 1e-14));
    EXPECT_TRUE(output.losses.empty());
    EXPECT_FALSE(output.balance.score_sum.defined());
  }
  // Far out 1 - alpha keeps its digits.
  const auto one = std::make_shared<BaseGate>(BaseGateOptions(1, 1));
  one->to(at::kDouble);
  one->weight.set_data(at::full({1, 1}, 50., at::kDouble));
  EXPECT_TRUE(close_to(one->forward(one_token()).residual_weight,
                       at::full({1}, std::exp(-50.), at::kDouble), 1e-14));
}

TEST(BaseGate, Gradients) {
  const Tensor valid = at::arange(12, at::kLong).remainder(5).ne(3);
  for (const bool training : {false, true}) {
    const auto gate = make_gate(options_with(6));
    const Tensor tokens = random_tensor({12, kWidth}, 1, -2, 2);
    GateInput input = training_input(tokens);
    input.training = training;
    input.valid = valid;
    for (const bool is_residual : {false, true}) {
      EXPECT_TRUE(gradients_match(
          [&]() -> std::vector<Tensor> {
            const GateOutput output = gate->forward(input);
            return {is_residual ? output.residual_weight : output.routing.weights};
          },
          {gate->weight, tokens}));
    }
  }
}

TEST(BaseGate, InitialWeight) {
  for (const auto& [E, D] : {std::pair<int64_t, int64_t>{5, 12}, {12, 5}, {7, 7}, {1, 1}}) {
    const auto weight_of = [E = E, D = D](uint64_t seed, double gain) {
      const BaseGate gate(BaseGateOptions(D, E).seed(seed).init_gain(gain));
      return gate.weight.detach().clone();
    };
    const Tensor weight = weight_of(1, .1);
    const Tensor exact = weight.to(at::kDouble);
    const Tensor product = E <= D ? exact.mm(exact.t()) : exact.t().mm(exact);
    EXPECT_TRUE(close_to(product, at::eye(std::min(E, D), at::kDouble) * .01, 1e-6));
    EXPECT_TRUE(same_bits(weight_of(1, .1), weight));
    EXPECT_TRUE(close_to(weight_of(1, 2), weight * 20, 1e-6));
    if (D > 1) {
      EXPECT_FALSE(at::equal(weight_of(2, .1), weight));
    }
  }
}

TEST(BaseGate, NonFinite) {
  const auto gate = make_gate(options_with(0));
  Tensor tokens = random_tensor({16, kWidth}, 1, -2, 2);
  tokens[5][1] = NAN;
  for (const bool training : {false, true}) {
    GateInput input = training_input(tokens);
    input.training = training;
    const GateOutput output = gate->forward(input);
    EXPECT_EQ(output.stats.non_finite_tokens, 1);
    EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
    const Tensor is_bad = at::arange(16, at::kLong).eq(5);
    EXPECT_TRUE(at::equal(output.routing.weights.isnan(), is_bad));
    EXPECT_TRUE(at::equal(output.residual_weight.isnan(), is_bad));
    if (training) {
      EXPECT_EQ(ids_of(output.stats.tokens_per_expert), std::vector<int64_t>(8, 2));
    } else {
      EXPECT_EQ(output.routing.expert_idx[5].item<int32_t>(), 0);
    }
  }
}

TEST(BaseGate, Edges) {
  const auto one = make_gate(BaseGateOptions(kWidth, 1));
  const auto output = one->forward(training_input(random_tensor({5, kWidth}, 1)));
  EXPECT_EQ(ids_of(output.routing.expert_idx), std::vector<int64_t>(5, 0));
  output.residual_weight.sum().backward();
  EXPECT_GT(one->weight.grad().abs().max().item<double>(), 0);
  // Fewer tokens than experts: each another one.
  const auto few =
      make_gate(options_with(0))->forward(training_input(random_tensor({5, kWidth}, 1)));
  EXPECT_EQ(few.stats.tokens_per_expert.max().item<int64_t>(), 1);
}

TEST(BaseGate, Errors) {
  const auto text = [](const BaseGateOptions& options) {
    return error_text<ConfigError>([&] { BaseGate gate(options); });
  };
  EXPECT_EQ(text(BaseGateOptions(0, 8)),
            "[base_gate] d_model=0 is below 1; give the width of the tokens");
  EXPECT_EQ(text(BaseGateOptions(4, 0)),
            "[base_gate] num_experts=0 is below 1; a gate needs an expert");
  EXPECT_EQ(text(BaseGateOptions(4, 8).group_size(-2)),
            "[base_gate] group_size=-2 is negative; choose 0 to make the tokens of each call one "
            "group");
  EXPECT_EQ(text(BaseGateOptions(4, 8).init_gain(0)),
            "[base_gate] init_gain=0 is not a finite number above 0; 0.1 is usual");
  EXPECT_EQ(error_text<ConfigError>([] {
              make_gate(options_with(8))->forward(training_input(at::zeros({9, kWidth})));
            }),
            "[base_gate] num_tokens=9 is not a multiple of group_size=8: a group lies on one rank; "
            "fill the last one with tokens of valid=false");
}

}  // namespace
}  // namespace perseid::testing
