// One process.
//   EqualsDense       outputs and all gradients of the sparse layer = a sum over all experts, 1e-12
//   NarrowTypes       bfloat16 and float16 are the float64 layer up to their rounding
//   Gradcheck         finite differences of outputs and losses, 1e-7
//   IdleExperts       experts without rows: zero, defined gradients
//   Shared            a shared expert is added to every token's output
//   Errors            one text for each wrong argument
#include <gtest/gtest.h>

#include "gates/baseline_gates.h"
#include "kernels/error.h"
#include "tests/gradcheck.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

std::vector<LayerCase> all_cases() {
  std::vector<LayerCase> cases;
  CapacityOptions tight;
  tight.capacity_factor = 0.7;
  CapacityOptions by_probability = tight;
  by_probability.drop_policy = DropPolicy::kProbability;
  for (const int64_t num_experts : {1, 5, 8}) {
    for (int64_t top_k = 1; top_k <= num_experts; ++top_k) {
      for (const int64_t num_tokens : {0, 1, 37}) {
        for (const int num_gates : {1, 2}) {
          for (const ExpertKind kind :
               {ExpertKind::kPlain, ExpertKind::kGated, ExpertKind::kGatedBias, ExpertKind::kLinear,
                ExpertKind::kModule}) {
            for (const CapacityOptions& capacity : {CapacityOptions{}, tight, by_probability}) {
              cases.push_back({num_experts, top_k, num_tokens, num_gates, kind, capacity});
            }
          }
        }
      }
    }
  }
  return cases;
}

std::string name_of(const LayerCase& c) {
  return "E=" + std::to_string(c.num_experts) + " K=" + std::to_string(c.top_k) +
         " T=" + std::to_string(c.num_tokens) + " G=" + std::to_string(c.num_gates) +
         " kind=" + std::to_string(static_cast<int>(c.kind)) +
         " capacity=" + std::to_string(c.capacity.capacity_factor) +
         " policy=" + std::to_string(static_cast<int>(c.capacity.drop_policy));
}

struct Gradients {
  std::vector<at::Tensor> outputs;
  at::Tensor tokens;
  std::vector<at::Tensor> parameters;
};

Gradients gradients_of(MoELayer& layer, const at::Tensor& tokens,
                       const std::function<std::vector<at::Tensor>(const at::Tensor&)>& forward) {
  layer.zero_grad();
  at::Tensor x = tokens.clone().requires_grad_(true);
  Gradients result;
  result.outputs = forward(x);
  weighted_loss(result.outputs, 0).backward();
  result.tokens = x.grad();
  for (const at::Tensor& parameter : layer.parameters()) {
    result.parameters.push_back(parameter.grad().defined() ? parameter.grad().clone()
                                                           : at::Tensor());
  }
  return result;
}

TEST(Layer, EqualsDense) {
  int64_t index = 0;
  for (const LayerCase& c : all_cases()) {
    if (!takes_case(index++)) continue;
    SCOPED_TRACE(name_of(c));
    const auto layer = make_layer(c, make_parallel_groups(comm::self_group()));
    const at::Tensor tokens = case_tokens(c.num_tokens);
    const Gradients sparse = gradients_of(
        *layer, tokens, [&](const at::Tensor& x) { return layer->forward(x).outputs; });
    const Gradients dense = gradients_of(
        *layer, tokens, [&](const at::Tensor& x) { return dense_outputs(*layer, c, x); });
    for (size_t g = 0; g < sparse.outputs.size(); ++g) {
      EXPECT_TRUE(close_to(sparse.outputs[g], dense.outputs[g], 1e-12));
    }
    EXPECT_TRUE(close_to(sparse.tokens, dense.tokens, 1e-12));
    for (size_t i = 0; i < sparse.parameters.size(); ++i) {
      const at::Tensor& parameter = layer->parameters()[i];
      // Relative to a typical gradient: a gradient of exactly 0 may leave rounding in the
      // reference.
      const at::Tensor expected =
          dense.parameters[i].defined() ? dense.parameters[i] : at::zeros_like(parameter);
      ASSERT_TRUE(sparse.parameters[i].defined()) << "parameter " << i;
      EXPECT_LE((sparse.parameters[i] - expected).abs().sum().item<double>(),
                1e-12 * (1 + expected.abs().sum().item<double>()))
          << "parameter " << i;
    }
    if (HasFailure()) return;
  }
}

TEST(Layer, NarrowTypes) {
  for (const auto& [dtype, tolerance] : {std::pair{at::kBFloat16, 0x1p-6}, {at::kHalf, 0x1p-9}}) {
    for (const ExpertKind kind :
         {ExpertKind::kPlain, ExpertKind::kGatedBias, ExpertKind::kModule}) {
      LayerCase c{5, 2, 37, 1, kind, {}};
      SCOPED_TRACE(name_of(c) + " " + c10::toString(dtype));
      const auto narrow = make_layer(c, make_parallel_groups(comm::self_group()), dtype);
      const auto wide = make_layer(c, make_parallel_groups(comm::self_group()));
      for (size_t i = 0; i < wide->parameters().size(); ++i) {  // the rounded parameters
        wide->parameters()[i].detach().copy_(narrow->parameters()[i].detach());
      }
      const at::Tensor tokens = case_tokens(37, dtype);
      const auto run = [&](MoELayer& layer, const at::Tensor& x) {
        return gradients_of(layer, x,
                            [&](const at::Tensor& y) { return layer.forward(y).outputs; });
      };
      const Gradients actual = run(*narrow, tokens);
      const Gradients expected = run(*wide, tokens.to(at::kDouble));
      const auto expect_close = [&](const at::Tensor& a, const at::Tensor& e, const char* what) {
        EXPECT_EQ(a.scalar_type() == at::kFloat, std::string(what) == "gate") << what;
        EXPECT_LE((a.to(at::kDouble) - e).norm().item<double>(),
                  tolerance * e.norm().item<double>())
            << what;
      };
      expect_close(actual.outputs[0], expected.outputs[0], "output");
      expect_close(actual.tokens, expected.tokens, "tokens");
      for (size_t i = 0; i < actual.parameters.size(); ++i) {
        const bool is_gate = narrow->parameters()[i].scalar_type() == at::kFloat;
        expect_close(actual.parameters[i], expected.parameters[i], is_gate ? "gate" : "expert");
      }
    }
  }
}

TEST(Layer, Gradcheck) {
  for (const ExpertKind kind : {ExpertKind::kPlain, ExpertKind::kGated, ExpertKind::kGatedBias,
                                ExpertKind::kLinear, ExpertKind::kModule}) {
    for (const int num_gates : {1, 2}) {
      LayerCase c{5, 2, 9, num_gates, kind, {}};
      SCOPED_TRACE(name_of(c));
      const auto layer = make_layer(c, make_parallel_groups(comm::self_group()));
      at::Tensor tokens = case_tokens(c.num_tokens);
      std::vector<at::Tensor> inputs = {tokens};
      for (const at::Tensor& parameter : layer->parameters()) inputs.push_back(parameter);
      GradcheckOptions options;
      options.max_elements = 24;
      EXPECT_TRUE(gradients_match(
          [&] {
            MoEOutput out = layer->forward(tokens);
            std::vector<at::Tensor> outputs = out.outputs;
            outputs.push_back(out.loss());
            return outputs;
          },
          inputs, 1e-7, options));
    }
  }
}

TEST(Layer, IdleExperts) {
  for (const ExpertKind kind : {ExpertKind::kGatedBias, ExpertKind::kLinear, ExpertKind::kModule}) {
    const ExpertPlacement placement = ExpertPlacement::contiguous(3, 1);
    MoELayer layer({std::make_shared<gates::SingleGate>(3, 1)},
                   make_experts(kind, placement, 0, at::kDouble), placement,
                   make_parallel_groups(comm::self_group()));
    layer.forward(case_tokens(4)).output().sum().backward();
    double used = 0;
    for (const auto& parameter : layer.experts()->named_parameters()) {
      const at::Tensor& gradient = parameter.value().grad();
      ASSERT_TRUE(gradient.defined()) << parameter.key();
      if (kind == ExpertKind::kModule) {
        const bool idle = parameter.key().find("expert_1") == std::string::npos;
        const double size = gradient.abs().sum().item<double>();
        if (idle) {
          EXPECT_EQ(size, 0) << parameter.key();
        }
        used += size;
      } else {
        EXPECT_EQ(gradient[0].abs().sum().item<double>(), 0) << parameter.key();
        EXPECT_EQ(gradient[2].abs().sum().item<double>(), 0) << parameter.key();
        used += gradient[1].abs().sum().item<double>();
      }
    }
    EXPECT_GT(used, 0);
  }
}

// A selected pair whose weight underflows to 0 still runs.
TEST(Layer, UnderflowedWeightsAreDispatched) {
  const ExpertPlacement placement = ExpertPlacement::contiguous(3, 1);
  const auto gate = std::make_shared<gates::TopKGate>(gates::TopKGateOptions(kDModel, 3).top_k(3));
  gate->to(at::kDouble);
  const at::Tensor rows = at::zeros({3, kDModel}, at::kDouble);
  rows[1].fill_(2000);
  rows[2].fill_(-2000);
  gate->weight.set_data(rows);
  MoELayer layer({gate}, make_experts(ExpertKind::kGated, placement, 0, at::kDouble), placement,
                 make_parallel_groups(comm::self_group()));
  const at::Tensor tokens = case_tokens(4).abs().add(1).set_requires_grad(true);
  const MoEOutput out = layer.forward(MoEInput(tokens));
  EXPECT_EQ(out.stats.rows_processed, 3 * 4);
  out.output().sum().backward();
  EXPECT_TRUE(tokens.grad().isfinite().all().item<bool>());
}

TEST(Layer, Shared) {
  LayerCase c;
  const auto plain = make_layer(c, make_parallel_groups(comm::self_group()));
  c.shared = true;
  const auto layer = make_layer(c, make_parallel_groups(comm::self_group()));
  const at::Tensor tokens = case_tokens(c.num_tokens);
  const auto shared =
      make_experts(ExpertKind::kGated, ExpertPlacement::contiguous(1, 1), 0, at::kDouble);
  EXPECT_TRUE(close_to(layer->forward(tokens).output(),
                       plain->forward(tokens).output() + dense_expert(*shared, 0, tokens), 1e-12));
}

TEST(Layer, Statistics) {
  LayerCase c{5, 2, 37, 2, ExpertKind::kGated, {}};
  c.capacity.capacity_factor = 0.5;  // C = ceil(0.5 * 37 * 2 / 5) = 8
  const auto layer = make_layer(c, make_parallel_groups(comm::self_group()));
  const MoEOutput out = layer->forward(case_tokens(c.num_tokens));
  ASSERT_EQ(out.stats.gates.size(), 2u);
  int64_t over = 0;
  for (const gates::GateStats& gate : out.stats.gates) {
    EXPECT_EQ(gate.tokens_per_expert.sum().item<int64_t>(), 74);
    over += (gate.tokens_per_expert - 8).clamp_min(0).sum().item<int64_t>();
  }
  EXPECT_EQ(out.stats.num_dropped, over);
  EXPECT_GT(over, 0);
  EXPECT_EQ(out.stats.num_tokens, 37);
  EXPECT_LE(out.stats.rows_processed, 148 - over);
  EXPECT_DOUBLE_EQ(max_vio(at::tensor({2, 2, 4, 0})), 1.0);
}

template <typename ErrorType>
void expect_error(const std::function<void()>& call, const std::string& text) {
  try {
    call();
    ADD_FAILURE() << "no error, expected: " << text;
  } catch (const ErrorType& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos)
        << "got:      " << error.what() << "\nexpected: " << text;
  }
}

TEST(Layer, Errors) {
  const auto groups = make_parallel_groups(comm::self_group());
  const auto layer = make_layer({}, groups);
  const auto call = [&](const MoEInput& input) {
    return [&layer, input] { layer->forward(input); };
  };
  expect_error<ConfigError>(call(at::zeros({3, 7}, at::kDouble)),
                            "[moe_layer] tokens.width=7 differs from d_in=6 of the experts");
  expect_error<ConfigError>(call(at::zeros({3}, at::kDouble)), "[moe_layer] tokens.dim=1 is not 2");
  expect_error<ConfigError>(call(at::Tensor()), "[moe_layer] tokens.dim=-1 is not 2");
  expect_error<ConfigError>(call(at::zeros({3, 6})),
                            "[moe_layer] tokens.dtype=Float differs from the experts' Double");
  expect_error<ConfigError>(call(at::zeros({3, 6}, at::kInt)),
                            "[moe_layer] dtype=Int is not supported");
  MoEInput features(at::zeros({3, 6}, at::kDouble));
  features.features = at::zeros({2, 6}, at::kDouble);
  expect_error<ConfigError>(call(features), "[moe_layer] features.rows=2 differs from 3 tokens");
  MoEInput valid(at::zeros({3, 6}, at::kDouble));
  valid.valid = at::ones({4}, at::kBool);
  EXPECT_THROW(layer->forward(valid), ConfigError);

  at::Tensor nan = case_tokens(3);
  nan[1][2] = NAN;
  expect_error<Diverged>(call(nan), "[moe_layer] non_finite_tokens=1 exceeds 0");

  const ExpertPlacement three = ExpertPlacement::contiguous(3, 1);
  const auto experts = make_experts(ExpertKind::kGated, three, 0, at::kFloat);
  const auto gate = std::make_shared<gates::SingleGate>(4);
  expect_error<ConfigError>([&] { MoELayer({gate}, experts, three, groups); },
                            "[moe_layer] gate.num_experts=4 differs from num_experts=3");
  expect_error<ConfigError>([&] { MoELayer({}, experts, three, groups); },
                            "[moe_layer] gates=0 is empty");
  const ExpertPlacement two_ranks = ExpertPlacement::contiguous(3, 2);
  expect_error<ConfigError>(
      [&] { MoELayer({std::make_shared<gates::SingleGate>(3)}, experts, two_ranks, groups); },
      "[moe_layer] placement.num_ranks=2 differs from ep_size=1");
  expect_error<ConfigError>([&] { GroupedMLP(GroupedMLPOptions(0, 4), three, 0); },
                            "[grouped_mlp] d_in=0 must be at least 1");
  expect_error<ConfigError>([&] { GroupedMLP(GroupedMLPOptions(4, -1), three, 0); },
                            "[grouped_mlp] d_ff=-1 is below 1");
}

TEST(Layer, CountedNonFiniteTokensStayVisible) {
  LayerCase c;
  const auto groups = make_parallel_groups(comm::self_group());
  const ExpertPlacement placement = ExpertPlacement::contiguous(c.num_experts, 1);
  MoELayerOptions options;
  options.on_nonfinite = OnNonFinite::kCount;
  const auto reference = make_layer(c, groups);
  MoELayer layer(reference->gates(), reference->experts(), placement, groups, options);
  at::Tensor tokens = case_tokens(4);
  tokens[1][2] = NAN;
  MoEOutput out = layer.forward(tokens);
  out.stats.read();
  EXPECT_EQ(out.stats.gates[0].non_finite_tokens, 1);
  EXPECT_TRUE(out.output()[1].isnan().all().item<bool>());
  EXPECT_FALSE(out.output().index_select(0, at::tensor({0, 2, 3})).isnan().any().item<bool>());
}

}  // namespace
}  // namespace perseid::testing
