// Values of the top-k gate.
//   Golden               logits (1, 2, .5, -1): the published formulas, to 1e-9
//   SelectedEqualsAll... softmax over the selection = softmax over all, renormalised, to 1e-15
//   AllExpertsAreDense   K = E is the dense softmax, to an absolute 1e-7
//   EqualsReference      both scores, both normalisations, all K: to 1e-14 in float64
//   ExpertPermutation    rows of the weight permuted: ids permuted, weights and losses the same
//   TokenPermutation     rows permuted, bit for bit
//   ShiftInvariance      logits + c: same weights; squared log-sum-exp grows by 2 c lse + c^2
//   BatchesAdd           two batches = their concatenation: losses and gradients
//   MaskedTokens         NaN rows with valid = false change nothing
//   SavedBytes           the graph keeps 8 bytes per assignment and no copy of the tokens
#include <c10/core/Allocator.h>
#include <c10/core/GradMode.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <cmath>

#include "tests/gates/gate_test.h"

namespace perseid::testing {
namespace {

TopKGateOptions with(ScoreFunction score, Normalization normalization, int64_t top_k) {
  return TopKGateOptions(1, 4).score_function(score).normalization(normalization).top_k(top_k);
}

TEST(TopKGate, Golden) {
  const std::vector<double> logits = {1, 2, .5, -1};
  const auto weights = [&](const TopKGateOptions& options) {
    const GateOutput output = gate_with_logits(options, logits)->forward(one_token());
    return gates::dense_weights(output.routing, 4).reshape({-1});
  };
  const auto softmax = ScoreFunction::kSoftmax;
  const auto sigmoid = ScoreFunction::kSigmoid;
  EXPECT_TRUE(close_to(weights(with(softmax, Normalization::kAll, 4)),
                       vector_of({.2242078180, .6094600376, .1359889158, .0303432286}), 1e-9));
  EXPECT_TRUE(close_to(weights(with(softmax, Normalization::kAll, 2)),
                       vector_of({.2242078180, .6094600376, 0, 0}), 1e-9));
  for (const auto normalization : {Normalization::kSelected, Normalization::kAuto}) {
    EXPECT_TRUE(close_to(weights(with(softmax, normalization, 2)),
                         vector_of({.2689414214, .7310585786, 0, 0}), 1e-9));
    EXPECT_TRUE(close_to(weights(with(sigmoid, normalization, 2)),
                         vector_of({.4535508968, .5464491032, 0, 0}), 1e-9));
  }
  EXPECT_TRUE(close_to(weights(with(softmax, Normalization::kAuto, 1)),
                       vector_of({0, .6094600376, 0, 0}), 1e-9));
  EXPECT_TRUE(close_to(weights(with(sigmoid, Normalization::kAuto, 1)),
                       vector_of({0, 1 / (1 + std::exp(-2.0)), 0, 0}), 1e-9));
  EXPECT_TRUE(close_to(weights(with(sigmoid, Normalization::kAuto, 2).route_scale(2.5)),
                       vector_of({2.5 * .4535508968, 2.5 * .5464491032, 0, 0}), 1e-9));

  const GateOutput output =
      gate_with_logits(with(softmax, Normalization::kAuto, 2).z_loss_coeff(.5), logits)
          ->forward(one_token());
  ASSERT_EQ(output.losses.size(), 1u);
  EXPECT_EQ(output.losses[0].name, "z_loss");
  EXPECT_NEAR(output.losses[0].raw.item<double>(), 6.2259327045, 1e-9);
  EXPECT_NEAR(output.losses[0].value.item<double>(), .5 * 6.2259327045, 1e-9);
  EXPECT_EQ(ids_of(output.routing.expert_idx), (std::vector<int64_t>{1, 0}));
  EXPECT_EQ(ids_of(output.stats.tokens_per_expert), (std::vector<int64_t>{1, 1, 0, 0}));
  EXPECT_EQ(output.stats.num_assignments, 2);
}

TEST(TopKGate, SelectedEqualsAllRenormalised) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const Tensor weight = random_tensor({8, 6}, 2);
  for (int64_t K = 1; K <= 8; ++K) {
    TopKGateOptions options = TopKGateOptions(6, 8).top_k(K);
    const auto dense = [&](Normalization normalization) {
      const auto gate = float64_gate(options.normalization(normalization), weight);
      return gates::dense_weights(gate->forward(input_of(tokens)).routing, 8);
    };
    const Tensor all = dense(Normalization::kAll);
    EXPECT_TRUE(close_to(dense(Normalization::kSelected), all / all.sum(1, true), 1e-15)) << K;
  }
}

TEST(TopKGate, AllExpertsAreDense) {
  for (const auto type : {at::kFloat, at::kDouble}) {
    const Tensor tokens = random_tensor({37, 6}, 1, -1, 1, type);
    for (const auto normalization : {Normalization::kSelected, Normalization::kAll}) {
      TopKGate gate(TopKGateOptions(6, 8).top_k(8).normalization(normalization));
      gate.to(type);
      const Tensor dense = gates::dense_weights(gate.forward(input_of(tokens)).routing, 8);
      // Absolute: a row of weights sums to 1.
      const Tensor expected = tokens.mm(gate.weight.t()).softmax(1);
      EXPECT_LE((dense - expected).abs().max().item<double>(), 1e-7);
    }
  }
}

TEST(TopKGate, EqualsReference) {
  const Tensor tokens = random_tensor({37, 6}, 1, -2, 2);
  const Tensor weight = random_tensor({8, 6}, 2);
  const Tensor bias = random_tensor({8}, 3);
  for (const auto score : {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid}) {
    for (const auto normalization : {Normalization::kSelected, Normalization::kAll}) {
      for (int64_t K = 1; K <= 8; ++K) {
        TopKGateOptions options = TopKGateOptions(6, 8).top_k(K).bias(true).route_scale(1.5);
        options.score_function(score).normalization(normalization).z_loss_coeff(1);
        const auto gate = float64_gate(options, weight, bias);
        const GateOutput output = gate->forward(input_of(tokens));
        const auto expected = reference_router(tokens.mm(weight.t()) + bias, options);
        EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
        EXPECT_TRUE(close_to(gates::dense_weights(output.routing, 8), expected.weights, 1e-14));
        EXPECT_TRUE(close_to(output.balance.score_sum, expected.score_sum, 1e-14));
        EXPECT_TRUE(close_to(output.losses[0].raw, expected.lse_square_sum / 37, 1e-14));
        const Tensor rows = output.routing.weights.view({37, K});
        EXPECT_TRUE(rows.slice(1, 1).le(rows.slice(1, 0, -1)).all().item<bool>());
        EXPECT_EQ(output.routing.top_k, K);
        EXPECT_EQ(output.stats.tokens_per_expert.sum().item<int64_t>(), 37 * K);
      }
    }
  }
}

TEST(TopKGate, ExpertPermutation) {
  const Tensor tokens = random_tensor({37, 6}, 1, -2, 2);
  const Tensor weight = random_tensor({5, 6}, 2);
  const Tensor permutation = at::tensor({3, 0, 4, 1, 2}, at::kLong);  // new id -> old id
  const TopKGateOptions options = TopKGateOptions(6, 5).top_k(2).z_loss_coeff(.1);
  const auto gate = float64_gate(options, weight);
  const auto permuted = float64_gate(options, weight.index_select(0, permutation));
  const GateOutput a = gate->forward(input_of(tokens));
  const GateOutput b = permuted->forward(input_of(tokens));
  EXPECT_TRUE(close_to(b.routing.weights, a.routing.weights, 1e-14));
  EXPECT_TRUE(same_bits(permutation.index_select(0, b.routing.expert_idx),
                        a.routing.expert_idx.to(at::kLong)));
  EXPECT_TRUE(close_to(aux_loss(b).value, aux_loss(a).value, 1e-14));
  EXPECT_TRUE(close_to(b.losses[0].value, a.losses[0].value, 1e-14));
  (a.routing.weights.square().sum() + aux_loss(a).value + a.losses[0].value).backward();
  (b.routing.weights.square().sum() + aux_loss(b).value + b.losses[0].value).backward();
  EXPECT_TRUE(
      close_to(permuted->weight.grad(), gate->weight.grad().index_select(0, permutation), 1e-13));
}

TEST(TopKGate, TokenPermutation) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const Tensor order = at::arange(36, -1, -1, at::kLong);
  const auto gate = float64_gate(TopKGateOptions(6, 8).top_k(3));
  const Routing a = gate->forward(input_of(tokens)).routing;
  const Routing b = gate->forward(input_of(tokens.index_select(0, order))).routing;
  EXPECT_TRUE(same_bits(b.weights.view({37, 3}), a.weights.view({37, 3}).index_select(0, order)));
  EXPECT_TRUE(
      same_bits(b.expert_idx.view({37, 3}), a.expert_idx.view({37, 3}).index_select(0, order)));
}

TEST(TopKGate, ShiftInvariance) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const Tensor weight = random_tensor({8, 6}, 2);
  const double c = 0.75;
  for (const auto normalization : {Normalization::kSelected, Normalization::kAll}) {
    TopKGateOptions options = TopKGateOptions(6, 8).top_k(2).bias(true).z_loss_coeff(1);
    options.normalization(normalization);
    const auto at_zero = float64_gate(options, weight)->forward(input_of(tokens));
    const auto shifted =
        float64_gate(options, weight, at::full({8}, c, at::kDouble))->forward(input_of(tokens));
    EXPECT_TRUE(same_bits(shifted.routing.expert_idx, at_zero.routing.expert_idx));
    EXPECT_TRUE(close_to(shifted.routing.weights, at_zero.routing.weights, 1e-14));
    const Tensor lse = tokens.mm(weight.t()).logsumexp(1);
    EXPECT_NEAR((shifted.losses[0].raw - at_zero.losses[0].raw).item<double>(),
                (2 * c * lse + c * c).mean().item<double>(), 1e-13);
  }
}

TEST(TopKGate, BatchesAdd) {
  const Tensor tokens = random_tensor({37, 6}, 1);
  const Tensor cotangent = random_tensor({37 * 2}, 3);
  const TopKGateOptions options = TopKGateOptions(6, 8).z_loss_coeff(.1).aux_loss_coeff(.5);
  struct Total {
    Tensor gradient, aux, z, weights;
  };
  const auto run = [&](const std::vector<int64_t>& sizes) {
    const auto gate = float64_gate(options, random_tensor({8, 6}, 2));
    std::vector<GateOutput> outputs;
    Tensor counts = at::zeros({8}, at::kLong);
    int64_t first = 0;
    for (const int64_t size : sizes) {
      GateInput input = input_of(tokens.narrow(0, first, size));
      input.tokens_global = 37;
      outputs.push_back(gate->forward(input));
      counts += outputs.back().balance.tokens_per_expert;
      first += size;
    }
    std::vector<Tensor> weights;
    Tensor aux = at::zeros({}, at::kDouble), z = aux;
    for (const GateOutput& output : outputs) {
      weights.push_back(output.routing.weights);
      aux = aux + gates::load_balance_loss(output.balance, counts, 37).value;
      z = z + output.losses[0].value;
    }
    const Tensor all = at::cat(weights);
    ((all * cotangent).sum() + aux + z).backward();
    return Total{gate->weight.grad(), aux, z, all};
  };
  const Total one = run({37});
  const Total two = run({20, 0, 17});
  EXPECT_TRUE(close_to(two.weights, one.weights, 1e-14));
  EXPECT_TRUE(close_to(two.aux, one.aux, 1e-14));
  EXPECT_TRUE(close_to(two.z, one.z, 1e-14));
  EXPECT_TRUE(close_to(two.gradient, one.gradient, 1e-13));
}

TEST(TopKGate, MaskedTokens) {
  for (const auto score : {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid}) {
    TopKGateOptions options = TopKGateOptions(6, 8).top_k(3).z_loss_coeff(.1).bias(true);
    options.score_function(score);
    const Tensor valid = at::arange(37, at::kLong).remainder(3).ne(1);
    const int64_t num_valid = valid.sum().item<int64_t>();
    Tensor padded = random_tensor({37, 6}, 1);
    const Tensor tokens = padded.index({valid}).clone();
    padded.index_put_({valid.logical_not()}, NAN);
    const auto plain = float64_gate(options);
    const auto masked = float64_gate(options);
    padded.set_requires_grad(true);
    const GateOutput a = plain->forward(input_of(tokens));
    const GateOutput b = masked->forward(input_of(padded, valid));
    EXPECT_NO_THROW(gates::validate(b.routing, 8, "test"));
    EXPECT_EQ(b.routing.top_k, 0);
    EXPECT_TRUE(
        same_bits(b.routing.token_offsets.slice(0, 1) - b.routing.token_offsets.slice(0, 0, -1),
                  valid.to(at::kInt) * 3));
    EXPECT_TRUE(same_bits(b.routing.weights, a.routing.weights));
    EXPECT_TRUE(same_bits(b.routing.expert_idx, a.routing.expert_idx));
    EXPECT_TRUE(close_to(aux_loss(b).value, aux_loss(a).value, 1e-14));
    EXPECT_TRUE(close_to(b.losses[0].value, a.losses[0].value, 1e-14));
    EXPECT_EQ(b.stats.num_tokens, num_valid);
    EXPECT_EQ(b.stats.num_assignments, 3 * num_valid);
    EXPECT_EQ(b.stats.non_finite_tokens, 0);
    EXPECT_TRUE(same_bits(b.stats.tokens_per_expert, a.stats.tokens_per_expert));
    const Tensor cotangent = random_tensor({3 * num_valid}, 3);
    ((a.routing.weights * cotangent).sum() + aux_loss(a).value + a.losses[0].value).backward();
    ((b.routing.weights * cotangent).sum() + aux_loss(b).value + b.losses[0].value).backward();
    EXPECT_TRUE(close_to(masked->weight.grad(), plain->weight.grad(), 1e-13));
    EXPECT_TRUE(close_to(masked->bias.grad(), plain->bias.grad(), 1e-13));
    EXPECT_TRUE(same_bits(padded.grad().index({valid.logical_not()}),
                          at::zeros({37 - num_valid, 6}, at::kDouble)));
  }
}

TEST(TopKGate, AllValidIsFixedWidth) {
  const auto gate = float64_gate(TopKGateOptions(6, 8));
  const Tensor tokens = random_tensor({5, 6}, 1);
  const GateOutput a = gate->forward(input_of(tokens));
  const GateOutput b = gate->forward(input_of(tokens, at::ones({5}, at::kBool)));
  EXPECT_TRUE(same_bits(gates::explicit_offsets(b.routing), gates::explicit_offsets(a.routing)));
  EXPECT_TRUE(same_bits(b.routing.weights, a.routing.weights));
}

/// Bytes of this thread's tensors that are alive, counted from the construction.
class LiveBytes {
 public:
  LiveBytes()
      : counter_(std::make_shared<Counter>()),
        guard_(c10::DebugInfoKind::PROFILER_STATE, counter_) {}
  int64_t value() const { return counter_->bytes; }

 private:
  struct Counter : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
      bytes += size;
    }
    bool memoryProfilingEnabled() const override { return true; }
    int64_t bytes = 0;
  };
  std::shared_ptr<Counter> counter_;
  c10::DebugInfoGuard guard_;
};

TEST(TopKGate, SavedBytes) {
  const int64_t T = 501, D = 64, E = 40, K = 2;
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const Tensor tokens = random_tensor({T, D}, 1, -1, 1, type).set_requires_grad(true);
    TopKGate gate(TopKGateOptions(D, E).top_k(K).z_loss_coeff(.1));
    const LiveBytes live;
    Tensor weights, loss;
    {
      GateOutput output = gate.forward(input_of(tokens));
      weights = output.routing.weights;
      loss = aux_loss(output).value + output.losses[0].value;
    }
    EXPECT_GE(live.value(), 4 * T * K);
    EXPECT_LE(live.value(), 8 * T * K + 64 * E) << type;
    (weights.sum() + loss).backward();
    EXPECT_EQ(tokens.grad().scalar_type(), type);
  }
}

}  // namespace
}  // namespace perseid::testing
