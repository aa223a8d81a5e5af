// A program outside the source tree: one sparse layer, forward and backward, in one process.
#include <ATen/Functions.h>

#include <cstdio>
#include <memory>

#include "comm/group.h"
#include "gates/top_k_gate.h"
#include "moe/grouped_mlp.h"
#include "moe/moe_layer.h"

int main() {
  using namespace perseid;
  const ParallelGroups groups = make_parallel_groups(comm::self_group());
  const auto placement = ExpertPlacement::contiguous(/*num_experts=*/4, /*num_ranks=*/1);
  auto gate = std::make_shared<gates::TopKGate>(gates::TopKGateOptions(16, 4).top_k(2).seed(1));
  auto experts = std::make_shared<GroupedMLP>(GroupedMLPOptions(16, 32).seed(1), placement, 0);
  MoELayer layer({gate}, experts, placement, groups);

  const at::Tensor tokens = at::ones({8, 16}).requires_grad_();
  const MoEOutput output = layer.forward(tokens);
  output.output().sum().backward();
  std::printf("%lld tokens through %lld rows of experts, gradient norm %.3f\n",
              static_cast<long long>(output.stats.num_tokens),
              static_cast<long long>(output.stats.rows_processed),
              tokens.grad().norm().item<double>());
}
