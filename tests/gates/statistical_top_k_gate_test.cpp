// Statistical top-k as a gate. Formulas are proven in tests/kernels.
//   Contract        empty and padded batches, batches add, purity, threads: gate_contract.h
//   Golden          a worked example: weights and the order of the row, 1e-9
//   EqualsReference weights of plain operations; statistics; Sigma g is free
//   Permuted        rows of the weight and experts together
//   OnAverage       normal logits: K experts per token on average, reported
//   NeverEmpty      equal logits, and none above the threshold; empty rows where asked for
//   Cap             at most that many, the largest
//   Gradients       central differences, 1e-7: tokens, weight, balance loss, every option
//   Detached        the threshold as a constant: plain operations with a detached threshold
//   LossScales      the gradient changes by exactly the coefficient times that of the loss
//   Start           parameters by seed, layer and gate
//   NonFinite       such a token goes to experts 0 .. K-1, the others keep their bits
//   OneExpert       no parameters, weight 1
//   Errors          every text
#include "gates/statistical_top_k_gate.h"

#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "kernels/statistical_top_k.h"
#include "tests/gates/gate_contract.h"

namespace perseid::testing {
namespace {

using gates::StatisticalTopKGate;
using gates::StatisticalTopKGateOptions;

std::shared_ptr<StatisticalTopKGate> make_gate(const StatisticalTopKGateOptions& options,
                                               at::ScalarType type = at::kDouble) {
  auto gate = std::make_shared<StatisticalTopKGate>(options);
  gate->to(type);
  gate->weight.set_data(random_tensor(gate->weight.sizes(), 2, -1, 1, type));
  return gate;
}

/// A float64 gate whose logits are `logits` for the one token `one_token()`.
std::shared_ptr<StatisticalTopKGate> gate_with(StatisticalTopKGateOptions options,
                                               const std::vector<double>& logits) {
  auto gate = make_gate(options.d_model(1).num_experts(static_cast<int64_t>(logits.size())));
  gate->weight.set_data(vector_of(logits).unsqueeze(1));
  return gate;
}

StatisticalTopKGateOptions eight() { return {kWidth, 8}; }

/// max(z - theta, 0) in ordinary differentiable operations.
Tensor reference_weights(const Tensor& logits, const StatisticalTopKGateOptions& options) {
  const double share = double(options.top_k()) / double(options.num_experts());
  Tensor threshold = logits.mean(1, true) + kernels::normal_upper_quantile(share) *
                                                logits.std(1, options.unbiased(), true);
  if (options.detach_threshold()) threshold = threshold.detach();
  return (logits - threshold).relu();
}

TEST(StatisticalTopKGate, Contract) {
  for (const int64_t min_experts : {0, 1}) {
    expect_gate_contract([&] {
      return make_gate(eight().balance_coeff(.2).min_experts(min_experts).cap(3), at::kFloat);
    });
  }
}

TEST(StatisticalTopKGate, Golden) {
  const std::vector<double> logits = {1, 2, 3, 4, 5, 6, 7, 10};
  const GateOutput output = gate_with({1, 8}, logits)->forward(one_token());
  EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
  EXPECT_EQ(ids_of(output.routing.expert_idx), (std::vector<int64_t>{7, 6}));
  EXPECT_TRUE(close_to(output.routing.weights, vector_of({3.4105463727, .4105463727}), 1e-10));
  EXPECT_TRUE(output.losses.empty());
  EXPECT_TRUE(output.global_losses.empty());
  const auto sample = gate_with(StatisticalTopKGateOptions(1, 8).unbiased(true), logits);
  EXPECT_TRUE(close_to(sample->forward(one_token()).routing.weights,
                       vector_of({10 - 6.7164586435, 7 - 6.7164586435}), 1e-10));
}

TEST(StatisticalTopKGate, EqualsReference) {
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  for (const int64_t E : {2, 3, 8, 17}) {
    for (const int64_t K : {int64_t{1}, E - 1}) {
      for (const bool unbiased : {false, true}) {
        const auto options =
            StatisticalTopKGateOptions(kWidth, E).top_k(K).unbiased(unbiased).min_experts(0);
        const auto gate = make_gate(options);
        const GateOutput output = gate->forward(input_of(tokens));
        const Tensor expected = reference_weights(tokens.mm(gate->weight.t()), options);
        EXPECT_TRUE(close_to(dense(output, E), expected, 1e-13)) << E << " " << K;
        EXPECT_EQ(output.stats.num_assignments, expected.gt(0).sum().item<int64_t>());
        EXPECT_EQ(output.stats.tokens_without_expert,
                  expected.gt(0).sum(1).eq(0).sum().item<int64_t>());
        EXPECT_EQ(output.stats.max_experts_per_token, expected.gt(0).sum(1).max().item<int64_t>());
      }
    }
  }
}

TEST(StatisticalTopKGate, Permuted) {
  const GateInput input = input_of(random_tensor({37, kWidth}, 1, -2, 2));
  const auto gate = make_gate(eight());
  const Tensor expected = dense(gate->forward(input), 8);
  const Tensor order = at::tensor({3, 7, 0, 5, 1, 6, 2, 4}, at::kLong);
  gate->weight.set_data(gate->weight.detach().index_select(0, order));
  EXPECT_TRUE(close_to(dense(gate->forward(input), 8), expected.index_select(1, order), 1e-14));
}

TEST(StatisticalTopKGate, OnAverage) {
  const int64_t T = 4096, D = 256, E = 64, K = 8;
  StatisticalTopKGate gate(StatisticalTopKGateOptions(D, E).top_k(K));
  const GateOutput output = gate.forward(input_of(random_tensor({T, D}, 1, -1, 1, at::kFloat)));
  EXPECT_NEAR(double(output.stats.num_assignments) / double(T), 8.09, .1);
  EXPECT_GT(output.stats.max_experts_per_token, K);
  EXPECT_EQ(output.stats.tokens_without_expert, 0);
}

TEST(StatisticalTopKGate, NeverEmpty) {
  for (const auto& [logits, expert, weight] :
       {std::tuple{std::vector<double>(5, .3), int64_t{0}, 0.},
        {std::vector<double>{0, 1, 1, 1, 1, 0, 0, 1}, int64_t{1}, .375}}) {
    const StatisticalTopKGateOptions options = StatisticalTopKGateOptions(1, 2).top_k(1);
    const GateOutput output = gate_with(options, logits)->forward(one_token());
    EXPECT_EQ(ids_of(output.routing.expert_idx), std::vector<int64_t>{expert});
    EXPECT_NEAR(output.routing.weights.item<double>(), weight, 1e-15);
    EXPECT_GT(output.routing.weights.item<double>(), 0);
    const auto may_be_empty = StatisticalTopKGateOptions(options).min_experts(0);
    const GateOutput empty = gate_with(may_be_empty, logits)->forward(one_token());
    EXPECT_EQ(empty.stats.num_assignments, 0);
    EXPECT_EQ(empty.stats.tokens_without_expert, 1);
  }
}

TEST(StatisticalTopKGate, Cap) {
  const GateInput input = input_of(random_tensor({37, kWidth}, 1, -2, 2));
  const GateOutput all = make_gate(eight())->forward(input);
  const GateOutput capped = make_gate(eight().cap(1))->forward(input);
  EXPECT_GT(all.stats.max_experts_per_token, 1);
  EXPECT_EQ(capped.stats.max_experts_per_token, 1);
  EXPECT_TRUE(same_bits(capped.routing.weights, std::get<0>(dense(all, 8).max(1))));
}

TEST(StatisticalTopKGate, Gradients) {
  const auto expect_gradients = [](int64_t T, const StatisticalTopKGateOptions& options) {
    const Tensor tokens = random_tensor({T, kWidth}, 1, -2, 2);
    const auto gate = make_gate(StatisticalTopKGateOptions(options).balance_coeff(.4));
    for (const bool is_loss : {false, true}) {
      EXPECT_TRUE(gradients_match(
          [&]() -> std::vector<Tensor> {
            const GateOutput output = gate->forward(input_of(tokens));
            return {is_loss ? global_loss(output) : dense(output, 8)};
          },
          {gate->weight, tokens}))
          << T << " " << is_loss;
    }
  };
  for (const auto& options :
       {eight(), eight().unbiased(true), eight().top_k(5), eight().min_experts(0), eight().cap(2),
        eight().input_norm(gates::InputNorm::kLayerNorm)}) {
    expect_gradients(11, options);
  }
  for (const int64_t T : {0, 1}) expect_gradients(T, eight());
}

TEST(StatisticalTopKGate, Detached) {
  const Tensor cotangent = random_tensor({37, 8}, 3);
  std::vector<Tensor> gradients;
  for (const bool detach : {true, false}) {
    const auto options = eight().detach_threshold(detach).min_experts(0);
    const auto gate = make_gate(options);
    for (const bool is_reference : {false, true}) {
      const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2).set_requires_grad(true);
      const Tensor weights = is_reference ? reference_weights(tokens.mm(gate->weight.t()), options)
                                          : dense(gate->forward(input_of(tokens)), 8);
      (weights * cotangent).sum().backward();
      gradients.push_back(tokens.grad());
    }
  }
  EXPECT_TRUE(close_to(gradients[0], gradients[1], 1e-13));
  EXPECT_TRUE(close_to(gradients[2], gradients[3], 1e-13));
  EXPECT_FALSE(close_to(gradients[0], gradients[2], 1e-2));
}

TEST(StatisticalTopKGate, LossScales) {
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  const auto gradient = [&](double main, double coeff) {
    const auto gate = make_gate(eight().balance_coeff(coeff));
    const GateOutput output = gate->forward(input_of(tokens));
    Tensor loss = main * output.routing.weights.square().sum();
    if (coeff > 0) loss = loss + global_loss(output);
    loss.backward();
    return gate->weight.grad();
  };
  for (const double c : {.01, 3.}) {
    EXPECT_TRUE(close_to(gradient(1, c), gradient(1, 0) + c * gradient(0, 1), 1e-13)) << c;
  }
}

TEST(StatisticalTopKGate, Start) {
  const auto weight_of = [](const StatisticalTopKGateOptions& options) {
    return StatisticalTopKGate(options).weight;
  };
  const Tensor weight = weight_of(eight());
  EXPECT_EQ(weight.sizes(), at::IntArrayRef({8, kWidth}));
  EXPECT_LE(weight.abs().max().item<double>(), std::sqrt(6. / (8 + kWidth)));
  EXPECT_TRUE(same_bits(weight, weight_of(eight())));
  for (const auto& other : {eight().seed(1), eight().layer_id(1), eight().gate_id(1)}) {
    EXPECT_FALSE(at::equal(weight, weight_of(other)));
  }
}

TEST(StatisticalTopKGate, NonFinite) {
  const auto gate = make_gate(eight().top_k(3));
  for (const double bad : {double(NAN), double(INFINITY)}) {
    Tensor tokens = random_tensor({5, kWidth}, 1);
    const Tensor clean = dense(gate->forward(input_of(tokens)), 8);
    tokens[2][1] = bad;
    const GateOutput output = gate->forward(input_of(tokens));
    EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
    EXPECT_EQ(output.stats.non_finite_tokens, 1);
    const Tensor rows = dense(output, 8);
    EXPECT_TRUE(same_bits(rows[2].isnan(), at::tensor({1, 1, 1, 0, 0, 0, 0, 0}).to(at::kBool)));
    for (const int64_t t : {0, 1, 3, 4}) EXPECT_TRUE(same_bits(rows[t], clean[t]));
  }
}

TEST(StatisticalTopKGate, OneExpert) {
  StatisticalTopKGate gate(StatisticalTopKGateOptions(kWidth, 1).top_k(1).balance_coeff(.1));
  EXPECT_TRUE(gate.parameters().empty());
  const GateOutput output =
      gate.forward(input_of(at::zeros({3, kWidth}), at::tensor({1, 0, 1}, at::kInt).to(at::kBool)));
  EXPECT_TRUE(same_bits(dense(output, 1).reshape({-1}), at::tensor({1.f, 0.f, 1.f})));
  EXPECT_EQ(global_loss(output).item<float>(), 0);
}

TEST(StatisticalTopKGate, Errors) {
  const auto text = [](const StatisticalTopKGateOptions& options) {
    return error_text<ConfigError>([&] { StatisticalTopKGate gate(options); });
  };
  const std::string who = "[statistical_top_k_gate] ";
  EXPECT_EQ(text({0, 8}), who + "d_model=0 is below 1; give the width of the tokens");
  EXPECT_EQ(text(eight().top_k(9)), who + "top_k=9 exceeds num_experts=8; choose top_k in [1, 8]");
  EXPECT_EQ(text(eight().top_k(0)), who + "top_k=0 is below 1; choose top_k in [1, 8]");
  EXPECT_EQ(text(eight().top_k(8)),
            who +
                "top_k=8 is num_experts, and no threshold lets all experts pass; choose top_k in "
                "[1, 7], or DenseGate");
  EXPECT_EQ(text(eight().min_experts(2)),
            who +
                "min_experts=2 is neither 0, for tokens without expert, nor 1, for the largest "
                "logit");
  EXPECT_EQ(text(eight().cap(-1)),
            who + "cap=-1 is negative; choose the most experts of a token, or 0 for no bound");
  EXPECT_EQ(text(eight().balance_coeff(NAN)),
            who +
                "balance_coeff=nan is not a finite number from 0 on; choose 0 to switch the loss "
                "off");
  StatisticalTopKGate gate(eight());
  EXPECT_EQ(error_text<ConfigError>([&] {
              gate.forward(input_of(at::zeros({3, 5})));
            }),
            who + "tokens=Float[3, 5] has another width than d_model=6");
  const Tensor loss = gate.forward(input_of(at::ones({3, kWidth}))).routing.weights.sum();
  EXPECT_EQ(error_text<ConfigError>([&] {
              torch::autograd::grad({loss}, {gate.weight}, {}, true, /*create_graph=*/true);
            }),
            who + "create_graph=1 is not supported: the gate has no second derivative");
}

}  // namespace
}  // namespace perseid::testing
