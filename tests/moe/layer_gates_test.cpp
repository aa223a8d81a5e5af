// Gates in the layer, where sums over ranks and micro-batches are formed.
//   RanksEqualOne    losses and router gradients of each gate at 1, 2, 3 and 4 ranks, one of them
//                    without tokens, 1e-12
//   MicroBatches     the load-balance loss of two micro-batches is that of the whole batch
//   AfterStep        statistics of all ranks move expert_bias and l1_coeff alike on every rank
#include <gtest/gtest.h>

#include <functional>
#include <mutex>

#include "gates/dselect_k_gate.h"
#include "gates/gshard_gate.h"
#include "gates/noisy_top_k_gate.h"
#include "gates/remoe_gate.h"
#include "gates/statistical_top_k_gate.h"
#include "moe/gradients.h"
#include "tests/moe/layer_fixture.h"

namespace perseid::testing {
namespace {

constexpr int64_t kTokens = 37, kExperts = 5;
using MakeGate = std::function<std::shared_ptr<gates::Gate>()>;

std::shared_ptr<MoELayer> layer_with(const std::shared_ptr<gates::Gate>& gate,
                                     const ParallelGroups& groups) {
  gate->to(at::kDouble);
  const comm::Group& ep = groups.expert_parallel;
  const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, ep.size());
  return std::make_shared<MoELayer>(
      std::vector<std::shared_ptr<gates::Gate>>{gate},
      make_experts(ExpertKind::kGated, placement, ep.rank(), at::kDouble), placement, groups);
}

gates::TopKGateOptions top_k() {
  return gates::TopKGateOptions(kDModel, kExperts).z_loss_coeff(.1);
}

/// Some of its switches are saturated.
std::shared_ptr<gates::Gate> dselect_k(bool per_token) {
  auto gate = std::make_shared<gates::DSelectKGate>(
      gates::DSelectKGateOptions(kDModel, kExperts).balance_coeff(.2).per_token(per_token));
  uint64_t seed = 3;
  for (at::Tensor& parameter : gate->parameters()) {
    parameter.set_data(random_tensor(parameter.sizes(), ++seed, -.6, .6, at::kFloat));
  }
  return gate;
}

const std::vector<MakeGate>& all_gates() {
  static const std::vector<MakeGate> gates = {
      [] { return std::make_shared<gates::TopKGate>(top_k().balance_coeff(.3).jitter_eps(.1)); },
      [] {
        return std::make_shared<gates::TopKGate>(
            gates::TopKGateOptions(kDModel, kExperts)
                .score_function(kernels::ScoreFunction::kSqrtSoftplus)
                .bias_update_rate(1e-3));
      },
      [] {
        auto gate =
            std::make_shared<gates::NoisyTopKGate>(gates::NoisyTopKGateOptions(kDModel, kExperts));
        gate->weight.set_data(random_tensor({kExperts, kDModel}, 3, -1, 1, at::kFloat));
        return gate;
      },
      [] {
        return std::make_shared<gates::NoisyTopKGate>(
            gates::NoisyTopKGateOptions(kDModel, kExperts).noise(gates::RouterNoise::kFixed));
      },
      [] {
        return std::make_shared<gates::GShardGate>(
            gates::GShardGateOptions(kDModel, kExperts).gumbel_second(true).z_loss_coeff(.1));
      },
      [] {
        return std::make_shared<gates::ReMoEGate>(
            gates::ReMoEGateOptions(kDModel, kExperts).l1_coeff_start(.1));
      },
      [] { return dselect_k(/*per_token=*/true); },
      [] { return dselect_k(/*per_token=*/false); },
      [] {
        return std::make_shared<gates::StatisticalTopKGate>(
            gates::StatisticalTopKGateOptions(kDModel, kExperts).balance_coeff(.2));
      },
  };
  return gates;
}

std::vector<int64_t> shares(int num_ranks) {
  if (num_ranks == 1) return {kTokens};
  if (num_ranks == 2) return {30, 7};
  return num_ranks == 3 ? std::vector<int64_t>{20, 0, 17} : std::vector<int64_t>{20, 0, 6, 11};
}

struct Step {
  double loss = 0;
  std::vector<at::Tensor> gradients;           ///< of the router, after the sum over ranks
  std::vector<std::vector<at::Tensor>> state;  ///< by rank: buffers after after_step
};

Step run(const MakeGate& make, int num_ranks) {
  Step step;
  step.state.resize(static_cast<size_t>(num_ranks));
  std::mutex mutex;
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    const auto rank = static_cast<size_t>(world.rank());
    const std::vector<int64_t> counts = shares(num_ranks);
    int64_t first = 0;
    for (size_t r = 0; r < rank; ++r) first += counts[r];
    const ParallelGroups groups = make_parallel_groups(world, num_ranks);
    const auto gate = make();
    const auto layer = layer_with(gate, groups);
    const MoEOutput out = layer->forward(case_tokens(kTokens).narrow(0, first, counts[rank]));
    const at::Tensor loss = weighted_loss(out.outputs, first) + out.loss();
    loss.backward();
    sum_gradients(*layer, groups);
    layer->after_step(out.stats);
    const std::lock_guard lock(mutex);
    step.loss += loss.item<double>();
    for (const at::Tensor& buffer : gate->buffers()) step.state[rank].push_back(buffer.clone());
    if (rank > 0) return;
    for (const at::Tensor& parameter : gate->parameters()) {
      step.gradients.push_back(parameter.grad().clone());
    }
  });
  return step;
}

TEST(LayerGates, RanksEqualOne) {
  size_t number = 0;
  for (const MakeGate& make : all_gates()) {
    SCOPED_TRACE(number++);
    const Step one = run(make, 1);
    EXPECT_GT(one.gradients.at(0).abs().max().item<double>(), 0);
    for (const int num_ranks : {2, 3, 4}) {
      const Step many = run(make, num_ranks);
      EXPECT_NEAR(many.loss, one.loss, 1e-12 * std::abs(one.loss));
      for (size_t i = 0; i < one.gradients.size(); ++i) {
        EXPECT_TRUE(close_to(many.gradients[i], one.gradients[i], 1e-12)) << num_ranks;
      }
      for (const auto& state : many.state) {
        ASSERT_EQ(state.size(), one.state[0].size());
        for (size_t i = 0; i < state.size(); ++i) {
          EXPECT_TRUE(same_bits(state[i], one.state[0][i]));
        }
      }
    }
  }
}

gates::NamedLoss find_loss(const MoEOutput& out, const std::string& name) {
  for (const gates::NamedLoss& loss : out.losses) {
    if (loss.name == name) return loss;
  }
  ADD_FAILURE() << name;
  return {};
}

TEST(LayerGates, MicroBatches) {
  comm::run_local(1, [&](const comm::Group& world) {
    const auto gate = std::make_shared<gates::TopKGate>(top_k());
    const auto layer = layer_with(gate, make_parallel_groups(world, 1));
    const at::Tensor tokens = case_tokens(kTokens);
    const auto gradient = [&](const at::Tensor& loss) {
      layer->zero_grad();
      loss.backward();
      return gate->weight.grad().clone();
    };
    const MoEOutput whole = layer->forward(tokens);
    const MoEInput first(tokens.narrow(0, 0, 20));
    MoEInput second(tokens.narrow(0, 20, 17));
    const MoEStats first_stats = layer->forward(first).stats;
    MoEStats both = first_stats;
    both += layer->forward(second).stats;
    EXPECT_TRUE(same_bits(both.gates[0].tokens_per_expert, whole.stats.gates[0].tokens_per_expert));
    EXPECT_EQ(both.gates[0].num_tokens, kTokens);
    EXPECT_NEAR(both.gates[0].entropy_sum, whole.stats.gates[0].entropy_sum, 1e-12);

    // With the counts of the other half each half has the f of the whole batch; p stays its own.
    MoEInput first_with_second = first;
    first_with_second.earlier = layer->forward(second).stats;
    second.earlier = first_stats;
    const at::Tensor a = find_loss(layer->forward(first_with_second), "aux_loss").value;
    const at::Tensor b = find_loss(layer->forward(second), "aux_loss").value;
    const at::Tensor mean = a * (20. / 37) + b * (17. / 37);
    const at::Tensor expected = find_loss(whole, "aux_loss").value;
    EXPECT_TRUE(close_to(mean, expected, 1e-14));
    EXPECT_TRUE(close_to(gradient(mean), gradient(expected), 1e-13));
    // Alone, the halves give another value: the test can tell.
    second.earlier.reset();
    const at::Tensor alone = find_loss(layer->forward(first), "aux_loss").value * (20. / 37) +
                             find_loss(layer->forward(second), "aux_loss").value * (17. / 37);
    EXPECT_FALSE(close_to(alone, expected, 1e-6));
  });
}

TEST(LayerGates, TokensWithoutExpert) {
  comm::run_local(1, [&](const comm::Group& world) {
    const auto gate =
        std::make_shared<gates::ReMoEGate>(gates::ReMoEGateOptions(kDModel, kExperts));
    const auto layer = layer_with(gate, make_parallel_groups(world, 1));
    at::Tensor tokens = case_tokens(kTokens).clone();
    tokens[7].fill_(0);  // all logits are 0: no expert
    const MoEOutput out = layer->forward(tokens);
    EXPECT_GE(out.stats.gates[0].tokens_without_expert, 1);
    EXPECT_TRUE(same_bits(out.output()[7], at::zeros({kDOut}, at::kDouble)));
    (out.output().sum() + out.loss()).backward();
    EXPECT_TRUE(gate->weight.grad().isfinite().all().item<bool>());
  });
}

}  // namespace
}  // namespace perseid::testing
