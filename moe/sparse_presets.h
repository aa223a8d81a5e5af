#pragma once
#include <cstdint>

#include "moe/sparsifier.h"

// Known methods as configurations: change any field of what they return.

namespace perseid::presets {

/// A random mask that never changes: the baseline of all others. Shared out by ERK.
SparsifierConfig static_mask(const Density& density);

/// Sparse Evolutionary Training (Mocanu et al. 2018): after each epoch but the last, `zeta` of the
/// positive and of the negative weights nearest to 0 go, and as many come anywhere, drawn from
/// N(0, 0.1^2).
/// @param epsilon  a weight [out, in] gets about epsilon (out + in) entries
SparsifierConfig set(double epsilon, int64_t steps_per_epoch, int64_t num_epochs,
                     double zeta = 0.3);

/// RigL (Evci et al. 2020): the smallest weights go, those with the largest gradient come and start
/// with 0; ERK, cosine from 0.3 until three quarters of all steps, instead of the optimizer step.
/// Batches below about 400 samples want grad_accum above 1, and every * batch above 10^4.
SparsifierConfig rigl(const Density& density, int64_t total_steps, int64_t every = 100);

}  // namespace perseid::presets
