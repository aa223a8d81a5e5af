#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels/random.h"
#include "moe/sparse_mask.h"
#include "moe/sparse_structure.h"
#include "moe/sparse_update.h"

// What updates are decided by beyond weights and dense gradients: candidates, gradients at some
// positions only, scores made of both. Pure functions; sets and lists go row by row.

namespace perseid {

/// kSampledGrad: inactive atoms that an update may grow by score, any such set as likely as
/// another: in one cell exactly candidates_per_grown, rounded up, for each atom that the update
/// moves, or all there are; of several cells each its share, and not fewer than it could lose.
/// Depends on nothing but these arguments, so that it is known before the gradients come.
/// @param fraction  of the update
PackedMask draw_candidates(const AtomLayout& layout, const UpdateRule& rule,
                           const PackedMask& active, double fraction, kernels::RandomKey key);

/// Values of a dense tensor at some positions.
/// @param values  [out, in] any floating type, on any device
/// @return [1, positions] float64 of float64, else float32, where the values are
at::Tensor listed_values(const PackedMask& positions, const at::Tensor& values);

/// sums += the gradient of y = x W^T at some positions of W; nothing of W's size is made. Its time
/// is proportional to rows times positions.
/// @param x      [N, in] any floating type, on any device
/// @param delta  [N, out] gradient of y
/// @param sums   [1, positions] as of listed_values; undefined: it is made
void add_sampled_gradient(const PackedMask& positions, const at::Tensor& x, const at::Tensor& delta,
                          at::Tensor& sums);

/// Scores of some atoms by the values at their positions: root mean squares as of atom_scores, of
/// atoms of one position the values themselves, with their sign.
/// @param values  [1, positions of the atoms]
/// @return [atoms] float32, on the host
at::Tensor listed_scores(const AtomLayout& layout, const PackedMask& atoms,
                         const at::Tensor& values);

/// kMest: |w| + mest_lambda |g|; kTaylor: |w g|, which has the order of its square. Of atoms of
/// several positions the root mean square of these.
/// @param weight    [out, in]
/// @param gradient  [1, active positions]; undefined: 0
/// @return [num_atoms] float32, on the host, set at active atoms only
at::Tensor drop_scores(const AtomLayout& layout, const UpdateRule& rule, const PackedMask& active,
                       const at::Tensor& weight, const at::Tensor& gradient);

/// kGreedyProgress: Frobenius norm of the gradient of each atom / sqrt(L), which has the order of
/// its square / L; L is the sum of the energies of the atom's columns. 0 where L is.
/// @param gradient  [out, in]
/// @param energy    [1, in] float64, sum of x^2 over the rows
/// @return [num_atoms] float32, on the host
at::Tensor progress_scores(const AtomLayout& layout, const at::Tensor& gradient,
                           const at::Tensor& energy);

}  // namespace perseid
