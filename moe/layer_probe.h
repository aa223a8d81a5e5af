#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "gates/routing.h"

namespace perseid {

/// Outputs of experts for the tokens of one held batch, as far as they ran.
struct KeptOutputs {
  at::Tensor rows;      ///< [T, E, d_out] in the type of the tokens
  at::Tensor is_known;  ///< [T, E] bool: the others are not initialised
  at::Tensor probed;    ///< [S] int64: tokens that every expert ran for
  double share = 1;     ///< their share of the tokens of all ranks
};

/// What a search over the order of experts sees of a layer, attached with MoELayer::set_probe for
/// the time of the search. The order changes which expert a token meets, not what the expert says
/// to it: so outputs are kept and mixed in other ways, and an expert runs for a token once at most.
/// Forwards of a layer with a probe are collective as always; the flags are equal on all ranks.
struct LayerProbe {
  /// Forwards mix kept outputs; pairs that have not run yet do so first. No gradient reaches gates
  /// or tokens.
  bool replay = false;
  /// Forwards run every expert for some tokens of the batch, if that was not done yet.
  bool collect = false;
  bool record = false;    ///< forwards fill the fields below, for gradients of the loss
  size_t batch = 0;       ///< the held batch of the next forward
  int64_t max_bytes = 0;  ///< of outputs of a batch on this rank; more: ConfigError
  /// Of a batch, over all ranks, that meet every expert; if there are more, evenly spread ones.
  int64_t max_tokens = 0;
  std::vector<KeptOutputs> kept;  ///< by batch

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
