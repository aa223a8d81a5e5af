#pragma once
#include "gates/gate.h"
#include "gates/top_k_gate.h"

namespace perseid::gates {

/// Softmax over all experts, every expert runs on every token: the dense mixture as a baseline. The
/// same as a TopKGate with top_k = num_experts. It has no aux loss, which would be a constant.
class DenseGate : public Gate {
 public:
  /// top_k and aux_loss_coeff of the options are ignored.
  explicit DenseGate(TopKGateOptions options);
  GateOutput forward(const GateInput& input) override;

 private:
  std::shared_ptr<TopKGate> router_;
};

/// Every token to one expert with weight 1, no parameters.
class SingleGate : public Gate {
 public:
  explicit SingleGate(int64_t num_experts, int64_t expert = 0);
  GateOutput forward(const GateInput& input) override;

 private:
  int64_t expert_;
};

}  // namespace perseid::gates
