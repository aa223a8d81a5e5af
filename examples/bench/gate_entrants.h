#pragma once
#include <memory>
#include <string>
#include <vector>

#include "examples/bench/layer_problem.h"
#include "gates/gate.h"
#include "moe/grouped_mlp.h"
#include "moe/moe_layer.h"

namespace perseid::bench {

/// Executes every expert for every token: passes the weights of another gate on as a full table.
/// What code does that multiplies all experts' outputs by weights that are mostly zero.
class AllExpertsGate : public gates::Gate {
 public:
  explicit AllExpertsGate(std::shared_ptr<gates::Gate> inner);
  gates::GateOutput forward(const gates::GateInput& input) override;

 private:
  std::shared_ptr<gates::Gate> inner_;
};

/// Tokens and what depends on them; the same for all gates.
struct GateProblem {
  at::Tensor tokens;    ///< [T, D] a leaf
  at::Tensor keys;      ///< [T] int64, for hash
  at::Tensor grad_out;  ///< [T, D] gradient of the layer's output
};
GateProblem make_gate_problem(const LayerCase& shape, uint64_t seed);

struct NamedGate {
  std::string name;
  std::shared_ptr<gates::Gate> gate;
};
/// Top-k, hash, DSelect-k and COMET with their default options; switches of the last two are
/// saturated by large weights.
std::vector<NamedGate> make_gates(const LayerCase& shape, uint64_t seed);

/// Forward and backward of a gate, or of a layer behind it, with all gradients.
struct Step {
  at::Tensor out;
  std::vector<at::Tensor> grads;  ///< tokens, parameters of the gate, of the experts
  MoEStats stats;
};
Step run_layer(MoELayer& layer, const GateProblem& problem);
void run_gate(gates::Gate& gate, const GateProblem& problem);

/// A layer of one process.
std::shared_ptr<MoELayer> make_layer(std::shared_ptr<gates::Gate> gate,
                                     std::shared_ptr<GroupedMLP> experts, int64_t num_experts);

}  // namespace perseid::bench
