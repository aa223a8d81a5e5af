// A layer with DSelect-k gates.
//   EqualsDense   outputs and all gradients = plain operations in which every expert runs on every
//                 token and the gate sees the gradients of all weights, 1e-12: the experts of
//                 weight 0 that the layer leaves out have no influence. Open, half saturated,
//                 saturated; the experts process exactly the pairs of the gate
//   LossesByGate  two gates: each has its own losses, and those reach its parameters alone
// Several ranks: layer_gates_test.cpp.
#include "tests/gates/dselect_k_fixture.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

constexpr int64_t kExperts = 6, kTokens = 37;

std::shared_ptr<MoELayer> layer_with(const std::vector<std::shared_ptr<gates::Gate>>& gates,
                                     const ParallelGroups& groups) {
  const comm::Group& ep = groups.expert_parallel;
  const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, ep.size());
  return std::make_shared<MoELayer>(
      gates, make_experts(ExpertKind::kGated, placement, ep.rank(), at::kDouble), placement,
      groups);
}

TEST(DSelectKLayer, EqualsDense) {
  for (const double gamma : {20., 2., 1e-6}) {
    const auto gate = random_gate(DSelectKGateOptions(kDModel, kExperts).gamma(gamma));
    const auto layer = layer_with({gate}, make_parallel_groups(comm::self_group()));
    std::vector<std::vector<Tensor>> found;
    for (const bool is_sparse : {true, false}) {
      layer->zero_grad();
      const Tensor tokens = case_tokens(kTokens).set_requires_grad(true);
      Tensor output, losses;
      if (is_sparse) {
        const MoEOutput result = layer->forward(tokens);
        output = result.outputs[0];
        losses = result.losses[0].value + result.losses[1].value;
        const auto& stats = result.stats.gates[0];
        EXPECT_EQ(stats.num_assignments == kTokens * kExperts, gamma > 10);
        EXPECT_EQ(stats.max_experts_per_token <= 2, gamma < 1);
        EXPECT_EQ(result.stats.rows_processed, stats.num_assignments);
      } else {
        const auto expected = reference_of(*gate, tokens);
        output = at::zeros({kTokens, kDOut}, at::kDouble);
        for (int64_t e = 0; e < kExperts; ++e) {
          output = output +
                   expected.weights.narrow(1, e, 1) * dense_expert(*layer->experts(), e, tokens);
        }
        losses = (.1 * expected.entropy_sum + expected.penalty_sum) / double(kTokens);
      }
      (weighted_loss({output}, 0) + losses).backward();
      found.push_back({output, losses, tokens.grad()});
      for (const Tensor& parameter : layer->parameters()) {
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

TEST(DSelectKLayer, LossesByGate) {
  std::vector<std::shared_ptr<gates::Gate>> gates;
  for (const double scale : {1., .3}) {
    gates.push_back(random_gate(DSelectKGateOptions(kDModel, kExperts).gamma(4), scale));
  }
  const auto layer = layer_with(gates, make_parallel_groups(comm::self_group()));
  const Tensor tokens = case_tokens(kTokens);
  const auto losses = layer->forward(tokens).losses;
  ASSERT_EQ(losses.size(), 4u);
  for (size_t g = 0; g < 2; ++g) {
    const auto own = gates[g]->forward(input_of(tokens)).losses;
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_TRUE(close_to(losses[2 * g + i].value, own[i].value, 1e-14)) << g << " " << i;
    }
    layer->zero_grad();
    (losses[2 * g].value + losses[2 * g + 1].value).backward();
    EXPECT_GT(gates[g]->parameters()[0].grad().abs().max().item<double>(), 0) << g;
    const Tensor& other = gates[1 - g]->parameters()[0].grad();
    EXPECT_TRUE(!other.defined() || other.abs().max().item<double>() == 0) << g;
  }
}

}  // namespace
}  // namespace perseid::testing
