// Gates whose parts have weights and orders of experts of their own: COMET and DSelect-k.
//   GoldenComet, GoldenDSelectK  weights of each part by the published examples, 1e-9
//   SumIsForward       sum of tree_weights over parts = weights of forward: E = 1 .. 9, 16, 17, K =
//   1
//                      .. 4, open to saturated, per token and static, masked; 1e-12, float32 1e-6
//   GradientIsForward  and its gradients, with respect to tokens and all parameters, 1e-10
//   CentralDifferences of tree_weights, another coefficient for each part, 1e-7
//   Saturated          switches get gradients of exactly 0
//   Exact              min_weight and hard_eval change nothing; TypeOfArithmetic
//   NotFinite          NaN and infinities where forward has them, infinite ones without NaN
//   gradients OneExpert, NoTokens IdentityMap        forward_mapped = forward: weights, routing,
//   losses, gradients, bit for bit CommonMap          the same order for all parts relabels the
//   experts MapsPerPart        another order for each part, also one that shares experts:
//   tree_weights placed
//                      by the map, values 1e-12 and gradients 1e-10
//   MappedDifferences  central differences of forward_mapped with all losses, 1e-7
//   Losses             of trees and selectors: same bits whatever the map
//   Errors             text of every check
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "gates/tree_gate.h"
#include "tests/gates/comet_fixture.h"
#include "tests/gates/dselect_k_fixture.h"
#include "tests/gradcheck.h"

namespace perseid::testing {
namespace {

using gates::TreeGate;

constexpr int64_t kWidth = 4;
enum class Kind { kComet, kDSelectK, kRenormalized };
constexpr Kind kKinds[] = {Kind::kComet, Kind::kDSelectK, Kind::kRenormalized};

struct TreeCase {
  Kind kind = Kind::kComet;
  int64_t E = 5, K = 2;
  double gamma = 1;
  bool per_token = true;
  bool is_masked = false;
  bool has_losses = false;
  at::ScalarType type = at::kDouble;
  InputNorm norm = InputNorm::kNone;
  double min_weight = 0;
  bool hard_eval = false;

  template <typename Options>
  std::shared_ptr<TreeGate> make_of(Options options) const {
    options.top_k(K).gamma(gamma).per_token(per_token).entropy_coeff(has_losses ? .7 : 0);
    options.balance_coeff(has_losses ? .4 : 0).min_weight(min_weight).hard_eval(hard_eval);
    return random_gate(options, 1, type, norm);
  }
  std::shared_ptr<TreeGate> make() const {
    if (kind == Kind::kComet) return make_of(CometGateOptions(kWidth, E));
    return make_of(DSelectKGateOptions(kWidth, E)
                       .renormalize(kind == Kind::kRenormalized)
                       .penalty_coeff(has_losses ? 1e-3 : 0));
  }
  std::string name() const {
    std::ostringstream text;
    text << "kind " << static_cast<int>(kind) << " E " << E << " K " << K << " gamma " << gamma
         << " per token " << per_token << " masked " << is_masked << " " << type;
    return text.str();
  }
};

/// body(case) for both gates and all sizes, every second one with tokens that are not valid: open,
/// partly and wholly saturated switches, and one decision for all tokens.
template <typename Body>
void for_each_case(const Body& body) {
  TreeCase at;
  for (const Kind kind : kKinds) {
    for (const int64_t E : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17}) {
      for (int64_t K = 1; K <= std::min<int64_t>(E, 4); ++K) {
        at.kind = kind;
        at.E = E;
        at.K = K;
        for (const double gamma : {10., 1., .01, 0.}) {
          at.per_token = gamma > 0;
          at.gamma = gamma > 0 ? gamma : 1;
          at.is_masked = !at.is_masked;
          body(at);
        }
        at.is_masked = !at.is_masked;  // the other half for the next size
      }
    }
  }
}

Tensor tokens_of(const TreeCase& at, int64_t num_tokens = 7) {
  return random_tensor({num_tokens, kWidth}, 1, -1, 1, at.type);
}
Tensor some_valid(int64_t num_tokens) { return at::arange(num_tokens).remainder(3).ne(1); }
GateInput masked_input(const TreeCase& at, const Tensor& tokens) {
  return input_of(tokens,
                  at.is_masked ? std::optional<Tensor>(some_valid(tokens.size(0))) : std::nullopt);
}

/// [K, E], a rotation of another step for each part: different permutations, none its own inverse
/// if E > 2 but for a few.
Tensor rotated_map(int64_t K, int64_t E) {
  Tensor map = at::empty({K, E}, at::kInt);
  for (int64_t u = 0; u < K; ++u) map.select(0, u).copy_((at::arange(E) + u + 1).remainder(E));
  return map;
}
Tensor identity_map(int64_t K, int64_t E) {
  return at::arange(E).expand({K, E}).to(at::kInt).contiguous();
}

/// Weights of parts at the experts of a map, [T, E].
Tensor placed(const Tensor& weights, const Tensor& map) {
  const int64_t T = weights.size(0), E = weights.size(2);
  const Tensor experts = map.to(at::kLong).reshape({1, -1}).expand({T, -1});
  return at::zeros({T, E}, weights.options()).scatter_add(1, experts, weights.flatten(1));
}

/// Gradients of sum(coefficients * output) in one vector: tokens, then parameters.
Tensor gradients_of(const TreeGate& gate, const Tensor& tokens, const Tensor& output,
                    const Tensor& coefficients) {
  std::vector<Tensor> inputs = gate.parameters(), parts;
  inputs.push_back(tokens);
  if (output.requires_grad()) {
    parts = torch::autograd::grad({(output * coefficients).sum()}, inputs, {}, false, false, true);
  }
  parts.resize(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    parts[i] = parts[i].defined() ? parts[i].reshape({-1}) : at::zeros_like(inputs[i]).view({-1});
  }
  return at::cat(parts);
}

/// Relative to the largest expected value, absolute where all are below 1.
void expect_near(const Tensor& actual, const Tensor& expected, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  if (actual.numel() == 0) return;
  const double scale = std::max(1.0, expected.detach().abs().max().item<double>());
  EXPECT_LE((actual.detach() - expected.detach()).abs().max().item<double>(), tolerance * scale)
      << what;
}

TEST(TreeGate, GoldenComet) {
  const auto gate = gate_with_logits(CometGateOptions(1, 4), vector_of({.25, -.1, .5, 0, .6, -.25}),
                                     vector_of({.1, -.2, .3, 0, 0, .5, -.1, .2}));
  EXPECT_TRUE(close_to(gate->tree_weights(one_token()).reshape({-1}),
                       vector_of({.1583567096, .2159635547, .1017557460, 0, .2412240341, 0,
                                  .0341044582, .2485954974}),
                       4e-10));
  // Leaves of two levels, E = 6.
  const auto six =
      gate_with_logits(CometGateOptions(1, 6).top_k(1), vector_of({.25, -.1, .5, 0, .3}),
                       vector_of({.1, -.2, .3, 0, .4, -.3}));
  EXPECT_TRUE(close_to(
      six->tree_weights(one_token()).reshape({-1}),
      vector_of({.1326806975, .0982922782, .5346098916, .0459699440, .1884471887, 0}), 2e-10));
}

TEST(TreeGate, GoldenDSelectK) {
  const double a = 1 / (1 + std::exp(-.5)), b = 1 - a;
  for (const bool renormalize : {false, true}) {
    const auto gate = gate_with_logits(DSelectKGateOptions(1, 3).renormalize(renormalize),
                                       {.25, -.1, .6, 0}, {.3, -.2});
    const double sum = renormalize ? a * .703 + b * .5 : 1;
    EXPECT_TRUE(close_to(gate->tree_weights(one_token()).reshape({-1}) * sum,
                         vector_of({a * .10125, a * .055, a * .54675, 0, 0, b * .5}), 1e-14));
  }
}

TEST(TreeGate, SumIsForward) {
  for (const auto type : {at::kDouble, at::kFloat}) {
    for_each_case([&](TreeCase at) {
      at.type = type;
      const auto gate = at.make();
      const GateInput input = masked_input(at, tokens_of(at));
      const Tensor weights = gate->tree_weights(input);
      const Tensor expected = dense(gate->forward(input), at.E);
      ASSERT_EQ(weights.sizes(), (std::vector<int64_t>{7, at.K, at.E})) << at.name();
      EXPECT_EQ(weights.scalar_type(), type);
      EXPECT_TRUE(close_to(weights.sum(1), expected, type == at::kDouble ? 1e-12 : 1e-6))
          << at.name();
      EXPECT_TRUE(at::equal(weights.sum(1).eq(0), expected.eq(0))) << at.name();
    });
  }
}

TEST(TreeGate, GradientIsForward) {
  for_each_case([](const TreeCase& at) {
    const auto gate = at.make();
    const Tensor tokens = tokens_of(at).set_requires_grad(true);
    const GateInput input = masked_input(at, tokens);
    const Tensor coefficients = random_tensor({7, at.E}, 4);
    expect_near(gradients_of(*gate, tokens, gate->tree_weights(input).sum(1), coefficients),
                gradients_of(*gate, tokens, dense(gate->forward(input), at.E), coefficients), 1e-10,
                at.name());
  });
}

TEST(TreeGate, CentralDifferences) {
  TreeCase at;
  for (const Kind kind : kKinds) {
    for (const int64_t E : {2, 5, 6, 8}) {
      for (const bool per_token : {true, false}) {
        at.kind = kind;
        at.E = E;
        at.per_token = per_token;
        at.gamma = 1.5;
        at.norm = E == 5 ? InputNorm::kLayerNorm : InputNorm::kNone;
        const auto gate = at.make();
        const Tensor tokens = tokens_of(at);
        std::vector<Tensor> inputs = gate->parameters();
        if (per_token) inputs.push_back(tokens);
        const auto valid = E == 6 ? std::optional<Tensor>(some_valid(7)) : std::nullopt;
        EXPECT_TRUE(gradients_match(
            [&] { return std::vector<Tensor>{gate->tree_weights(input_of(tokens, valid))}; },
            inputs))
            << at.name();
      }
    }
  }
}

TEST(TreeGate, Saturated) {
  TreeCase at;
  at.gamma = 1e-9;
  for (const Kind kind : kKinds) {
    for (const int64_t E : {5, 8}) {
      at.kind = kind;
      at.E = E;
      const auto gate = at.make();
      const Tensor tokens = tokens_of(at, 37);
      const Tensor weights = gate->tree_weights(input_of(tokens));
      EXPECT_LE(weights.ne(0).sum(2).max().item<int64_t>(), 1);  // one output of a part
      (weights * random_tensor({37, 2, E}, 4)).sum().backward();
      const bool is_comet = kind == Kind::kComet;
      for (const auto& parameter : gate->named_parameters()) {
        const double largest = parameter.value().grad().abs().max().item<double>();
        EXPECT_TRUE(std::isfinite(largest)) << at.name();
        const bool is_switch = parameter.key().rfind(is_comet ? "split" : "code", 0) == 0;
        EXPECT_EQ(largest == 0, is_switch) << at.name() << parameter.key();
      }
    }
  }
}

TEST(TreeGate, Exact) {
  TreeCase at;
  for (const Kind kind : kKinds) {
    at.kind = kind;
    TreeCase cut = at;
    cut.min_weight = .1;
    cut.hard_eval = true;
    const Tensor tokens = tokens_of(at);
    EXPECT_TRUE(same_bits(cut.make()->tree_weights(input_of(tokens)),
                          at.make()->tree_weights(input_of(tokens))));
  }
}

TEST(TreeGate, TypeOfArithmetic) {
  TreeCase at;
  for (const Kind kind : kKinds) {
    at.kind = kind;
    const auto gate = at.make();
    gate->to(at::kBFloat16);
    const GateInput input = input_of(tokens_of(at).to(at::kBFloat16));
    const Tensor weights = gate->tree_weights(input);
    EXPECT_EQ(weights.scalar_type(), at::kFloat);
    EXPECT_TRUE(close_to(weights.sum(1), dense(gate->forward(input), at.E), 1e-6));
  }
}

TEST(TreeGate, NotFinite) {
  TreeCase at;
  at.K = 3;
  for (const Kind kind : kKinds) {
    at.kind = kind;
    Tensor spoilt = tokens_of(at);
    spoilt[2][1] = NAN;
    const auto gate = at.make();
    const Tensor weights = gate->tree_weights(input_of(spoilt)).sum(1);
    const Tensor expected = dense(gate->forward(input_of(spoilt)), at.E);
    EXPECT_TRUE(at::equal(weights.isnan(), expected.isnan()));
    EXPECT_TRUE(close_to(weights.nan_to_num(), expected.nan_to_num(), 1e-12));
    // Tokens that are not valid may hold anything.
    const Tensor valid = at::arange(7).ne(2);
    Tensor tokens = spoilt.clone().set_requires_grad(true);
    gate->tree_weights(input_of(tokens, valid)).square().sum().backward();
    EXPECT_TRUE(tokens.grad().isfinite().all().item<bool>());
    EXPECT_EQ(tokens.grad()[2].abs().max().item<double>(), 0);

    for (const auto& biases : {std::vector<double>{INFINITY}, {-INFINITY}, {INFINITY, INFINITY}}) {
      const auto infinite = at.make();
      const Tensor bias =
          infinite->named_parameters()[kind == Kind::kComet ? "leaf_bias" : "selector_bias"];
      for (size_t i = 0; i < biases.size(); ++i) bias.data()[static_cast<int64_t>(i)] = biases[i];
      tokens = tokens_of(at).set_requires_grad(true);
      const Tensor coefficients = random_tensor({7, at.E}, 4);
      const Tensor sum = infinite->tree_weights(input_of(tokens)).sum(1);
      const Tensor of_forward = dense(infinite->forward(input_of(tokens)), at.E);
      EXPECT_TRUE(close_to(sum, of_forward, 1e-12)) << at.name();
      expect_near(gradients_of(*infinite, tokens, sum, coefficients),
                  gradients_of(*infinite, tokens, of_forward, coefficients), 1e-10, at.name());
    }
    const auto none = at.make();
    none->named_parameters()[kind == Kind::kComet ? "leaf_bias" : "selector_bias"].data().fill_(
        -INFINITY);
    const Tensor alike = none->tree_weights(input_of(tokens));
    EXPECT_TRUE(close_to(alike.sum(1), dense(none->forward(input_of(tokens)), at.E), 1e-12));
    alike.sum().backward();
    EXPECT_TRUE(tokens.grad().isfinite().all().item<bool>());
  }
}

TEST(TreeGate, OneExpert) {
  TreeCase at;
  at.E = at.K = 1;
  for (const Kind kind : kKinds) {
    at.kind = kind;
    const auto gate = at.make();
    const GateInput input = input_of(tokens_of(at), some_valid(7));
    EXPECT_TRUE(
        same_bits(gate->tree_weights(input), some_valid(7).to(at::kDouble).view({7, 1, 1})));
    const GateOutput mapped = gate->forward_mapped(input, at::zeros({1, 1}, at::kInt));
    EXPECT_TRUE(same_bits(dense(mapped, 1), dense(gate->forward(input), 1)));
  }
}

TEST(TreeGate, NoTokens) {
  TreeCase at;
  for (const Kind kind : kKinds) {
    at.kind = kind;
    const auto gate = at.make();
    const Tensor weights = gate->tree_weights(input_of(tokens_of(at, 0)));
    EXPECT_EQ(weights.sizes(), (std::vector<int64_t>{0, 2, 5}));
    weights.sum().backward();
    const GateOutput output = gate->forward_mapped(input_of(tokens_of(at, 0)), rotated_map(2, 5));
    EXPECT_EQ(output.routing.num_assignments(), 0);
  }
}

/// Everything that a gate gives, and its gradients.
std::vector<Tensor> everything(const TreeCase& at, const Tensor& map) {
  const auto gate = at.make();
  const Tensor tokens = tokens_of(at, 37).set_requires_grad(true);
  const GateInput input = input_of(tokens, some_valid(37));
  const GateOutput output = map.defined() ? gate->forward_mapped(input, map) : gate->forward(input);
  std::vector<Tensor> found = {output.routing.weights, output.routing.expert_idx,
                               output.routing.token_offsets, output.stats.tokens_per_expert,
                               global_loss(output)};
  for (const auto& loss : output.losses) found.push_back(loss.value);
  Tensor total = output.routing.weights.square().sum() + global_loss(output);
  for (const auto& loss : output.losses) total = total + loss.value;
  total.backward();
  if (at.per_token) found.push_back(tokens.grad());
  for (const Tensor& parameter : gate->parameters()) found.push_back(parameter.grad());
  return found;
}

TEST(TreeGate, IdentityMap) {
  TreeCase at;
  at.has_losses = true;
  for (const Kind kind : kKinds) {
    for (const auto type : {at::kDouble, at::kFloat}) {
      for (const bool per_token : {true, false}) {
        for (const int64_t E : {5, 8, 17}) {
          at.kind = kind;
          at.type = type;
          at.per_token = per_token;
          at.E = E;
          const auto expected = everything(at, {});
          const auto found = everything(at, identity_map(2, E));
          ASSERT_EQ(found.size(), expected.size());
          for (size_t i = 0; i < found.size(); ++i) {
            EXPECT_TRUE(same_bits(found[i], expected[i])) << at.name() << " " << i;
          }
        }
      }
    }
  }
}

TEST(TreeGate, CommonMap) {
  TreeCase at;
  at.K = 3;
  for (const Kind kind : kKinds) {
    for (const int64_t E : {3, 5, 8}) {
      at.kind = kind;
      at.E = E;
      const Tensor order = rotated_map(1, E)[0], map = order.expand({3, E});  // not contiguous
      const auto gate = at.make();
      const GateInput input = input_of(tokens_of(at, 37));
      const GateOutput plain = gate->forward(input), mapped = gate->forward_mapped(input, map);
      const Tensor experts = order.to(at::kLong);
      EXPECT_TRUE(close_to(dense(mapped, E).index_select(1, experts), dense(plain, E), 1e-15))
          << at.name();
      EXPECT_TRUE(at::equal(mapped.stats.tokens_per_expert.index_select(0, experts),
                            plain.stats.tokens_per_expert))
          << at.name();
      EXPECT_TRUE(at::equal(mapped.routing.token_offsets, plain.routing.token_offsets));
      EXPECT_NO_THROW(gates::validate(mapped.routing, E, "test"));
    }
  }
}

TEST(TreeGate, MapsPerPart) {
  for_each_case([](const TreeCase& at) {
    const auto gate = at.make();
    const Tensor tokens = tokens_of(at).set_requires_grad(true);
    const GateInput input = masked_input(at, tokens);
    const Tensor coefficients = random_tensor({7, at.E}, 4);
    const Tensor rotated = rotated_map(at.K, at.E);
    for (const Tensor& map : {rotated, rotated.div(2, "floor")}) {
      const Tensor expected = placed(gate->tree_weights(input), map);
      const Tensor actual = dense(gate->forward_mapped(input, map), at.E);
      EXPECT_TRUE(close_to(actual, expected, 1e-12)) << at.name();
      expect_near(gradients_of(*gate, tokens, actual, coefficients),
                  gradients_of(*gate, tokens, expected, coefficients), 1e-10, at.name());
    }
  });
}

TEST(TreeGate, MappedDifferences) {
  TreeCase at;
  at.has_losses = true;
  at.gamma = 1.5;
  for (const Kind kind : kKinds) {
    for (const int64_t E : {2, 5, 8}) {
      for (const bool per_token : {true, false}) {
        at.kind = kind;
        at.E = E;
        at.per_token = per_token;
        const auto gate = at.make();
        const Tensor tokens = tokens_of(at), map = rotated_map(2, E);
        std::vector<Tensor> inputs = gate->parameters();
        if (per_token) inputs.push_back(tokens);
        EXPECT_TRUE(gradients_match(
            [&] {
              const GateOutput output = gate->forward_mapped(input_of(tokens, some_valid(7)), map);
              std::vector<Tensor> outputs = {dense(output, E), global_loss(output)};
              for (const auto& loss : output.losses) outputs.push_back(loss.value);
              return outputs;
            },
            inputs))
            << at.name();
      }
    }
  }
}

TEST(TreeGate, Losses) {
  TreeCase at;
  at.has_losses = true;
  for (const Kind kind : kKinds) {
    at.kind = kind;
    const auto gate = at.make();
    const GateInput input = input_of(tokens_of(at, 37));
    const GateOutput plain = gate->forward(input);
    const GateOutput mapped = gate->forward_mapped(input, rotated_map(2, at.E));
    ASSERT_EQ(mapped.losses.size(), plain.losses.size());
    EXPECT_EQ(plain.losses.size(), kind == Kind::kComet ? 1u : 2u);
    for (size_t i = 0; i < plain.losses.size(); ++i) {
      EXPECT_TRUE(same_bits(mapped.losses[i].value, plain.losses[i].value)) << plain.losses[i].name;
    }
    EXPECT_FALSE(close_to(dense(mapped, at.E), dense(plain, at.E), 1e-3));
    // The balance loss looks at the experts; a common order leaves it.
    const GateOutput common = gate->forward_mapped(input, rotated_map(1, at.E).expand({2, at.E}));
    EXPECT_TRUE(close_to(global_loss(common), global_loss(plain), 1e-14));
  }
}

TEST(TreeGate, Errors) {
  TreeCase at;
  for (const Kind kind : {Kind::kComet, Kind::kDSelectK}) {
    at.kind = kind;
    const auto gate = at.make();
    const GateInput input = input_of(tokens_of(at));
    const std::string who = kind == Kind::kComet ? "[comet_gate] " : "[dselect_k_gate] ";
    const auto error_of = [&](const Tensor& map) {
      return error_text<ConfigError>([&] { gate->forward_mapped(input, map); });
    };
    EXPECT_EQ(error_of(at::zeros({5, 2}, at::kInt)),
              who + "expert_map=Int[5, 2] is not [2, 5], the shape that the options give");
    EXPECT_EQ(error_of(at::zeros({2, 5}, at::kLong)), who + "expert_map.dtype=Long is not int32");
    EXPECT_EQ(error_of(at::zeros({2, 5}, at::TensorOptions(at::kInt).device(at::kMeta))),
              who + "expert_map.device=meta differs from tokens.device=cpu");
    EXPECT_EQ(error_of(identity_map(2, 5)), "no error");
    const GateInput narrow = input_of(at::zeros({3, kWidth - 1}, at::kDouble));
    EXPECT_EQ(error_text<ConfigError>([&] { gate->tree_weights(narrow); }),
              error_text<ConfigError>([&] { gate->forward(narrow); }));
  }
}

}  // namespace
}  // namespace perseid::testing
