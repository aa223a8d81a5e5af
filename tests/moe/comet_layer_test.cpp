// A layer with a COMET gate.
//   EqualsDense   outputs and all gradients = plain operations in which every expert runs on every
//                 token and the gate sees the gradients of all weights, 1e-12: the experts of
//                 weight 0 that the layer leaves out have no influence. Open, half saturated,
//                 saturated
//   WarnsOfCapacity  while the gate is dense, and only then
#include "tests/gates/comet_fixture.h"
#include "tests/moe/layer_fixture.h"
#include "tests/warnings.h"

namespace perseid::testing {
namespace {

TEST(CometLayer, EqualsDense) {
  const int64_t E = 7, K = 2, T = 37;
  for (const double gamma : {20., 1., 1e-6}) {
    const auto gate = random_gate(CometGateOptions(kDModel, E).top_k(K).gamma(gamma));
    const ExpertPlacement placement = ExpertPlacement::contiguous(E, 1);
    const auto experts = make_experts(ExpertKind::kGated, placement, 0, at::kDouble);
    MoELayer layer({gate}, experts, placement, make_parallel_groups(comm::self_group()));

    std::vector<std::vector<Tensor>> found;
    for (const bool is_sparse : {true, false}) {
      layer.zero_grad();
      const Tensor tokens = case_tokens(T).set_requires_grad(true);
      Tensor output, entropy;
      if (is_sparse) {
        const auto result = layer.forward(tokens);
        output = result.outputs[0];
        entropy = result.losses[0].value;
        const auto& stats = result.stats.gates[0];
        EXPECT_EQ(stats.num_assignments == T * E, gamma > 1);
        EXPECT_EQ(stats.max_experts_per_token <= K, gamma < 1);
      } else {
        const auto expected = reference_comet(
            at::linear(tokens, gate->split_weight, gate->split_bias).view({T, K, E - 1}),
            at::linear(tokens, gate->leaf_weight, gate->leaf_bias).view({T, K, E}), gamma);
        output = at::zeros({T, kDOut}, at::kDouble);
        for (int64_t e = 0; e < E; ++e) {
          output = output + expected.weights.narrow(1, e, 1) * dense_expert(*experts, e, tokens);
        }
        entropy = expected.entropy_sum * (.1 / T);
      }
      (weighted_loss({output}, 0) + entropy).backward();
      found.push_back({output, entropy, tokens.grad()});
      for (const Tensor& parameter : layer.parameters()) {
        found.back().push_back(parameter.grad().clone());
      }
    }
    ASSERT_EQ(found[0].size(), found[1].size());
    for (size_t i = 0; i < found[0].size(); ++i) {
      const double scale = 1 + found[1][i].abs().max().item<double>();
      EXPECT_LE((found[0][i] - found[1][i]).abs().max().item<double>(), 1e-12 * scale)
          << gamma << " " << i;
    }
  }
}

TEST(CometLayer, WarnsOfCapacity) {
  const Warnings warnings;
  const ExpertPlacement placement = ExpertPlacement::contiguous(7, 1);
  const auto run = [&](double gamma, double capacity_factor) {
    const auto gate = random_gate(CometGateOptions(kDModel, 7).gamma(gamma));
    MoELayerOptions options;
    options.capacity.capacity_factor = capacity_factor;
    MoELayer layer({gate}, make_experts(ExpertKind::kGated, placement, 0, at::kDouble), placement,
                   make_parallel_groups(comm::self_group()), options);
    layer.eval();
    layer.forward(case_tokens(37));
  };
  run(20, 0);
  run(1e-6, 1.5);
  EXPECT_TRUE(warnings.texts.empty());
  run(20, 1.5);
  ASSERT_EQ(warnings.texts.size(), 1u);
  EXPECT_NE(warnings.texts[0].find("[moe_layer] capacity_factor=1.5 goes by top_k=2, but "),
            std::string::npos)
      << warnings.texts[0];
  EXPECT_NE(warnings.texts[0].find("selected 7 experts per token"), std::string::npos);
}

}  // namespace
}  // namespace perseid::testing
