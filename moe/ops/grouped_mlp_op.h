#pragma once

namespace torch {
class Library;
}

// Internal: the experts of a layer as one operation, which permutes and combines by itself.
//
//   grouped_mlp(Tensor tokens, Tensor token_offsets, Tensor expert_idx, Tensor weights,
//               Tensor up_proj, Tensor down_proj, Tensor? up_bias=None, Tensor? down_bias=None, *,
//               str activation='silu', bool gated=True) -> (Tensor output, Tensor pre)
//   output [T, d_out] = sum over the assignments of a token of weight * expert(token), see
//   moe/grouped_mlp.h for the layout of parameters: up_proj [E, 2F, D], gate rows first (not gated:
//   [E, F, D]), down_proj [E, d_out, F]. pre [C, 2F or F]: pre-activations, for the backward.

namespace perseid::ops {

void define_grouped_mlp(torch::Library& library);
void implement_grouped_mlp_on_cpu(torch::Library& library);
void implement_grouped_mlp_on_meta(torch::Library& library);
void implement_grouped_mlp_autograd(torch::Library& library);

}  // namespace perseid::ops
