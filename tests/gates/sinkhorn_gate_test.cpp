// Sinkhorn: top-K of a balanced plan in training, of the logits else.
//   Contract          empty and padded batches, whole groups add, purity, threads: gate_contract.h
//   EqualsDefinition  selection by z + log d1 of kernels::sinkhorn_reference in each group, without
//                     padding; evaluation by z; K = 1, 2, E
//   IsBalanced        skewed logits: loads near T K / E in training, far from it else
//   Weights           K = 1: sigmoid(z), else softmax(z), on the selection; rows by weight, not by
//                     place in the plan
//   Gradients         central differences, 1e-7; equal to ordinary operations
//   LargeLogits       beyond 88, where e^z ends in float32: finite and balanced
//   NonFinite         a NaN leaves the plan and touches its token alone
//   Edges             E = 1, K = E, equal scores, all tokens but one masked
#include "gates/sinkhorn_gate.h"

#include <algorithm>
#include <cmath>

#include "kernels/sinkhorn.h"
#include "tests/gates/gate_contract.h"

namespace perseid::testing {
namespace {

using gates::InputNorm;
using gates::SinkhornGate;
using gates::SinkhornGateOptions;

std::shared_ptr<SinkhornGate> make_gate(const SinkhornGateOptions& options,
                                        at::ScalarType type = at::kDouble) {
  auto gate = std::make_shared<SinkhornGate>(options);
  gate->to(type);
  gate->weight.set_data(random_tensor(gate->weight.sizes(), 2, -1, 1, type));
  return gate;
}
SinkhornGateOptions options_with(int64_t top_k, int64_t group_size = 0) {
  return SinkhornGateOptions(kWidth, 8).top_k(top_k).group_size(group_size);
}
/// Tokens that all lean to the same experts.
Tensor skewed_tokens(int64_t T, at::ScalarType type = at::kDouble) {
  Tensor tokens = random_tensor({T, kWidth}, 1, -1, 1);
  tokens.select(1, 0).add_(2);
  return tokens.to(type);
}

/// [n, E] of 1 for the K largest, equal ones by smaller id.
Tensor best_of(const Tensor& scores, int64_t top_k) {
  const Tensor order = std::get<1>(at::sort(scores, /*stable=*/true, 1, /*descending=*/true));
  return at::zeros_like(scores).scatter(1, order.narrow(1, 0, top_k), 1);
}

TEST(SinkhornGate, Contract) {
  for (const int64_t top_k : {1, 3}) {
    expect_group_gate_contract(
        [&](int64_t group_size) { return make_gate(options_with(top_k, group_size), at::kFloat); });
  }
}

TEST(SinkhornGate, EqualsDefinition) {
  const int64_t T = 48, E = 8;
  const Tensor tokens = skewed_tokens(T);
  const Tensor valid = random_tensor({T}, 8).gt(-.6);
  int64_t num_moved = 0;
  for (const int64_t top_k : {1, 2, 8}) {
    for (const int64_t group_size : {12, 48}) {
      const auto gate = make_gate(options_with(top_k, group_size));
      const Tensor z = tokens.mm(gate->weight.t()).detach();
      Tensor balanced = z.clone();
      for (int64_t begin = 0; begin < T; begin += group_size) {
        const Tensor is_here = valid.narrow(0, begin, group_size);
        const Tensor rows = z.narrow(0, begin, group_size).index({is_here}).contiguous();
        const Tensor log_d1 = at::empty({E}, at::kDouble);
        kernels::sinkhorn_reference({rows.size(0), E}, {}, kernels::DType::kFloat64,
                                    rows.const_data_ptr(), log_d1.mutable_data_ptr<double>());
        balanced.narrow(0, begin, group_size).add_(log_d1);
      }
      GateInput input = training_input(tokens);
      input.valid = valid;
      for (const bool training : {true, false}) {
        input.training = training;
        const GateOutput output = gate->forward(input);
        const Tensor expected = best_of(training ? balanced : z, top_k) * valid.unsqueeze(1);
        const Tensor found = gates::dense_weights(output.routing, E).ne(0);
        EXPECT_TRUE(at::equal(found, expected.ne(0))) << top_k << " " << group_size;
        EXPECT_EQ(output.stats.num_assignments, valid.sum().item<int64_t>() * top_k);
      }
      num_moved += best_of(z, top_k).ne(best_of(balanced, top_k)).sum().item<int64_t>();
    }
  }
  EXPECT_GT(num_moved, 100);  // balancing changed the choices
}

TEST(SinkhornGate, IsBalanced) {
  const Tensor tokens = skewed_tokens(2000, at::kFloat);
  for (const int64_t top_k : {1, 2}) {
    const auto gate = make_gate(options_with(top_k), at::kFloat);
    const auto worst = [&](bool training) {
      GateInput input = training_input(tokens);
      input.training = training;
      const auto counts = gate->forward(input).stats.tokens_per_expert;
      return counts.max().item<double>() * 8 / double(2000 * top_k);
    };
    EXPECT_LT(worst(true), 1.5);
    EXPECT_GT(worst(false), 2.5);
  }
}

TEST(SinkhornGate, Weights) {
  const Tensor tokens = skewed_tokens(40);
  for (const int64_t top_k : {1, 3, 8}) {
    const auto gate = make_gate(options_with(top_k));
    const Tensor z = tokens.mm(gate->weight.t());
    const Tensor all = top_k == 1 ? z.sigmoid() : z.softmax(1);
    for (const bool training : {false, true}) {
      GateInput input = training_input(tokens);
      input.training = training;
      const GateOutput output = gate->forward(input);
      const Tensor weights = gates::dense_weights(output.routing, 8);
      EXPECT_TRUE(close_to(weights, all * weights.detach().ne(0), 1e-14)) << top_k;
      expect_valid_routing(output);
      EXPECT_EQ(output.routing.top_k, top_k);
      EXPECT_TRUE(output.losses.empty());
      EXPECT_FALSE(output.balance.score_sum.defined());
    }
  }
}

TEST(SinkhornGate, Gradients) {
  const Tensor valid = at::arange(12, at::kLong).remainder(5).ne(3);
  for (const int64_t top_k : {1, 2}) {
    const auto gate = make_gate(
        options_with(top_k, 6).input_norm(top_k == 1 ? InputNorm::kLayerNorm : InputNorm::kNone));
    const Tensor tokens = skewed_tokens(12);
    GateInput input = training_input(tokens);
    input.valid = valid;
    EXPECT_TRUE(gradients_match(
        [&]() -> std::vector<Tensor> { return {gate->forward(input).routing.weights}; },
        {gate->weight, tokens}));
  }
  // No gradient through the plan: the formula of the weights alone.
  const auto gate = make_gate(options_with(2));
  const auto gradients = [&](bool is_gate) {
    gate->zero_grad();
    const Tensor x = skewed_tokens(12).set_requires_grad(true);
    const Tensor weights = gates::dense_weights(gate->forward(training_input(x)).routing, 8);
    const Tensor plain = x.mm(gate->weight.t()).softmax(1) * weights.detach().ne(0);
    (is_gate ? weights : plain).mul(random_tensor({12, 8}, 4)).sum().backward();
    return std::vector<Tensor>{x.grad(), gate->weight.grad().clone()};
  };
  const auto found = gradients(true), expected = gradients(false);
  for (const size_t i : {size_t{0}, size_t{1}}) {
    EXPECT_TRUE(close_to(found[i], expected[i], 1e-13)) << i;
  }
}

TEST(SinkhornGate, LargeLogits) {
  // Every logit of half of the tokens beyond 88.
  const Tensor tokens = skewed_tokens(2000, at::kFloat);
  const auto gate = make_gate(options_with(1), at::kFloat);
  const Tensor counts = gate->forward(training_input(tokens)).stats.tokens_per_expert;
  Tensor shifted = at::cat({tokens, at::zeros({2000, 1})}, 1);
  shifted.slice(0, 0, 1000).select(1, kWidth).fill_(200);  // adds 200 to z of each expert
  SinkhornGate wide(SinkhornGateOptions(kWidth + 1, 8));
  wide.weight.set_data(at::cat({gate->weight.detach(), at::ones({8, 1})}, 1));
  const GateOutput output = wide.forward(training_input(shifted));
  EXPECT_TRUE(output.routing.weights.isfinite().all().item<bool>());
  EXPECT_EQ(output.stats.non_finite_tokens, 0);
  // The same plan up to the rounding of z + 200.
  EXPECT_LE((output.stats.tokens_per_expert - counts).abs().max().item<int64_t>(), 2);
}

TEST(SinkhornGate, NonFinite) {
  Tensor tokens = skewed_tokens(16);
  for (const int64_t top_k : {1, 2}) {
    const auto gate = make_gate(options_with(top_k));
    for (const bool training : {false, true}) {
      // Without the token, as padding.
      GateInput input = training_input(tokens);
      input.training = training;
      input.valid = at::arange(16, at::kLong).ne(5);
      const Tensor good = gates::dense_weights(gate->forward(input).routing, 8);
      Tensor spoilt = tokens.clone();
      spoilt[5][1] = NAN;
      input.tokens = spoilt;
      input.valid.reset();
      const GateOutput output = gate->forward(input);
      EXPECT_EQ(output.stats.non_finite_tokens, 1);
      EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
      const Tensor rows = gates::dense_weights(output.routing, 8);
      for (int64_t t = 0; t < 16; ++t) {
        if (t == 5) {
          EXPECT_EQ(rows[t].isnan().sum().item<int64_t>(), top_k);
          EXPECT_TRUE(rows[t].slice(0, 0, top_k).isnan().all().item<bool>());  // smallest ids
        } else {
          EXPECT_TRUE(same_bits(rows[t], good[t])) << t;
        }
      }
    }
  }
}

TEST(SinkhornGate, Edges) {
  const auto one = make_gate(SinkhornGateOptions(kWidth, 1));
  const Tensor tokens = random_tensor({5, kWidth}, 1);
  const auto output = one->forward(training_input(tokens));
  EXPECT_TRUE(
      close_to(output.routing.weights, tokens.mm(one->weight.t()).squeeze(1).sigmoid(), 1e-14));
  // Equal scores: experts 0 .. K-1.
  const auto flat = make_gate(options_with(3));
  flat->weight.set_data(at::zeros({8, kWidth}, at::kDouble));
  const auto equal = flat->forward(training_input(tokens));
  EXPECT_EQ(ids_of(equal.routing.expert_idx.slice(0, 0, 6)),
            (std::vector<int64_t>{0, 1, 2, 0, 1, 2}));
  EXPECT_TRUE(close_to(equal.routing.weights, at::full({15}, 1 / 8., at::kDouble), 1e-15));
  // One token is left.
  GateInput input = training_input(tokens);
  input.valid = at::arange(5, at::kLong).eq(2);
  EXPECT_EQ(make_gate(options_with(2))->forward(input).stats.num_assignments, 2);
}

TEST(SinkhornGate, Errors) {
  const auto text = [](const SinkhornGateOptions& options) {
    return error_text<ConfigError>([&] { SinkhornGate gate(options); });
  };
  using Options = SinkhornGateOptions;
  EXPECT_EQ(text(Options(0, 8)),
            "[sinkhorn_gate] d_model=0 is below 1; give the width of the tokens");
  EXPECT_EQ(text(Options(4, 8).top_k(9)),
            "[sinkhorn_gate] top_k=9 exceeds num_experts=8; choose top_k in [1, 8]");
  EXPECT_EQ(text(Options(4, 8).top_k(0)),
            "[sinkhorn_gate] top_k=0 is below 1; choose top_k in [1, 8]");
  EXPECT_EQ(text(Options(4, 8).group_size(-1)),
            "[sinkhorn_gate] group_size=-1 is negative; choose 0 to make the tokens of each call "
            "one group");
  EXPECT_EQ(text(Options(4, 8).max_iterations(0)),
            "[sinkhorn_gate] max_iterations=0 is below 1; 50 is usual");
  EXPECT_EQ(text(Options(4, 8).tolerance(NAN)),
            "[sinkhorn_gate] tolerance=nan is not a finite number from 0 on; 1e-4 is usual");
  EXPECT_EQ(error_text<ConfigError>([] {
              make_gate(options_with(1, 8))->forward(training_input(at::zeros({9, kWidth})));
            }),
            "[sinkhorn_gate] num_tokens=9 is not a multiple of group_size=8: a group lies on one "
            "rank; fill the last one with tokens of valid=false");
}

}  // namespace
}  // namespace perseid::testing
