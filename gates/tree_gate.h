#pragma once
#include "gates/gate.h"

namespace perseid::gates {

/// A gate that adds up the decisions of K = top_k() parts, its trees (COMET) or selectors
/// (DSelect-k), each of which spreads its weight over outputs 0 .. E-1 of its own. Output l of part
/// u stands for expert l, unless an expert map says otherwise: so the parts can meet the experts in
/// different orders.
class TreeGate : public Gate {
 public:
  using Gate::Gate;

  GateOutput forward(const GateInput& input) final { return forward_mapped(input, {}); }

  /// Forward with output l of part u at expert expert_map[u, l].
  /// @param expert_map  [K, E] int32 in [0, E), on the device of the parameters; undefined: each
  ///                    output at the expert of its number. Ids are not checked
  virtual GateOutput forward_mapped(const GateInput& input, const at::Tensor& expert_map) = 0;

  /// The weights of forward before they are added up: w[t, u, l] of output l of part u, [T, K, E],
  /// differentiable, in the type of the gate's arithmetic. Their sum over u is the dense table of
  /// forward's weights, without min_weight and hard_eval. Tokens that are not valid have zeros. In
  /// LibTorch operations: for the dense stage of a search, not for speed.
  virtual at::Tensor tree_weights(const GateInput& input) = 0;
};

}  // namespace perseid::gates
