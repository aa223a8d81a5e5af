#pragma once
#include "gates/gate.h"

namespace perseid::gates {

/// A gate that adds up the decisions of K = top_k() parts, its trees (COMET) or selectors
/// (DSelect-k), each of which spreads its weight over outputs 0 .. E-1 of its own: leaves or codes.
/// Output l of part u stands for expert l, unless an expert map says otherwise: so the parts can
/// meet the experts in different orders. The map is no parameter and gets no gradient.
class TreeGate : public Gate {
 public:
  using Gate::Gate;

  GateOutput forward(const GateInput& input) final { return forward_mapped(input, {}); }

  /// Forward with output l of part u at expert expert_map[u, l]. Weights of outputs that share an
  /// expert are added, also those of one part. Losses of trees and selectors do not depend on the
  /// map; those of the experts' load do. A token with a NaN in its logits goes to experts 0 .. K-1
  /// whatever the map.
  /// @param expert_map  [K, E] int32 in [0, E), on the device of the parameters, left unchanged
  ///                    until the backward; undefined: each output at the expert of its number,
  ///                    as the identity, bit for bit. Throws ConfigError for another shape, type or
  ///                    device. Ids are not checked
  virtual GateOutput forward_mapped(const GateInput& input, const at::Tensor& expert_map) = 0;

  /// The weights of forward before they are added up: w[t, u, l] of output l of part u, [T, K, E],
  /// differentiable, in the type of the gate's arithmetic. Their sum over u is the dense table of
  /// forward's weights, without min_weight and hard_eval. Tokens that are not valid have zeros. One
  /// decision for all tokens (not per_token): the same rows for all valid ones, a view. In LibTorch
  /// operations: for the dense stage of a search, not for speed.
  virtual at::Tensor tree_weights(const GateInput& input) = 0;
};

}  // namespace perseid::gates
