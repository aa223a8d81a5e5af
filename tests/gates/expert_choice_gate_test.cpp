// Experts that choose tokens.
//   Contract          empty and padded batches, whole groups add, purity, threads: gate_contract.h
//   Example           by hand: two experts, the larger p, ties to the smaller token
//   EqualsDefinition  routing and p against sorted columns; E, T, capacity_factor, groups, padding,
//                     heavy ties
//   ExactLoads        every expert has min(C, n) tokens in every group
//   Gradients         central differences, 1e-7; equal to ordinary operations
//   Edges             NaN, infinities, equal scores, E = 1, C = 0, C = n, a weight that underflows
//   GroupSize         fixed: a group does not see others. 0: it depends on the batch
#include "gates/expert_choice_gate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/gates/gate_contract.h"

namespace perseid::testing {
namespace {

using gates::ExpertChoiceGate;
using gates::ExpertChoiceGateOptions;
using gates::InputNorm;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

ExpertChoiceGateOptions options_with(double capacity_factor, int64_t group_size = 0) {
  return ExpertChoiceGateOptions(kWidth, 8).capacity_factor(capacity_factor).group_size(group_size);
}
std::shared_ptr<ExpertChoiceGate> make_gate(const ExpertChoiceGateOptions& options,
                                            at::ScalarType type = at::kDouble) {
  auto gate = std::make_shared<ExpertChoiceGate>(options);
  gate->to(type);
  gate->weight.set_data(random_tensor(gate->weight.sizes(), 2, -1, 1, type));
  return gate;
}
/// A gate whose logits are its tokens.
std::shared_ptr<ExpertChoiceGate> identity_gate(int64_t E, double capacity_factor,
                                                int64_t group_size = 0) {
  auto gate = std::make_shared<ExpertChoiceGate>(
      ExpertChoiceGateOptions(E, E).capacity_factor(capacity_factor).group_size(group_size));
  gate->to(at::kDouble);
  gate->weight.set_data(at::eye(E, at::kDouble));
  return gate;
}

/// [T, E] of 1 where expert e takes token t: columns sorted by (p descending, token).
Tensor chosen_by_definition(const Tensor& shares, const Tensor& valid, double capacity_factor,
                            int64_t group_size) {
  const int64_t T = shares.size(0), E = shares.size(1);
  Tensor chosen = at::zeros({T, E}, at::kDouble);
  const auto p = shares.accessor<double, 2>();
  const auto is_valid = valid.accessor<bool, 1>();
  auto is_chosen = chosen.accessor<double, 2>();
  for (int64_t begin = 0; begin < T; begin += group_size) {
    std::vector<int64_t> tokens;
    for (int64_t t = begin; t < begin + group_size; ++t) {
      if (is_valid[t]) tokens.push_back(t);
    }
    const auto n = static_cast<int64_t>(tokens.size());
    const auto C = std::min<int64_t>(n, std::llround(capacity_factor * double(n) / double(E)));
    for (int64_t e = 0; e < E; ++e) {
      std::vector<int64_t> order = tokens;
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return p[a][e] > p[b][e]; });
      for (int64_t i = 0; i < C; ++i) is_chosen[order[static_cast<size_t>(i)]][e] = 1;
    }
  }
  return chosen;
}

TEST(ExpertChoiceGate, Contract) {
  for (const double capacity_factor : {.5, 2.}) {
    expect_group_gate_contract([&](int64_t group_size) {
      return make_gate(options_with(capacity_factor, group_size), at::kFloat);
    });
  }
}

TEST(ExpertChoiceGate, Example) {
  // C = round(4 * 1 / 2) = 2. Expert 0 takes tokens 1 and 0 (token 2 has the same p), expert 1
  // takes 3 and 0.
  const auto gate = identity_gate(2, 1);
  const Tensor logits = vector_of({0, 0, 3, 0, 0, 0, 0, 1}).view({4, 2});
  const GateOutput output = gate->forward(input_of(logits));
  const Routing& routing = output.routing;
  EXPECT_EQ(ids_of(routing.token_offsets), (std::vector<int64_t>{0, 2, 3, 3, 4}));
  EXPECT_EQ(ids_of(routing.expert_idx), (std::vector<int64_t>{0, 1, 0, 1}));
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  EXPECT_TRUE(close_to(routing.weights, vector_of({.5, .5, sigmoid(3), sigmoid(1)}), 1e-15));
  EXPECT_EQ(output.stats.tokens_without_expert, 1);
  EXPECT_EQ(output.stats.max_experts_per_token, 2);
  EXPECT_EQ(ids_of(output.stats.tokens_per_expert), (std::vector<int64_t>{2, 2}));
}

TEST(ExpertChoiceGate, EqualsDefinition) {
  for (const int64_t E : {1, 2, 5, 8}) {
    for (const int64_t group_size : {1, 4, 20, 40}) {
      for (const double capacity_factor : {.3, 1., 2., 50.}) {
        for (const bool has_ties : {false, true}) {
          const int64_t T = 40;
          Tensor logits = random_tensor({T, E}, static_cast<uint64_t>(E), -2, 2);
          if (has_ties) logits = logits.round();
          const Tensor valid = random_tensor({T}, 8).gt(-.5);
          const auto gate = identity_gate(E, capacity_factor, group_size);
          const GateOutput output = gate->forward(input_of(logits, valid));
          EXPECT_NO_THROW(gates::validate(output.routing, E, "test"));
          // The kernel's own p: ties must be ties in its rounding.
          const Tensor shares =
              gates::dense_weights(identity_gate(E, 50)->forward(input_of(logits)).routing, E);
          EXPECT_TRUE(close_to(shares, logits.softmax(1), 1e-14));
          const Tensor expected =
              chosen_by_definition(shares, valid, capacity_factor, group_size) * shares;
          EXPECT_TRUE(same_bits(gates::dense_weights(output.routing, E), expected))
              << E << " " << group_size << " " << capacity_factor << " " << has_ties;
        }
      }
    }
  }
}

TEST(ExpertChoiceGate, ExactLoads) {
  const Tensor tokens = random_tensor({48, kWidth}, 1, -2, 2);
  const Tensor valid = random_tensor({48}, 8).gt(-.3);
  for (const int64_t group_size : {8, 16, 48}) {
    for (const double capacity_factor : {.1, .5, 1., 1.25, 2., 8., 100.}) {
      const auto gate = make_gate(options_with(capacity_factor, group_size));
      int64_t expected = 0;
      for (int64_t begin = 0; begin < 48; begin += group_size) {
        const auto n = valid.narrow(0, begin, group_size).sum().item<int64_t>();
        expected += std::min(n, int64_t(std::floor(capacity_factor * double(n) / 8 + .5)));
      }
      const auto counts = gate->forward(input_of(tokens, valid)).stats.tokens_per_expert;
      EXPECT_EQ(ids_of(counts), std::vector<int64_t>(8, expected)) << capacity_factor;
    }
  }
}

TEST(ExpertChoiceGate, Gradients) {
  const Tensor valid = at::arange(12, at::kLong).remainder(5).ne(3);
  for (const double capacity_factor : {1.3, 2.}) {
    for (const InputNorm norm : {InputNorm::kNone, InputNorm::kLayerNorm}) {
      const auto gate = make_gate(options_with(capacity_factor, 6).input_norm(norm));
      const Tensor tokens = random_tensor({12, kWidth}, 1, -2, 2);
      EXPECT_TRUE(gradients_match(
          [&]() -> std::vector<Tensor> {
            return {gate->forward(input_of(tokens, valid)).routing.weights};
          },
          {gate->weight, tokens}));
      if (norm != InputNorm::kNone) continue;
      // The whole softmax: experts that were not chosen push as well.
      const auto gradients = [&](bool is_gate) {
        gate->zero_grad();
        const Tensor x = tokens.detach().clone().set_requires_grad(true);
        const Tensor weights = gates::dense_weights(gate->forward(input_of(x, valid)).routing, 8);
        const Tensor plain = x.mm(gate->weight.t()).softmax(1) * weights.detach().ne(0);
        (is_gate ? weights : plain).mul(random_tensor({12, 8}, 4)).sum().backward();
        return std::vector<Tensor>{x.grad(), gate->weight.grad().clone()};
      };
      const auto found = gradients(true), expected = gradients(false);
      EXPECT_TRUE(close_to(found[0], expected[0], 1e-13));
      EXPECT_TRUE(close_to(found[1], expected[1], 1e-13));
      EXPECT_GT(expected[1].abs().min().item<double>(), 0);
    }
  }
}

TEST(ExpertChoiceGate, NonFinite) {
  // A NaN is chosen when nothing else is left, and padding never, not even then.
  Tensor logits = random_tensor({8, 3}, 1);
  logits[2][1] = NAN;
  logits[5][0] = NAN;
  Tensor valid = at::ones({8}, at::kBool);
  valid[0] = false;
  const auto row_of = [&](double capacity_factor, int64_t token) {
    const auto output = identity_gate(3, capacity_factor)->forward(input_of(logits, valid));
    EXPECT_EQ(output.stats.non_finite_tokens, 2);
    EXPECT_NO_THROW(gates::validate(output.routing, 3, "test"));
    return gates::dense_weights(output.routing, 3)[token];
  };
  EXPECT_TRUE(at::equal(row_of(2.1, 2), at::zeros({3}, at::kDouble)));  // C = 5: all the others
  EXPECT_TRUE(row_of(2.6, 2).isnan().all().item<bool>());               // C = 6: the smaller id
  EXPECT_TRUE(at::equal(row_of(2.6, 5), at::zeros({3}, at::kDouble)));
  EXPECT_TRUE(row_of(9, 5).isnan().all().item<bool>());
  EXPECT_TRUE(at::equal(row_of(9, 0), at::zeros({3}, at::kDouble)));

  // Infinite logits of one token.
  const auto weights_of = [](const std::vector<double>& row) {
    auto gate =
        std::make_shared<ExpertChoiceGate>(ExpertChoiceGateOptions(1, 3).capacity_factor(3));
    gate->to(at::kDouble);
    gate->weight.set_data(vector_of(row).unsqueeze(1));
    const auto output = gate->forward(one_token());
    EXPECT_EQ(output.stats.non_finite_tokens, 1);
    EXPECT_EQ(output.routing.num_assignments(), 3);  // also the pairs of weight 0
    return gates::dense_weights(output.routing, 3)[0];
  };
  EXPECT_TRUE(same_bits(weights_of({kInfinity, 0, 1}), vector_of({1, 0, 0})));
  EXPECT_TRUE(same_bits(weights_of({kInfinity, 0, kInfinity}), vector_of({.5, 0, .5})));
  EXPECT_TRUE(close_to(weights_of({-kInfinity, -kInfinity, -kInfinity}),
                       at::full({3}, 1 / 3., at::kDouble), 1e-15));
}

TEST(ExpertChoiceGate, Edges) {
  // Equal scores: tokens 0 .. C-1 for every expert, experts in order of their ids.
  const auto equal = identity_gate(4, 2)->forward(input_of(at::zeros({6, 4}, at::kDouble)));
  EXPECT_EQ(ids_of(equal.routing.token_offsets), (std::vector<int64_t>{0, 4, 8, 12, 12, 12, 12}));
  EXPECT_EQ(ids_of(equal.routing.expert_idx.slice(0, 0, 4)), (std::vector<int64_t>{0, 1, 2, 3}));
  // One expert: the first C tokens with weight 1, and no gradient.
  const auto single = identity_gate(1, .5);
  const auto one = single->forward(input_of(random_tensor({6, 1}, 1)));
  EXPECT_EQ(ids_of(one.routing.token_offsets), (std::vector<int64_t>{0, 1, 2, 3, 3, 3, 3}));
  EXPECT_TRUE(same_bits(one.routing.weights, at::ones({3}, at::kDouble)));
  one.routing.weights.sum().backward();
  EXPECT_TRUE(same_bits(single->weight.grad(), at::zeros({1, 1}, at::kDouble)));
  // C rounds to 0: nobody is chosen. Halves go up.
  EXPECT_EQ(identity_gate(8, 1)->forward(input_of(at::zeros({3, 8}))).routing.num_assignments(), 0);
  EXPECT_EQ(identity_gate(8, 1)->forward(input_of(at::zeros({4, 8}))).routing.num_assignments(), 8);
  // C = n: the dense softmax. A share that underflows stays a pair.
  const Tensor steep = vector_of({0, 2000, 2000, 0}).view({2, 2});
  const auto all = identity_gate(2, 2)->forward(input_of(steep));
  EXPECT_EQ(all.routing.num_assignments(), 4);
  EXPECT_TRUE(same_bits(all.routing.weights, vector_of({1, 0, 1, 0})));
  EXPECT_EQ(ids_of(all.routing.expert_idx), (std::vector<int64_t>{1, 0, 0, 1}));
}

TEST(ExpertChoiceGate, GroupSize) {
  const Tensor tokens = random_tensor({24, kWidth}, 1, -2, 2);
  Tensor others = tokens.clone();
  others.slice(0, 8).normal_();
  const auto first_group = [&](const Tensor& given, int64_t group_size) {
    const auto routing =
        make_gate(options_with(1, group_size))->forward(training_input(given)).routing;
    return gates::dense_weights(routing, 8).slice(0, 0, 8);
  };
  EXPECT_TRUE(same_bits(first_group(others, 8), first_group(tokens, 8)));
  EXPECT_FALSE(at::equal(first_group(others, 0), first_group(tokens, 0)));
}

TEST(ExpertChoiceGate, Errors) {
  const auto text = [](const ExpertChoiceGateOptions& options) {
    return error_text<ConfigError>([&] { ExpertChoiceGate gate(options); });
  };
  using Options = ExpertChoiceGateOptions;
  EXPECT_EQ(text(Options(0, 8)),
            "[expert_choice_gate] d_model=0 is below 1; give the width of the tokens");
  EXPECT_EQ(text(Options(4, 0)),
            "[expert_choice_gate] num_experts=0 is below 1; a gate needs an expert");
  for (const auto& [factor, value] : {std::pair{0., "0"}, {-1., "-1"}, {kInfinity, "inf"}}) {
    EXPECT_EQ(text(Options(4, 8).capacity_factor(factor)),
              std::string("[expert_choice_gate] capacity_factor=") + value +
                  " is not a finite number above 0; 2 is usual");
  }
  EXPECT_EQ(text(Options(4, 8).group_size(-1)),
            "[expert_choice_gate] group_size=-1 is negative; choose 0 to make the tokens of each "
            "call one group");
  const auto forward = [](int64_t num_tokens, int64_t first_token) {
    return error_text<ConfigError>([&] {
      make_gate(options_with(1, 8))
          ->forward(training_input(at::zeros({num_tokens, kWidth}), first_token));
    });
  };
  EXPECT_EQ(forward(8, 16), "no error");
  EXPECT_EQ(forward(0, 3), "no error");
  EXPECT_EQ(
      forward(8, 12),
      "[expert_choice_gate] first_token=12 is not a multiple of group_size=8: a group lies on "
      "one rank; give each rank whole groups");
  EXPECT_EQ(forward(9, 16),
            "[expert_choice_gate] num_tokens=9 is not a multiple of group_size=8: a group lies on "
            "one rank; fill the last one with tokens of valid=false");
  EXPECT_EQ(ExpertChoiceGate(Options(4, 8).capacity_factor(1.6)).top_k(), 2);
  EXPECT_EQ(ExpertChoiceGate(Options(4, 8).capacity_factor(.1)).top_k(), 1);
  EXPECT_EQ(ExpertChoiceGate(Options(4, 8).capacity_factor(90)).top_k(), 8);
}

}  // namespace
}  // namespace perseid::testing
