#include "examples/bench/gate_entrants.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include "gates/comet_gate.h"
#include "gates/dselect_k_gate.h"
#include "gates/hash_gate.h"
#include "gates/top_k_gate.h"

namespace perseid::bench {
namespace {

/// Large enough that every switch of every token is at exactly 0 or 1: |z| >= gamma / 2.
constexpr double kSaturating = 1e7;

/// Leaves that a loss of the step reaches; others have no gradient.
std::vector<at::Tensor> leaves_of(const torch::nn::Module& module, const at::Tensor& tokens) {
  std::vector<at::Tensor> leaves = {tokens};
  for (const at::Tensor& parameter : module.parameters()) leaves.push_back(parameter);
  return leaves;
}

}  // namespace

AllExpertsGate::AllExpertsGate(std::shared_ptr<gates::Gate> inner)
    : Gate("all_experts_gate", inner->num_experts(), inner->num_experts()),
      inner_(register_module("inner", std::move(inner))) {}

gates::GateOutput AllExpertsGate::forward(const gates::GateInput& input) {
  gates::GateOutput output = inner_->forward(input);
  const at::Tensor table = gates::dense_weights(output.routing, num_experts());
  const at::Tensor all = at::arange(num_experts()).expand_as(table);
  output.routing = gates::routing_from_table(all, table, num_experts());
  output.stats = gates::count_assignments(output.routing, num_experts(), input.tokens.size(0));
  return output;
}

GateProblem make_gate_problem(const LayerCase& shape, uint64_t seed) {
  at::manual_seed(seed);
  const int64_t T = shape.num_tokens, D = shape.d_model;
  GateProblem problem;
  problem.tokens = at::randn({T, D}).to(shape.dtype).requires_grad_();
  problem.keys = at::randint(1 << 16, {T}, at::kLong);
  problem.grad_out = at::randn({T, D}).to(shape.dtype);
  return problem;
}

std::vector<NamedGate> make_gates(const LayerCase& shape, uint64_t seed) {
  const int64_t D = shape.d_model, E = shape.num_experts, K = shape.top_k;
  const auto comet =
      std::make_shared<gates::CometGate>(gates::CometGateOptions(D, E).top_k(K).seed(seed));
  const auto dselect_k =
      std::make_shared<gates::DSelectKGate>(gates::DSelectKGateOptions(D, E).top_k(K).seed(seed));
  const at::NoGradGuard no_grad;
  for (const at::Tensor& switches :
       {comet->split_weight, comet->split_bias, dselect_k->code_weight, dselect_k->code_bias}) {
    if (switches.defined()) switches.mul_(kSaturating);
  }
  return {
      {"topk", std::make_shared<gates::TopKGate>(gates::TopKGateOptions(D, E).top_k(K).seed(seed))},
      {"hash", std::make_shared<gates::HashGate>(gates::HashGateOptions(E).seed(seed))},
      {"dselectk", dselect_k},
      {"comet", comet}};
}

std::shared_ptr<MoELayer> make_layer(std::shared_ptr<gates::Gate> gate,
                                     std::shared_ptr<GroupedMLP> experts, int64_t num_experts) {
  return std::make_shared<MoELayer>(std::vector<std::shared_ptr<gates::Gate>>{std::move(gate)},
                                    std::move(experts), ExpertPlacement::contiguous(num_experts, 1),
                                    make_parallel_groups(comm::self_group()));
}

Step run_layer(MoELayer& layer, const GateProblem& problem) {
  MoEInput input(problem.tokens);
  input.keys = problem.keys;
  MoEOutput output = layer.forward(input);
  const at::Tensor loss = output.loss();
  std::vector<at::Tensor> roots = {output.output()}, root_grads = {problem.grad_out};
  if (loss.requires_grad()) {
    roots.push_back(loss);
    root_grads.push_back(at::ones_like(loss));
  }
  return {output.output(),
          torch::autograd::grad(roots, leaves_of(layer, problem.tokens), root_grads, {}, false,
                                /*allow_unused=*/true),
          std::move(output.stats)};
}

void run_gate(gates::Gate& gate, const GateProblem& problem) {
  gates::GateInput input;
  input.tokens = problem.tokens;
  input.keys = problem.keys;
  input.training = true;
  const gates::GateOutput output = gate.forward(input);
  const at::Tensor& weights = output.routing.weights;
  if (!weights.requires_grad()) return;
  std::vector<at::Tensor> roots = {weights}, root_grads = {at::ones_like(weights)};
  for (const gates::NamedLoss& loss : output.losses) {
    roots.push_back(loss.value);
    root_grads.push_back(at::ones_like(loss.value));
  }
  torch::autograd::grad(roots, leaves_of(gate, problem.tokens), root_grads, {}, false, true);
}

}  // namespace perseid::bench
