// Edges of the top-k gate: values that are no numbers, ties, empty input, determinism, parameters.
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

#include "kernels/parallel.h"
#include "tests/gates/gate_test.h"

namespace perseid::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
const double kNaN = std::numeric_limits<double>::quiet_NaN();

GateOutput route_logits(const std::vector<double>& logits, int64_t top_k,
                        ScoreFunction score = ScoreFunction::kSoftmax) {
  return gate_with_logits(TopKGateOptions(1, 1).top_k(top_k).score_function(score), logits)
      ->forward(one_token());
}

TEST(RouterEdges, NaNTokenTouchesItselfOnly) {
  for (const auto score : {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid}) {
    const auto gate = float64_gate(TopKGateOptions(6, 8).top_k(3).score_function(score));
    const Tensor tokens = random_tensor({7, 6}, 1);
    const GateOutput clean = gate->forward(input_of(tokens));
    for (const double bad : {kNaN, kInf, -kInf}) {
      Tensor broken = tokens.clone();
      broken[4][2] = bad;
      const GateOutput output = gate->forward(input_of(broken));
      EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
      EXPECT_EQ(output.stats.non_finite_tokens, 1);
      const Tensor others = at::tensor({0, 1, 2, 3, 5, 6}, at::kLong);
      EXPECT_TRUE(same_bits(output.routing.weights.view({7, 3}).index_select(0, others),
                            clean.routing.weights.view({7, 3}).index_select(0, others)));
      EXPECT_TRUE(same_bits(output.routing.expert_idx.view({7, 3}).index_select(0, others),
                            clean.routing.expert_idx.view({7, 3}).index_select(0, others)));
    }
    EXPECT_EQ(clean.stats.non_finite_tokens, 0);
  }
}

TEST(RouterEdges, NaNLogitsLose) {
  const GateOutput some = route_logits({kNaN, 1, kNaN, 2}, 2);
  EXPECT_EQ(ids_of(some.routing.expert_idx), (std::vector<int64_t>{3, 1}));
  EXPECT_EQ(some.stats.non_finite_tokens, 1);
  const GateOutput all = route_logits({kNaN, kNaN, kNaN}, 2);
  EXPECT_EQ(ids_of(all.routing.expert_idx), (std::vector<int64_t>{0, 1}));
  EXPECT_TRUE(all.routing.weights.isnan().all().item<bool>());
  const GateOutput filled = route_logits({kNaN, 1, kNaN}, 2);
  EXPECT_EQ(ids_of(filled.routing.expert_idx), (std::vector<int64_t>{1, 0}));
}

TEST(RouterEdges, Infinities) {
  const GateOutput one = route_logits({0, 1, kInf, 2}, 2);
  EXPECT_EQ(ids_of(one.routing.expert_idx), (std::vector<int64_t>{2, 3}));
  EXPECT_TRUE(close_to(one.routing.weights, vector_of({1, 0}), 0));
  EXPECT_EQ(one.stats.non_finite_tokens, 1);
  const GateOutput none = route_logits({-kInf, -kInf, -kInf, -kInf}, 2);
  EXPECT_EQ(ids_of(none.routing.expert_idx), (std::vector<int64_t>{0, 1}));
  EXPECT_TRUE(close_to(none.routing.weights, vector_of({.5, .5}), 0));
  EXPECT_EQ(none.stats.non_finite_tokens, 1);
  // As a mask with enough finite entries -inf is never selected.
  const GateOutput masked = route_logits({-kInf, 0, -kInf, 0}, 2);
  EXPECT_EQ(ids_of(masked.routing.expert_idx), (std::vector<int64_t>{1, 3}));
  EXPECT_TRUE(close_to(masked.routing.weights, vector_of({.5, .5}), 0));
}

TEST(RouterEdges, TiesTakeSmallerIds) {
  for (const auto score : {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid}) {
    const GateOutput equal = route_logits({.3, .3, .3, .3, .3}, 4, score);
    EXPECT_EQ(ids_of(equal.routing.expert_idx), (std::vector<int64_t>{0, 1, 2, 3}));
    EXPECT_TRUE(close_to(equal.routing.weights, vector_of({.25, .25, .25, .25}), 1e-15));
    const GateOutput zeros = route_logits({-0., 0., -1, -0.}, 3, score);
    EXPECT_EQ(ids_of(zeros.routing.expert_idx), (std::vector<int64_t>{0, 1, 3}));
  }
}

// Pairs stay although a weight underflows: the number of assignments is always T * K.
TEST(RouterEdges, UnderflowKeepsThePair) {
  const GateOutput output = route_logits({0, 2000, -2000}, 3);
  EXPECT_EQ(ids_of(output.routing.expert_idx), (std::vector<int64_t>{1, 0, 2}));
  EXPECT_TRUE(close_to(output.routing.weights, vector_of({1, 0, 0}), 0));
}

TEST(RouterEdges, OneExpert) {
  for (const auto normalization : {Normalization::kAuto, Normalization::kSelected}) {
    TopKGateOptions options = TopKGateOptions(6, 1).top_k(1).normalization(normalization);
    const auto gate = float64_gate(options);
    const GateOutput output = gate->forward(input_of(random_tensor({7, 6}, 1)));
    EXPECT_TRUE(same_bits(output.routing.weights, at::ones({7}, at::kDouble)));
    output.routing.weights.sum().backward();
    EXPECT_TRUE(close_to(gate->weight.grad(), at::zeros({1, 6}), 0));
  }
}

TEST(RouterEdges, NoTokens) {
  const TopKGateOptions options = TopKGateOptions(6, 8).top_k(2).z_loss_coeff(.1).bias(true);
  for (const bool masked : {false, true}) {
    TopKGate gate(options);
    const Tensor tokens = random_tensor({masked ? 5 : 0, 6}, 1, -1, 1, at::kFloat);
    tokens.set_requires_grad(true);
    const std::optional<Tensor> valid =
        masked ? std::optional<Tensor>(at::zeros({5}, at::kBool)) : std::nullopt;
    const GateOutput output = gate.forward(input_of(tokens, valid));
    EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
    EXPECT_EQ(output.routing.num_assignments(), 0);
    EXPECT_EQ(output.routing.num_tokens, masked ? 5 : 0);
    EXPECT_EQ(output.stats.num_tokens, 0);
    EXPECT_EQ(output.stats.tokens_per_expert.sum().item<int64_t>(), 0);
    const auto aux = aux_loss(output);
    EXPECT_EQ(aux.value.item<float>(), 0);
    EXPECT_EQ(output.losses[0].value.item<float>(), 0);
    (output.routing.weights.sum() + aux.value + output.losses[0].value).backward();
    EXPECT_TRUE(same_bits(gate.weight.grad(), at::zeros({8, 6})));
    EXPECT_TRUE(same_bits(gate.bias.grad(), at::zeros({8})));
    EXPECT_TRUE(same_bits(tokens.grad(), at::zeros_like(tokens)));
  }
}

TEST(RouterEdges, BFloat16) {
  const Tensor tokens = random_tensor({37, 6}, 1, -3, 3, at::kBFloat16);
  TopKGate gate(TopKGateOptions(6, 8).top_k(3).z_loss_coeff(.1));
  const GateOutput output = gate.forward(input_of(tokens));
  EXPECT_EQ(output.routing.weights.scalar_type(), at::kFloat);
  EXPECT_EQ(output.losses[0].value.scalar_type(), at::kFloat);
  const Tensor rows = output.routing.weights.view({37, 3});
  EXPECT_TRUE(close_to(rows.sum(1), at::ones({37}), 1e-6));
  EXPECT_TRUE(close_to(rows.to(at::kBFloat16).to(at::kFloat).sum(1), at::ones({37}), 2e-3));
  EXPECT_TRUE(same_bits(output.routing.weights,
                        gate.forward(input_of(tokens.to(at::kFloat))).routing.weights));
  // A module cast to bfloat16 still routes in float32.
  gate.to(at::kBFloat16);
  const GateOutput cast = gate.forward(input_of(tokens));
  EXPECT_EQ(cast.routing.weights.scalar_type(), at::kFloat);
  EXPECT_TRUE(close_to(cast.routing.weights.view({37, 3}).sum(1), at::ones({37}), 1e-6));
  cast.routing.weights.square().sum().backward();
  EXPECT_EQ(gate.weight.grad().scalar_type(), at::kBFloat16);
}

TEST(RouterEdges, ForwardIsPure) {
  TopKGate gate(TopKGateOptions(6, 8).bias(true));
  const Tensor weight = gate.weight.detach().clone();
  const Tensor tokens = random_tensor({37, 6}, 1, -1, 1, at::kFloat);
  for (const bool training : {false, true}) {
    GateInput input = input_of(tokens);
    input.training = training;
    input.progress = 7;
    const GateOutput first = gate.forward(input);
    input.step = 5;
    const GateOutput second = gate.forward(input);
    EXPECT_TRUE(same_bits(first.routing.weights, second.routing.weights));
    EXPECT_TRUE(same_bits(first.routing.expert_idx, second.routing.expert_idx));
    gate.after_step(first.stats);
  }
  EXPECT_TRUE(same_bits(gate.weight, weight));
  EXPECT_TRUE(gate.buffers().empty());
  c10::NoGradGuard no_grad;
  EXPECT_FALSE(gate.forward(input_of(tokens)).routing.weights.requires_grad());
}

TEST(RouterEdges, StridedInput) {
  TopKGate gate(TopKGateOptions(6, 8));
  const Tensor tokens = random_tensor({6, 37}, 1, -1, 1, at::kFloat);
  EXPECT_TRUE(same_bits(gate.forward(input_of(tokens.t())).routing.weights,
                        gate.forward(input_of(tokens.t().contiguous())).routing.weights));
}

struct Outcome {
  Tensor weights, expert_idx, score_sum, lse, weight_grad, bias_grad, token_grad;
};

// Odd sizes: with them the bits of a plain BLAS product change with the number of threads.
TEST(RouterEdges, ThreadCountKeepsBits) {
  const auto run = [](int threads, int64_t T, int64_t D, int64_t E, at::ScalarType type) {
    at::set_num_threads(threads);
    TopKGate gate(TopKGateOptions(D, E).top_k(std::min<int64_t>(E, 2)).bias(true).z_loss_coeff(1));
    const Tensor tokens = random_tensor({T, D}, 1, -1, 1, type).set_requires_grad(true);
    const GateOutput output = gate.forward(input_of(tokens));
    (output.routing.weights.square().sum(at::kDouble) + aux_loss(output).value +
     output.losses[0].value)
        .backward();
    return Outcome{output.routing.weights, output.routing.expert_idx, output.balance.score_sum,
                   output.losses[0].raw,   gate.weight.grad(),        gate.bias.grad(),
                   tokens.grad()};
  };
  const int threads_before = at::get_num_threads();
  kernels::set_parallel_for(
      [](int64_t begin, int64_t end, int64_t grain,
         const std::function<void(int64_t, int64_t)>& body) {
        at::parallel_for(begin, end, grain, body);
      },
      [] { return at::get_num_threads(); });
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const auto& [T, D, E] : {std::array<int64_t, 3>{2047, 127, 5},
                                  {501, 64, 5},
                                  {300, 3, 1},
                                  {4001, 65, 64},
                                  {1, 33, 7}}) {
      const Outcome one = run(1, T, D, E, type);
      for (const int threads : {2, 3}) {
        const Outcome many = run(threads, T, D, E, type);
        EXPECT_TRUE(same_bits(many.weights, one.weights));
        EXPECT_TRUE(same_bits(many.expert_idx, one.expert_idx));
        EXPECT_TRUE(same_bits(many.score_sum, one.score_sum));
        EXPECT_TRUE(same_bits(many.lse, one.lse));
        EXPECT_TRUE(same_bits(many.weight_grad, one.weight_grad)) << T << " " << D << " " << E;
        EXPECT_TRUE(same_bits(many.bias_grad, one.bias_grad));
        EXPECT_TRUE(same_bits(many.token_grad, one.token_grad));
      }
    }
  }
  kernels::set_parallel_for({}, {});
  at::set_num_threads(threads_before);
}

TEST(RouterEdges, Initialisation) {
  const auto weight = [](uint64_t seed, int64_t layer, int64_t gate) {
    return TopKGate(TopKGateOptions(64, 8).seed(seed).layer_id(layer).gate_id(gate))
        .weight.detach();
  };
  const Tensor first = weight(1, 2, 3);
  EXPECT_TRUE(same_bits(weight(1, 2, 3), first));
  EXPECT_FALSE(at::equal(weight(0, 2, 3), first));
  EXPECT_FALSE(at::equal(weight(1, 0, 3), first));
  EXPECT_FALSE(at::equal(weight(1, 2, 0), first));
  EXPECT_FALSE(at::equal(weight(1, 3, 2), first));
  const double bound = std::sqrt(6. / (64 + 8));
  EXPECT_LE(first.abs().max().item<double>(), bound);
  EXPECT_GT(first.abs().max().item<double>(), .98 * bound);
  EXPECT_NEAR(first.square().mean().item<double>(), bound * bound / 3, .1 * bound * bound);
  const TopKGate gate(TopKGateOptions(64, 8).bias(true));
  EXPECT_EQ(gate.named_parameters().keys(), (std::vector<std::string>{"weight", "bias"}));
  EXPECT_TRUE(same_bits(gate.bias.detach(), at::zeros({8})));
  EXPECT_FALSE(TopKGate(TopKGateOptions(64, 8)).bias.defined());
}

}  // namespace
}  // namespace perseid::testing
