// A layer with a statistical top-k gate.
//   EqualsDense   outputs and all gradients = plain operations in which every expert runs on every
//                 token, 1e-12; the experts process exactly the pairs of the gate. Rows without an
//                 expert included
// Several ranks: layer_gates_test.cpp.
#include "gates/statistical_top_k_gate.h"

#include "kernels/statistical_top_k.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

TEST(StatisticalTopKLayer, EqualsDense) {
  const int64_t E = 7, K = 2, T = 37;
  for (const bool unbiased : {false, true}) {
    const auto gate = std::make_shared<gates::StatisticalTopKGate>(
        gates::StatisticalTopKGateOptions(kDModel, E).top_k(K).unbiased(unbiased).min_experts(0));
    gate->to(at::kDouble);
    const ExpertPlacement placement = ExpertPlacement::contiguous(E, 1);
    const auto experts = make_experts(ExpertKind::kGated, placement, 0, at::kDouble);
    MoELayer layer({gate}, experts, placement, make_parallel_groups(comm::self_group()));

    std::vector<std::vector<at::Tensor>> found;
    for (const bool is_sparse : {true, false}) {
      layer.zero_grad();
      at::Tensor tokens = case_tokens(T);
      tokens[5].fill_(0);  // no logit is above the others
      tokens.set_requires_grad(true);
      at::Tensor output;
      if (is_sparse) {
        const MoEOutput result = layer.forward(tokens);
        output = result.outputs[0];
        EXPECT_EQ(result.stats.rows_processed, result.stats.gates[0].num_assignments);
        EXPECT_LT(result.stats.rows_processed, T * E / 2);
        EXPECT_GE(result.stats.gates[0].tokens_without_expert, 1);
      } else {
        const at::Tensor logits = tokens.mm(gate->weight.t());
        const at::Tensor centred = logits - logits.mean(1, true);
        const double freedoms = double(unbiased ? E - 1 : E);
        // Zero scores: no gradient through a root of 0.
        const at::Tensor variance = centred.square().sum(1, true) / freedoms;
        const at::Tensor std = variance.where(variance.gt(0), at::ones_like(variance)).sqrt();
        const double quantile = kernels::normal_upper_quantile(double(K) / double(E));
        const at::Tensor weights = (centred - quantile * std).relu();
        output = at::zeros({T, kDOut}, at::kDouble);
        for (int64_t e = 0; e < E; ++e) {
          output = output + weights.narrow(1, e, 1) * dense_expert(*experts, e, tokens);
        }
      }
      weighted_loss({output}, 0).backward();
      found.push_back({output, tokens.grad()});
      for (const at::Tensor& parameter : layer.parameters()) {
        found.back().push_back(parameter.grad().clone());
      }
    }
    ASSERT_EQ(found[0].size(), found[1].size());
    for (size_t i = 0; i < found[0].size(); ++i) {
      EXPECT_TRUE(close_to(found[0][i], found[1][i], 1e-12)) << unbiased << " " << i;
    }
  }
}

}  // namespace
}  // namespace perseid::testing
