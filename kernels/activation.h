#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

namespace perseid::kernels {

/// f of an expert. Gelu is the exact one, x * normcdf(x).
enum class Activation : uint8_t { kIdentity, kRelu, kGelu, kSilu };

/// act = f(pre) for plain experts; act = f(gate) * up for gated ones (SwiGLU, GEGLU), whose `pre`
/// row holds gate then up, F wide each.
struct ActivationShape {
  int64_t num_rows = 0;
  int64_t d_ff = 0;  ///< F, the width of one of gate and up
  Activation activation = Activation::kSilu;
  bool gated = true;
};

/// out[r, :] = weights[r] * act(pre[r, :]), formed in float32 (float64 for fp64), rounded once.
/// @param pre      [num_rows, gated ? 2F : F] of `dtype`
/// @param weights  [num_rows] float32 (float64 for fp64); null: all 1
/// @param out      [num_rows, F] of `dtype`
void activation_forward(const ActivationShape& shape, DType dtype, const void* pre,
                        const void* weights, void* out, Stream stream = {});
void activation_forward_reference(const ActivationShape& shape, DType dtype, const void* pre,
                                  const void* weights, void* out);

/// One pass of the backward. With g = grad_act[r, :], the gradient of the *unweighted* product that
/// follows (dOut W2), and s = weights[r]:
///   grad_weights[r] = <g, act>      grad_pre[r] = d(act)/d(pre) applied to s * g weighted_act[r] =
///   s * act
/// so the gradient of a routing weight needs no expert output. Null outputs are not written.
/// @param grad_act      [num_rows, F] of `dtype`
/// @param grad_pre      [num_rows, gated ? 2F : F] of `dtype`; may not overlap `pre`
/// @param weighted_act  [num_rows, F] of `dtype`; may be grad_act itself
/// @param grad_weights  [num_rows] float32 (float64 for fp64)
void activation_backward(const ActivationShape& shape, DType dtype, const void* pre,
                         const void* weights, const void* grad_act, void* grad_pre,
                         void* weighted_act, void* grad_weights, Stream stream = {});
void activation_backward_reference(const ActivationShape& shape, DType dtype, const void* pre,
                                   const void* weights, const void* grad_act, void* grad_pre,
                                   void* weighted_act, void* grad_weights);

}  // namespace perseid::kernels
