// Every gate through a layer on the processes of an MPI job: outputs, losses and all gradients
// equal those of one process, 1e-12, with both ranks at work and with all tokens on one of them.
#include <gtest/gtest.h>

#include <map>

#include "comm/collectives.h"
#include "gates/base_gate.h"
#include "gates/expert_choice_gate.h"
#include "gates/sinkhorn_gate.h"
#include "moe/gradients.h"
#include "tests/moe/conformance_gates.h"

namespace perseid::testing {
namespace {

using at::Tensor;

constexpr int64_t kGroup = 12, kTokens = 2 * kGroup;

/// Those of the conformance list, and those that look at groups of tokens.
std::vector<ConformingGate> all_gates() {
  using namespace gates;
  using S = const GateSizes&;
  std::vector<ConformingGate> list = conforming_gates();
  list.push_back(gate_of<ExpertChoiceGate>("expert_choice", [](S s) {
    return ExpertChoiceGateOptions(kDModel, s.num_experts).group_size(kGroup);
  }));
  list.push_back(gate_of<BaseGate>(
      "base", [](S s) { return BaseGateOptions(kDModel, s.num_experts).group_size(kGroup); }));
  list.push_back(gate_of<SinkhornGate>("sinkhorn", [](S s) {
    return SinkhornGateOptions(kDModel, s.num_experts).top_k(s.top_k).group_size(kGroup);
  }));
  return list;
}

struct Step {
  Tensor output, token_gradient;
  std::map<std::string, Tensor> gradients;  ///< experts by "name/global id"
  double loss = 0;                          ///< of this rank
};

/// Tokens [first, first + count) of the case on this rank. Collective.
Step step_of(const ConformingGate& gate, const comm::Group& world, int64_t first, int64_t count) {
  const ParallelGroups groups = make_parallel_groups(world);
  const comm::Group& ep = groups.expert_parallel;
  const ExpertPlacement placement = ExpertPlacement::contiguous(GateSizes().num_experts, ep.size());
  // BASE adds the token to the output, so the experts keep its width.
  const auto experts =
      std::make_shared<GroupedMLP>(GroupedMLPOptions(kDModel, kDFf).seed(3), placement, ep.rank());
  experts->to(at::kDouble);
  MoELayer layer({gate.make({})}, experts, placement, groups);

  const Tensor tokens =
      case_tokens(kTokens).narrow(0, first, count).clone().set_requires_grad(true);
  MoEInput input(tokens);
  input.keys = at::arange(first, first + count).mul(7);
  input.progress = .5;
  const MoEOutput out = layer.forward(input);
  const Tensor loss = weighted_loss(out.outputs, first) + out.loss();
  loss.backward();
  sum_gradients(layer, groups);

  Step step{out.output().detach(), tokens.grad(), {}, loss.item<double>()};
  for (const auto& parameter : layer.named_parameters()) {
    const Tensor& gradient = parameter.value().grad();
    if (parameter.key().rfind("experts.", 0) != 0) {
      step.gradients[parameter.key()] = gradient;
      continue;
    }
    const auto& ids = experts->expert_ids();
    for (size_t slot = 0; slot < ids.size(); ++slot) {
      step.gradients[parameter.key() + "/" + std::to_string(ids[slot])] =
          gradient[static_cast<int64_t>(slot)];
    }
  }
  return step;
}

class GateMpi : public ::testing::TestWithParam<ConformingGate> {};

TEST_P(GateMpi, EqualsOneProcess) {
  at::set_num_threads(1);
  const comm::Group world = comm::mpi_group();
  world.set_timeout_ms(20000);
  const Step one = step_of(GetParam(), comm::self_group(), 0, kTokens);
  for (const int64_t of_first_rank : {kTokens, kGroup}) {
    SCOPED_TRACE(std::to_string(of_first_rank) + " tokens on rank 0");
    const int64_t first = world.rank() == 0 ? 0 : of_first_rank;
    const int64_t left = world.rank() == 1 ? kTokens - of_first_rank : 0;
    const int64_t count = world.rank() == 0 ? of_first_rank : left;
    const Step mine = step_of(GetParam(), world, first, count);
    EXPECT_TRUE(close_to(mine.output, one.output.narrow(0, first, count), 1e-12));
    EXPECT_TRUE(close_to(mine.token_gradient, one.token_gradient.narrow(0, first, count), 1e-12));
    for (const auto& [name, gradient] : mine.gradients) {
      EXPECT_TRUE(close_to(gradient, one.gradients.at(name), 1e-12)) << name;
    }
    double loss = mine.loss;
    comm::all_reduce(&loss, 1, comm::ReduceOp::kSum, world, {"loss"});
    EXPECT_NEAR(loss, one.loss, 1e-12 * (1 + std::abs(one.loss)));
  }
}

INSTANTIATE_TEST_SUITE_P(All, GateMpi, ::testing::ValuesIn(all_gates()),
                         [](const auto& item) { return std::string(item.param.name); });

}  // namespace
}  // namespace perseid::testing
