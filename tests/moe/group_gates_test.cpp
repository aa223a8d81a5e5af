// Gates that look at groups of tokens, and gates without parameters, in the layer.
//   EqualsDense   outputs and gradients = plain operations that run every expert on every token and
//                 know only which pairs were chosen: 1e-12
//   RanksEqualOne with a fixed group_size, outputs, gradients of tokens and router at 2 and 4
//                 ranks, one of them without tokens, = one process, 1e-12
//   Padding       BASE passes nothing of a token that is not valid, whatever it holds
//   BrokenGroup   ranks that cut a group: every rank throws the same error
#include <gtest/gtest.h>

#include <functional>
#include <mutex>

#include "gates/base_gate.h"
#include "gates/expert_choice_gate.h"
#include "gates/hash_gate.h"
#include "gates/sinkhorn_gate.h"
#include "kernels/error.h"
#include "moe/gradients.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

constexpr int64_t kTokens = 48, kExperts = 5, kGroup = 12;

/// A gate, and its weights [T, E] as plain operations on the logits x w^T; where it adds the token,
/// by which factor.
struct GateCase {
  std::string name;
  std::function<std::shared_ptr<gates::Gate>()> make;
  std::function<at::Tensor(const at::Tensor& logits, const at::Tensor& is_chosen)> weights;
  std::function<at::Tensor(const at::Tensor& logits, const at::Tensor& is_chosen)> residual = {};
  int64_t group_size = kGroup;
};

const std::vector<GateCase>& all_cases() {
  static const std::vector<GateCase> cases = {
      {"expert_choice",
       [] {
         return std::make_shared<gates::ExpertChoiceGate>(
             gates::ExpertChoiceGateOptions(kDModel, kExperts).group_size(kGroup));
       },
       [](const at::Tensor& logits, const at::Tensor& is_chosen) {
         return logits.softmax(1) * is_chosen;
       }},
      {"base",
       [] {
         return std::make_shared<gates::BaseGate>(
             gates::BaseGateOptions(kDModel, kExperts).group_size(kGroup));
       },
       [](const at::Tensor& logits, const at::Tensor& is_chosen) {
         return logits.sigmoid() * is_chosen;
       },
       [](const at::Tensor& logits, const at::Tensor& is_chosen) {
         return 1 - (logits.sigmoid() * is_chosen).sum(1);
       }},
      {"sinkhorn_1",
       [] {
         return std::make_shared<gates::SinkhornGate>(
             gates::SinkhornGateOptions(kDModel, kExperts).top_k(1).group_size(kGroup));
       },
       [](const at::Tensor& logits, const at::Tensor& is_chosen) {
         return logits.sigmoid() * is_chosen;
       }},
      {"sinkhorn_2",
       [] {
         return std::make_shared<gates::SinkhornGate>(
             gates::SinkhornGateOptions(kDModel, kExperts).top_k(2).group_size(kGroup));
       },
       [](const at::Tensor& logits, const at::Tensor& is_chosen) {
         return logits.softmax(1) * is_chosen;
       }},
      {"hash",
       [] {
         return std::make_shared<gates::HashGate>(gates::HashGateOptions(kExperts).num_hashes(2));
       },
       [](const at::Tensor&, const at::Tensor& is_chosen) { return is_chosen / 2; },
       {},
       1},
  };
  return cases;
}

/// A layer whose experts keep the width of the tokens.
std::shared_ptr<MoELayer> layer_with(const std::shared_ptr<gates::Gate>& gate,
                                     const ParallelGroups& groups) {
  gate->to(at::kDouble);
  for (at::Tensor& parameter : gate->parameters()) {
    parameter.set_data(random_tensor(parameter.sizes(), 3));
  }
  const comm::Group& ep = groups.expert_parallel;
  const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, ep.size());
  const auto experts = std::make_shared<GroupedMLP>(
      GroupedMLPOptions(kDModel, kDFf).gated(true).bias(false).seed(3), placement, ep.rank());
  experts->to(at::kDouble);
  return std::make_shared<MoELayer>(std::vector<std::shared_ptr<gates::Gate>>{gate}, experts,
                                    placement, groups);
}

MoEInput input_of(const at::Tensor& tokens, int64_t first) {
  MoEInput input(tokens);
  input.keys = at::arange(first, first + tokens.size(0), at::kLong);
  return input;
}

TEST(GroupGates, EqualsDense) {
  for (const GateCase& c : all_cases()) {
    for (const bool training : {true, false}) {
      SCOPED_TRACE(c.name + (training ? " training" : " evaluation"));
      const auto gate = c.make();
      const auto layer = layer_with(gate, make_parallel_groups(comm::self_group()));
      layer->train(training);
      const auto parameters = gate->parameters();
      std::vector<std::vector<at::Tensor>> found;
      for (const bool is_sparse : {true, false}) {
        layer->zero_grad();
        const at::Tensor tokens = case_tokens(kTokens).set_requires_grad(true);
        at::Tensor output;
        if (is_sparse) {
          output = layer->forward(input_of(tokens, 0)).output();
        } else {
          gates::GateInput given;
          given.tokens = tokens.detach();
          given.keys = input_of(tokens, 0).keys;
          given.training = training;
          const at::Tensor is_chosen =
              gates::dense_weights(gate->forward(given).routing, kExperts).detach().ne(0);
          EXPECT_LT(is_chosen.sum().item<int64_t>(), kTokens * kExperts);
          const at::Tensor logits =
              parameters.empty() ? at::Tensor() : tokens.mm(parameters[0].t());
          const at::Tensor weights = c.weights(logits, is_chosen);
          output = c.residual ? c.residual(logits, is_chosen).unsqueeze(1) * tokens
                              : at::zeros({kTokens, kDModel}, at::kDouble);
          for (int64_t e = 0; e < kExperts; ++e) {
            output = output + weights.narrow(1, e, 1) * dense_expert(*layer->experts(), e, tokens);
          }
        }
        weighted_loss({output}, 0).backward();
        found.push_back({output, tokens.grad()});
        for (const at::Tensor& parameter : layer->parameters()) {
          found.back().push_back(parameter.grad().clone());
        }
      }
      ASSERT_EQ(found[0].size(), found[1].size());
      for (size_t i = 0; i < found[0].size(); ++i) {
        EXPECT_TRUE(close_to(found[0][i], found[1][i], 1e-12)) << i;
      }
    }
  }
}

std::vector<int64_t> shares(int num_ranks) {
  if (num_ranks == 1) return {kTokens};
  return num_ranks == 2 ? std::vector<int64_t>{36, 12} : std::vector<int64_t>{12, 0, 24, 12};
}

struct Step {
  double loss = 0;
  std::vector<at::Tensor> by_rank[2];  ///< outputs, gradients of tokens
  std::vector<at::Tensor> gradients;   ///< of the router, summed over ranks
};

Step run(const GateCase& c, int num_ranks) {
  Step step;
  for (auto& tensors : step.by_rank) tensors.resize(static_cast<size_t>(num_ranks));
  std::mutex mutex;
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    const auto rank = static_cast<size_t>(world.rank());
    const std::vector<int64_t> counts = shares(num_ranks);
    int64_t first = 0;
    for (size_t r = 0; r < rank; ++r) first += counts[r];
    const ParallelGroups groups = make_parallel_groups(world, num_ranks);
    const auto gate = c.make();
    const auto layer = layer_with(gate, groups);
    const at::Tensor tokens =
        case_tokens(kTokens).narrow(0, first, counts[rank]).clone().requires_grad_(true);
    const MoEOutput out = layer->forward(input_of(tokens, first));
    const at::Tensor loss = weighted_loss(out.outputs, first) + out.loss();
    loss.backward();
    sum_gradients(*layer, groups);
    const std::lock_guard lock(mutex);
    step.loss += loss.item<double>();
    step.by_rank[0][rank] = out.output().detach();
    step.by_rank[1][rank] = tokens.grad();
    if (rank > 0) return;
    for (const at::Tensor& parameter : gate->parameters()) {
      step.gradients.push_back(parameter.grad().clone());
    }
  });
  return step;
}

TEST(GroupGates, RanksEqualOne) {
  for (const GateCase& c : all_cases()) {
    SCOPED_TRACE(c.name);
    const Step one = run(c, 1);
    for (const int num_ranks : {2, 4}) {
      const Step many = run(c, num_ranks);
      EXPECT_NEAR(many.loss, one.loss, 1e-12 * std::abs(one.loss));
      for (const int i : {0, 1}) {
        EXPECT_TRUE(close_to(at::cat(many.by_rank[i]), at::cat(one.by_rank[i]), 1e-12)) << i;
      }
      for (size_t i = 0; i < one.gradients.size(); ++i) {
        EXPECT_TRUE(close_to(many.gradients[i], one.gradients[i], 1e-12)) << num_ranks;
      }
    }
  }
}

TEST(GroupGates, Padding) {
  for (const GateCase& c : all_cases()) {
    if (!c.residual) continue;
    SCOPED_TRACE(c.name);
    const auto gate = c.make();
    const auto layer = layer_with(gate, make_parallel_groups(comm::self_group()));
    at::Tensor tokens = case_tokens(kTokens).clone();
    const at::Tensor is_padding = at::arange(kTokens, at::kLong).remainder(5).eq(2);
    tokens.masked_fill_(is_padding.unsqueeze(1), NAN).set_requires_grad(true);
    MoEInput input = input_of(tokens, 0);
    input.valid = is_padding.logical_not();
    const at::Tensor output = layer->forward(input).output();
    const at::Tensor padding = output.index({is_padding});
    EXPECT_TRUE(same_bits(padding, at::zeros_like(padding)));
    output.sum().backward();
    for (const at::Tensor& gradient : {gate->parameters()[0].grad(), tokens.grad()}) {
      EXPECT_TRUE(gradient.isfinite().all().item<bool>());
      EXPECT_GT(gradient.abs().max().item<double>(), 0);
    }
  }
}

TEST(GroupGates, BrokenGroup) {
  for (const GateCase& c : all_cases()) {
    if (c.group_size == 1) continue;
    std::vector<std::string> texts(2);
    comm::run_local(2, [&](const comm::Group& world) {
      const auto layer = layer_with(c.make(), make_parallel_groups(world, 2));
      try {
        layer->forward(case_tokens(world.rank() == 0 ? 12 : 13));
      } catch (const ConfigError& error) {
        texts[static_cast<size_t>(world.rank())] = error.what();
      }
    });
    for (const std::string& text : texts) {
      EXPECT_NE(text.find("num_tokens=13 is not a multiple of group_size=12"), std::string::npos)
          << c.name << ": " << text;
    }
  }
}

}  // namespace
}  // namespace perseid::testing
