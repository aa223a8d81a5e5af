// Layers on a device against the same layers on the host: outputs, losses, counts, and the
// gradients of tokens and of every parameter, in float64.
//   Gates         every gate of the conformance list
//   Float32       the same in float32, for which routers have kernels of their own
//   BatchGates    gates that choose for all tokens together
//   Experts       plain, gated, with biases, linear and modules; one gate and two
//   ZeroSizes     no token, one token, one expert
//   Valid         tokens that are not valid
//   Capacity      assignments dropped
//   Unread        with OnNonFinite::kCount the counts stay on the device until read()
//   NonFinite     a NaN is found at the end of the forward
//   Backends      at::_grouped_mm against the loop, with experts without rows first, amid and last
//   NarrowTypes   the layer in bfloat16 and float16, within their rounding
//   Sparsity      experts of few hidden values are refused
#include <gtest/gtest.h>

#include "gates/base_gate.h"
#include "gates/expert_choice_gate.h"
#include "gates/sinkhorn_gate.h"
#include "kernels/error.h"
#include "moe/grouped_gemm.h"
#include "moe/grouped_mlp.h"
#include "moe/moe_layer.h"
#include "tests/config_error.h"
#include "tests/device_mode.h"
#include "tests/moe/conformance_gates.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

using LayerMaker = std::function<std::shared_ptr<MoELayer>()>;

/// What one step of a layer gives, in host memory.
struct Step {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  MoEStats stats;
};

Step run(MoELayer& layer, at::Tensor tokens, const std::optional<at::Tensor>& valid,
         at::Device device) {
  const int64_t num_tokens = tokens.size(0);
  layer.to(device);
  MoEInput input(tokens.to(device).detach().requires_grad_(true));
  input.keys = at::arange(num_tokens, at::TensorOptions(at::kLong).device(device)).mul(7);
  if (valid) input.valid = valid->to(device);
  input.step = 3;
  const MoEOutput output = layer.forward(input);
  Step step;
  at::Tensor loss = output.loss();
  for (size_t g = 0; g < output.outputs.size(); ++g) {
    const at::Tensor& y = output.outputs[g];
    step.tensors.emplace_back("output", y);
    const at::Tensor scale = random_tensor(y.sizes(), 70 + g).to(device, y.scalar_type());
    loss = loss + (y * scale).sum();
  }
  for (const gates::NamedLoss& one : output.losses) step.tensors.emplace_back(one.name, one.value);
  loss.backward();
  step.tensors.emplace_back("grad of tokens", input.tokens.grad());
  for (const auto& parameter : layer.named_parameters()) {
    step.tensors.emplace_back("grad of " + parameter.key(), parameter.value().grad());
  }
  for (auto& [name, tensor] : step.tensors) {
    if (tensor.defined()) tensor = tensor.detach().cpu();
  }
  step.stats = output.stats;
  step.stats.read();
  return step;
}

void expect_equal(const Step& actual, const Step& expected, double tolerance) {
  ASSERT_EQ(actual.tensors.size(), expected.tensors.size());
  for (size_t i = 0; i < actual.tensors.size(); ++i) {
    const auto& [name, a] = actual.tensors[i];
    const at::Tensor& e = expected.tensors[i].second;
    ASSERT_EQ(a.defined(), e.defined()) << name;
    if (!a.defined() || e.numel() == 0) continue;
    const double scale = std::max(e.abs().max().item<double>(), 1e-30);
    EXPECT_LE((a - e).abs().max().item<double>(), tolerance * scale) << name;
  }
  ASSERT_EQ(actual.stats.gates.size(), expected.stats.gates.size());
  EXPECT_EQ(actual.stats.rows_processed, expected.stats.rows_processed);
  EXPECT_EQ(actual.stats.num_dropped, expected.stats.num_dropped);
  for (size_t g = 0; g < actual.stats.gates.size(); ++g) {
    const gates::GateStats &a = actual.stats.gates[g], &e = expected.stats.gates[g];
    EXPECT_TRUE(at::equal(a.tokens_per_expert, e.tokens_per_expert));
    EXPECT_EQ(a.non_finite_tokens, e.non_finite_tokens);
    EXPECT_EQ(a.num_nodes, e.num_nodes);
    EXPECT_EQ(a.saturated_nodes, e.saturated_nodes);
    EXPECT_NEAR(a.entropy_sum, e.entropy_sum, 1e-6 * std::max(1.0, std::abs(e.entropy_sum)));
  }
}

class DeviceLayer : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!no_device_reason().empty()) GTEST_SKIP() << "needs a GPU: " << no_device_reason();
  }

  static void compare(const LayerMaker& make, int64_t num_tokens,
                      const std::optional<at::Tensor>& valid = {}, double tolerance = 1e-11,
                      at::ScalarType dtype = at::kDouble) {
    const at::Tensor tokens = case_tokens(num_tokens, dtype);
    Step expected;
    {
      const OnHost on_host;
      expected = run(*make(), tokens, valid, at::kCPU);
    }
    expect_equal(run(*make(), tokens, valid, test_device()), expected, tolerance);
  }
};

std::shared_ptr<MoELayer> layer_of(const ConformingGate& gate, int64_t num_experts,
                                   OnNonFinite on_nonfinite = OnNonFinite::kRaise) {
  const ExpertPlacement placement = ExpertPlacement::contiguous(num_experts, 1);
  MoELayerOptions options;
  options.on_nonfinite = on_nonfinite;
  const GateSizes sizes{num_experts, std::min<int64_t>(2, num_experts), 0};
  return std::make_shared<MoELayer>(std::vector<std::shared_ptr<gates::Gate>>{gate.make(sizes)},
                                    make_experts(ExpertKind::kGated, placement, 0, at::kDouble),
                                    placement, make_parallel_groups(comm::self_group()), options);
}

TEST_F(DeviceLayer, Gates) {
  for (const ConformingGate& gate : conforming_gates()) {
    SCOPED_TRACE(gate.name);
    compare([&] { return layer_of(gate, 6); }, 37);
  }
}

TEST_F(DeviceLayer, Float32) {
  for (const ConformingGate& gate : conforming_gates()) {
    SCOPED_TRACE(gate.name);
    const auto make = [&] {
      const auto layer = layer_of(gate, 6);
      layer->to(at::kFloat);
      return layer;
    };
    compare(make, 37, {}, 1e-4, at::kFloat);  // penalties of DSelect-k amplify rounding
  }
}

TEST_F(DeviceLayer, BatchGates) {
  using namespace gates;
  const std::vector<std::function<std::shared_ptr<Gate>()>> makers = {
      [] { return random_gate<BaseGate>(BaseGateOptions(kDModel, 6)); },
      [] { return random_gate<SinkhornGate>(SinkhornGateOptions(kDModel, 6).top_k(2)); },
      [] { return random_gate<ExpertChoiceGate>(ExpertChoiceGateOptions(kDModel, 6)); }};
  for (const auto& make_gate : makers) {
    const auto make = [&] {
      const ExpertPlacement placement = ExpertPlacement::contiguous(6, 1);
      // As wide as the tokens, which a BASE layer adds.
      const auto experts = std::make_shared<GroupedMLP>(
          mlp_options(ExpertKind::kGated).d_out(kDModel), placement, 0);
      experts->to(at::kDouble);
      return std::make_shared<MoELayer>(std::vector{make_gate()}, experts, placement,
                                        make_parallel_groups(comm::self_group()));
    };
    SCOPED_TRACE(make_gate()->name());
    compare(make, 36);
  }
}

TEST_F(DeviceLayer, Experts) {
  for (const ExpertKind kind : {ExpertKind::kPlain, ExpertKind::kGated, ExpertKind::kGatedBias,
                                ExpertKind::kLinear, ExpertKind::kModule}) {
    for (const int num_gates : {1, 2}) {
      SCOPED_TRACE(::testing::Message() << "kind " << static_cast<int>(kind) << ", " << num_gates);
      LayerCase c;
      c.kind = kind;
      c.num_gates = num_gates;
      c.shared = kind == ExpertKind::kGated;
      compare([&] { return make_layer(c, make_parallel_groups(comm::self_group())); }, 37);
    }
  }
}

TEST_F(DeviceLayer, Sparsity) {
  const ExpertPlacement placement = ExpertPlacement::contiguous(4, 1);
  const auto gate = std::make_shared<gates::TopKGate>(gates::TopKGateOptions(kDModel, 4).top_k(2));
  const auto experts = std::make_shared<GroupedMLP>(
      GroupedMLPOptions(kDModel, kDFf).activation_sparsity(ActivationSparsity::top_k(2)), placement,
      0);
  MoELayer layer({gate}, experts, placement, make_parallel_groups(comm::self_group()));
  layer.to(test_device());
  const std::string text =
      config_error([&] { layer.forward(case_tokens(9, at::kFloat).to(test_device())); });
  EXPECT_EQ(text.find("[grouped_mlp] activation_sparsity=top_k is for the CPU only, but rows are "),
            0)
      << text;
}

TEST_F(DeviceLayer, ZeroSizes) {
  for (const char* name : {"top_k_softmax", "comet", "dselect_k", "dense", "hash"}) {
    for (const ConformingGate& gate : conforming_gates()) {
      if (std::string(gate.name) != name) continue;
      for (const int64_t num_tokens : {0, 1}) {
        for (const int64_t num_experts : {1, 5}) {
          SCOPED_TRACE(::testing::Message()
                       << name << ", " << num_tokens << " tokens, " << num_experts << " experts");
          compare([&] { return layer_of(gate, num_experts); }, num_tokens);
        }
      }
    }
  }
}

TEST_F(DeviceLayer, Valid) {
  at::Tensor valid = at::ones({37}, at::kBool);
  valid.slice(0, 0, 37, 3).fill_(false);
  for (const ConformingGate& gate : conforming_gates()) {
    SCOPED_TRACE(gate.name);
    compare([&] { return layer_of(gate, 6); }, 37, valid);
  }
}

TEST_F(DeviceLayer, Capacity) {
  LayerCase c;
  c.capacity.capacity_factor = .7;
  for (const bool renormalize : {false, true}) {
    c.capacity.renormalize_after_drop = renormalize;
    compare([&] { return make_layer(c, make_parallel_groups(comm::self_group())); }, 37);
  }
}

TEST_F(DeviceLayer, Unread) {
  const ConformingGate& gate = conforming_gates().front();
  const auto layer = layer_of(gate, 6, OnNonFinite::kCount);
  layer->to(test_device());
  MoEOutput output = layer->forward(MoEInput(case_tokens(37).to(test_device())));
  EXPECT_TRUE(output.stats.is_unread());
  output.stats.read();
  EXPECT_FALSE(output.stats.is_unread());
  EXPECT_EQ(output.stats.gates[0].tokens_per_expert.sum().item<int64_t>(), 2 * 37);
  EXPECT_GT(output.stats.gates[0].entropy_sum, 0);
}

TEST_F(DeviceLayer, NonFinite) {
  const auto layer = layer_of(conforming_gates().front(), 6);
  layer->to(test_device());
  at::Tensor tokens = case_tokens(37);
  tokens[5][1] = std::numeric_limits<double>::quiet_NaN();
  try {
    layer->forward(MoEInput(tokens.to(test_device())));
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Diverged& error) {
    EXPECT_EQ(error.detail().argument, "non_finite_tokens");
    EXPECT_EQ(error.detail().value, "1");
  }
}

TEST_F(DeviceLayer, Backends) {
  const std::vector<std::vector<int64_t>> loads = {
      {0, 3, 0, 5, 1, 0}, {0, 0, 0, 0, 0, 9}, {9, 0, 0, 0, 0, 0}, {2, 2, 2, 2, 2, 2}};
  for (const auto& load : loads) {
    gates::Routing routing;
    std::vector<int32_t> ids;
    for (size_t e = 0; e < load.size(); ++e) ids.insert(ids.end(), load[e], static_cast<int>(e));
    routing.num_tokens = static_cast<int64_t>(ids.size());
    routing.top_k = 1;
    routing.expert_idx = at::tensor(ids, at::kInt).to(test_device());
    const LocalPlan plan = make_local_plan(routing, 6);
    const GroupedGemm aten(plan), loop(plan, GroupedGemm::Backend::kLoop);
    const auto options = at::TensorOptions(at::kBFloat16).device(test_device());
    const at::Tensor rows = random_tensor({routing.num_tokens, 16}, 1).to(options);
    const at::Tensor grad = random_tensor({routing.num_tokens, 24}, 2).to(options);
    const at::Tensor weight = random_tensor({6, 24, 16}, 3).to(options);
    const auto expect_close = [](const at::Tensor& a, const at::Tensor& b) {
      EXPECT_LE((a - b).abs().max().item<double>(), 0x1p-6 * b.abs().max().item<double>());
    };
    expect_close(aten.forward(rows, weight), loop.forward(rows, weight));
    expect_close(aten.grad_input(grad, weight), loop.grad_input(grad, weight));
    const at::Tensor grad_weight = aten.grad_weight(grad, rows);
    expect_close(grad_weight, loop.grad_weight(grad, rows));
    for (size_t e = 0; e < load.size(); ++e) {
      if (load[e] > 0) continue;
      EXPECT_EQ(grad_weight[static_cast<int64_t>(e)].abs().max().item<double>(), 0) << e;
    }
  }
}

TEST_F(DeviceLayer, NarrowTypes) {
  LayerCase c;
  for (const auto& [dtype, tolerance] : {std::pair{at::kBFloat16, 0.03}, {at::kHalf, 0.004}}) {
    compare(
        [&, type = dtype] { return make_layer(c, make_parallel_groups(comm::self_group()), type); },
        37, {}, tolerance, dtype);
  }
}

}  // namespace
}  // namespace perseid::testing
