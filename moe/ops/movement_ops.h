#pragma once

namespace torch {
class Library;
}

// Internal: permute and combine for one process, for experts that are written in Python.
//
//   permute(Tensor tokens, Tensor token_offsets, Tensor expert_idx, *, int num_experts)
//     -> (Tensor rows, Tensor places, Tensor expert_offsets)
//   rows [C, D]: rows expert_offsets[e] .. expert_offsets[e+1]-1 are the tokens of expert e, in the
//   order of tokens; those behind the last are 0. places [C] int32: row of each assignment, -1
//   where there is none. expert_offsets [E+1] int64.
//
//   combine(Tensor rows, Tensor places, Tensor token_offsets, Tensor? weights=None) -> Tensor
//   out[t] = sum over the assignments a of t, in order, of weights[a] * rows[places[a]]; no
//   weights: all are 1. The backward of permute is combine without weights.

namespace perseid::ops {

void define_movement(torch::Library& library);
void implement_movement_on_cpu(torch::Library& library);
void implement_movement_on_meta(torch::Library& library);
void implement_movement_autograd(torch::Library& library);

}  // namespace perseid::ops
