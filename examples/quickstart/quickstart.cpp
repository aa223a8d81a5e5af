// One sparse mixture-of-experts layer: forward, loss, backward, and who got the work.
#include <ATen/Functions.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "gates/top_k_gate.h"
#include "moe/grouped_mlp.h"
#include "moe/moe_layer.h"

int main() {
  using namespace perseid;
  constexpr int64_t kTokens = 512, kModel = 64, kHidden = 128, kExperts = 8;

  // Self: one process. The same lines run on threads as ranks and on MPI ranks, see train_fashion.
  const ParallelGroups groups = make_parallel_groups(comm::self_group());
  const auto placement = ExpertPlacement::contiguous(kExperts, groups.expert_parallel.size());
  auto gate =
      std::make_shared<gates::TopKGate>(gates::TopKGateOptions(kModel, kExperts).top_k(2).seed(1));
  auto experts = std::make_shared<GroupedMLP>(GroupedMLPOptions(kModel, kHidden).seed(1), placement,
                                              groups.expert_parallel.rank());
  MoELayer layer({gate}, experts, placement, groups);

  at::manual_seed(0);
  const at::Tensor tokens = at::randn({kTokens, kModel}).requires_grad_();
  const at::Tensor target = at::randn({kTokens, kModel});
  const MoEOutput output = layer.forward(tokens);
  const at::Tensor loss = at::mse_loss(output.output(), target) + output.loss();
  loss.backward();

  std::printf("loss %.4f, of it %s %.4f\n", loss.item<double>(), output.losses[0].name.c_str(),
              output.losses[0].value.item<double>());
  std::printf("gradient norms: tokens %.4f, router %.4f, experts %.4f\n",
              tokens.grad().norm().item<double>(), gate->weight.grad().norm().item<double>(),
              experts->up_proj.grad().norm().item<double>());

  const gates::GateStats& stats = output.stats.gates[0];
  std::printf("%lld tokens, %lld (token, expert) pairs, max_vio %.2f\n",
              static_cast<long long>(stats.num_tokens),
              static_cast<long long>(stats.num_assignments), max_vio(stats.tokens_per_expert));
  for (int64_t e = 0; e < kExperts; ++e) {
    const auto load = stats.tokens_per_expert[e].item<int64_t>();
    std::printf("expert %lld %4lld %s\n", static_cast<long long>(e), static_cast<long long>(load),
                std::string(static_cast<size_t>(load) / 4, '#').c_str());
  }
}
