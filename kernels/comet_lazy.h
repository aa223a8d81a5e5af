#pragma once
#include <cstdint>

#include "kernels/comet.h"

// Logits of COMET along active paths only. A saturated token reaches about log2(E) split nodes and
// one leaf of each tree, where the matrix product forms all 2E-1 logits. For the host: on kCuda
// comet_reached_logits throws ConfigError, as a matrix product of all logits is faster there.

namespace perseid::kernels {

/// The two linear layers of the logits: z = features split_weight^T + split_bias, a alike.
struct CometLinear {
  int64_t d_model = 0;                 ///< D >= 1
  const void* features = nullptr;      ///< [T, D] x, in `dtype` as everything here
  const void* split_weight = nullptr;  ///< [K*(E-1), D]
  const void* split_bias = nullptr;    ///< [K*(E-1)]
  const void* leaf_weight = nullptr;   ///< [K*E, D]
  const void* leaf_bias = nullptr;     ///< [K*E]
};

/// Writes both tables of logits whole: of split nodes and leaves that have a reach above 0, and 0
/// elsewhere. `comet` and `comet_backward` give the same for these as for all logits, up to the
/// rounding of the products, as what is not reached has no influence; a NaN in a row that is not
/// reached is not seen. Tokens that are not valid reach nothing.
/// @param gamma         width of the switches
/// @param valid         [T] or null: all are
/// @param split_logits  [T, K, E-1]
/// @param leaf_logits   [T, K, E]
/// Reads D values of a weight for each logit that is formed. Same bits for any thread count.
void comet_reached_logits(const CometShape& shape, double gamma, DType dtype,
                          const CometLinear& linear, const uint8_t* valid, void* split_logits,
                          void* leaf_logits, Stream stream = {});
void comet_reached_logits_reference(const CometShape& shape, double gamma, DType dtype,
                                    const CometLinear& linear, const uint8_t* valid,
                                    void* split_logits, void* leaf_logits);

/// Does it pay? True if `num_probes` tokens, evenly spread over the batch, reach on average at most
/// 1/5 of the K*(2E-1) logits. Stops at the first token that makes it false. Host only.
bool comet_reaches_few(const CometShape& shape, double gamma, DType dtype,
                       const CometLinear& linear, int64_t num_probes);

}  // namespace perseid::kernels
