// A gate of your own is one class. This one is sparse by value: a ReLU router gives each token as
// many experts as have a positive logit, none or all of them, and an L1 term presses the weights
// down.
#include <ATen/Functions.h>
#include <torch/optim/adam.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>

#include "gates/gate.h"
#include "moe/grouped_mlp.h"
#include "moe/moe_layer.h"

namespace {

using namespace perseid;

// Several ranks would need equal initial weights: the same at::manual_seed on each of them.
class ReluGate : public gates::Gate {
 public:
  ReluGate(int64_t d_model, int64_t num_experts, int64_t top_k, double l1_coeff)
      : Gate("relu_gate", num_experts, top_k), l1_coeff_(l1_coeff) {
    weight = register_parameter("weight", at::randn({num_experts, d_model}) * .1);
    bias = register_parameter("bias", at::full({num_experts}, .1));
  }

  gates::GateOutput forward(const gates::GateInput& input) override {
    gates::validate(input, weight.size(1), "relu_gate");
    // Arithmetic of a gate is float32 (float64 if its parameters are), whatever the tokens are.
    const at::Tensor tokens =
        gates::gate_features(input.tokens, gates::InputNorm::kNone, weight.scalar_type());
    const at::Tensor weights = at::linear(tokens, weight, bias).relu();

    gates::GateOutput output;
    output.routing = gates::routing_from_dense(weights);  // keeps exactly the pairs with weight > 0
    if (input.valid) output.routing = gates::without_invalid(output.routing, *input.valid);
    const int64_t tokens_here = input.valid ? input.valid->sum().item<int64_t>() : tokens.size(0);
    output.stats = gates::count_assignments(output.routing, num_experts(), tokens_here);

    // A mean over tokens divides by the tokens of all ranks, so that the sum over ranks is the
    // loss.
    const int64_t all = input.tokens_global > 0 ? input.tokens_global : tokens_here;
    const at::Tensor mean_weight = output.routing.weights.sum() / std::max<int64_t>(all, 1);
    output.losses.push_back({"l1", l1_coeff_ * mean_weight, mean_weight.detach()});
    return output;
  }

  at::Tensor weight;
  at::Tensor bias;

 private:
  double l1_coeff_;
};

}  // namespace

int main() {
  constexpr int64_t kTokens = 256, kModel = 32, kExperts = 8;
  at::manual_seed(0);
  const ParallelGroups groups = make_parallel_groups(comm::self_group());
  const auto placement = ExpertPlacement::contiguous(kExperts, groups.expert_parallel.size());
  auto gate = std::make_shared<ReluGate>(kModel, kExperts, /*top_k=*/2, /*l1_coeff=*/.05);
  auto experts = std::make_shared<GroupedMLP>(GroupedMLPOptions(kModel, 64), placement,
                                              groups.expert_parallel.rank());
  MoELayer layer({gate}, experts, placement, groups);
  torch::optim::Adam optimizer(layer.parameters(), torch::optim::AdamOptions(3e-3));

  // To be learnt: each of four groups of tokens has a linear map of its own.
  const at::Tensor centers = 2 * at::randn({4, kModel});
  const at::Tensor maps = at::randn({4, kModel, kModel}) / 6;
  for (int step = 0; step <= 300; ++step) {
    const at::Tensor group = at::randint(4, {kTokens}, at::kLong);
    const at::Tensor tokens = centers.index_select(0, group) + at::randn({kTokens, kModel});
    const at::Tensor target = at::bmm(tokens.unsqueeze(1), maps.index_select(0, group)).squeeze(1);

    const MoEOutput output = layer.forward(tokens);
    const at::Tensor error = at::mse_loss(output.output(), target);
    optimizer.zero_grad();
    (error + output.loss()).backward();
    optimizer.step();
    layer.after_step(output.stats);

    if (step % 50 != 0) continue;
    const gates::GateStats& stats = output.stats.gates[0];
    std::printf(
        "step %3d | error %.4f | l1 %.3f | experts per token %.2f | tokens without expert %lld\n",
        step, error.item<double>(), output.losses[0].raw.item<double>(),
        static_cast<double>(stats.num_assignments) / static_cast<double>(stats.num_tokens),
        static_cast<long long>(stats.tokens_without_expert));
  }
}
