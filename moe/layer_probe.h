#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "gates/routing.h"

namespace perseid {

/// What a search over the order of experts sees of a layer, attached with MoELayer::set_probe for
/// the time of the search. The order changes which expert a token meets, not what the expert says
/// to it: so every expert runs once on every held token, and from then on its outputs are mixed in
/// other ways. Forwards of a layer with a probe are collective as always; the flags are equal on
/// all ranks.
struct LayerProbe {
  /// Forwards mix kept outputs: no expert runs and no row travels. Those of a batch that has none
  /// yet are formed first. No gradient reaches gates or tokens.
  bool replay = false;
  bool collect = false;   ///< forwards form and keep the outputs of the batch, if it has none yet
  bool record = false;    ///< forwards fill the fields below, for gradients of the loss
  size_t batch = 0;       ///< the held batch of the next forward
  int64_t max_bytes = 0;  ///< of outputs of a batch on this rank; more: ConfigError
  std::vector<at::Tensor> expert_outputs;  ///< [batches] of [T, E, d_out] in the type of the tokens

  std::vector<at::Tensor> output_weights;  ///< [G] of [T, U, E]: weight of each output of each unit
  /// With replay or collect, [T, G*d_out] zeros that are added to the mixed outputs: their gradient
  /// is that of the loss with respect to these. Else [A, G] zeros that are added to the weights of
  /// `pairs`: their gradient is its product with the outputs of the experts that ran.
  at::Tensor delta;
  gates::Routing pairs;  ///< what ran

  int64_t num_forwards = 0;        ///< since the probe was made
  int64_t last_forward = 0;        ///< what the clock said
  std::shared_ptr<int64_t> clock;  ///< counts forwards of all layers that share it; may be null
};

}  // namespace perseid
