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

/// SET where a weight that was just dropped may come back, as its authors' code does.
SparsifierConfig set_official(double epsilon, int64_t steps_per_epoch, int64_t num_epochs,
                              double zeta = 0.3);

/// RigL (Evci et al. 2020): the smallest weights go, those with the largest gradient come and start
/// with 0; ERK, cosine from 0.3 until three quarters of all steps, instead of the optimizer step.
/// Batches below about 400 samples want grad_accum above 1, and every * batch above 10^4.
SparsifierConfig rigl(const Density& density, int64_t total_steps, int64_t every = 100);

/// RigL where a weight that was just dropped may come back, as its authors' code does.
SparsifierConfig rigl_official(const Density& density, int64_t total_steps, int64_t every = 100);

/// Sparse momentum (SNFS, Dettmers and Zettlemoyer 2019): as RigL, but those with the largest
/// moving average of the gradient come, which is made of the gradients of all entries in every
/// step.
SparsifierConfig snfs(const Density& density, int64_t total_steps, int64_t every = 100);

/// In-time over-parameterization (Liu et al. 2021): RigL with few large updates, from a half to
/// 0.005 of the weights, until the end of training and after the optimizer step. SparsityTotals has
/// its rate of weights that were ever active.
SparsifierConfig rigl_itop(const Density& density, int64_t total_steps, int64_t every = 4000);

/// DSL (dynamic sparse learning of recommenders): RigL-ITOP at one density everywhere, from 100 to
/// 3000 steps between updates.
SparsifierConfig dsl(int64_t total_steps, int64_t every = 1000, const Density& density = 0.5);

/// RigL that looks at the gradient of 4 random inactive weights for each that comes, no matter how
/// large the layer: with a link no gradient of all weights is made. For big experts. Before the
/// optimizer step, uniform.
SparsifierConfig sampled(const Density& density, int64_t total_steps, int64_t every = 100);

/// RigL of blocks by Frobenius norms of weights and gradients; uniform, units take turns, before
/// the optimizer step.
SparsifierConfig rigl_block(const Density& density, int64_t total_steps, int64_t block = 64,
                            int64_t every = 100);
/// The same where those blocks come that guarantee the most progress: norm^2 of the gradient over
/// the energy of its inputs (Nutini, Laradji and Schmidt). Needs a link.
SparsifierConfig greedy_block(const Density& density, int64_t total_steps, int64_t block = 64,
                              int64_t every = 100);

/// SRigL (Lasby et al. 2024): RigL with constant fan-in, after the optimizer step; rows in which
/// fewer than gamma of the fan-in matter lose it to the others. Without that it falls far behind
/// below a density of 5 %. List the rows that stay, those of the last layer, in ablation.kept.
/// @param gamma  0.3 for most networks, 0.95 for transformers; 0: no ablation
SparsifierConfig srigl(const Density& density, int64_t total_steps, double gamma = 0.3,
                       int64_t every = 100);

/// Whole hidden units: those with the smallest weights go, those whose outgoing gradient would be
/// largest come with fresh incoming weights. Slowly: new ones have much to learn. What is left is a
/// smaller dense expert (compact_experts).
SparsifierConfig neuron(const Density& density, int64_t total_steps, int64_t every = 500);

/// Gradual magnitude pruning (Zhu and Gupta 2017): from dense to sparse by a cubic ramp over the
/// first three quarters of all steps; at each update the smallest weights of all units go and none
/// come.
SparsifierConfig gmp(const Density& density, int64_t total_steps, int64_t every = 100);

/// GraNet (Liu et al. 2021): the same ramp, from `initial`, and after what it takes half of the
/// weights move to where the gradient is largest, less and less of them by a cosine; after the
/// optimizer step.
SparsifierConfig granet(const Density& density, int64_t total_steps, int64_t every = 100,
                        const Density& initial = Density());

/// MEST (Yuan et al. 2021): uniform; each update prunes the share `mutation` of the weights of each
/// unit, the smallest |w| + |g|, and grows as many anywhere. The share halves after one and two
/// thirds of the updates (elastic mutation). With grow_first (its soft memory bound) an update
/// grows that share beyond the density, and the next one prunes what has proven smallest.
SparsifierConfig mest(const Density& density, int64_t total_steps, int64_t every = 100,
                      double mutation = 0.1, bool grow_first = false);

// N of M neighbours along `in`. All but the first two keep dense parameters while they train.

/// RigL where each group of M keeps N.
SparsifierConfig nm_dst(int64_t n, int64_t m, int64_t total_steps, int64_t every = 100);

/// The same with an N that falls: M - 1, M/2, M/4, ..., N, in equal parts of the updates. M/N is a
/// power of 2.
SparsifierConfig nm_ramp(int64_t n, int64_t m, int64_t total_steps, int64_t every = 100);

/// SR-STE (Zhou et al. 2021): the N largest count, all get the gradient, the others decay.
SparsifierConfig srste(int64_t n, int64_t m, double lambda = 2e-4);

/// MdGf (Bambhaniya et al. 2024): the others count less and less, by max(0, 1 - rate t) or
/// exp(-rate t).
SparsifierConfig mdgf_lin(int64_t n, int64_t m, double rate);
SparsifierConfig mdgf_exp(int64_t n, int64_t m, double rate = 1e-4);

/// SdGf (of the same): after dense_steps, equal frames of N:M from nearly dense to N:M. M/N is a
/// power of 2.
SparsifierConfig sdgf_step(int64_t n, int64_t m, int64_t total_steps, int64_t dense_steps = 0);
/// 8N:8M, 4N:4M, 2N:2M, N:M: one density, groups that grow smaller.
SparsifierConfig sdgf_geo(int64_t n, int64_t m, int64_t total_steps, int64_t dense_steps = 0);

/// Top-KAST (Jayakumar et al. 2020): the largest weights of each unit count, the gradient reaches
/// `backward_extra` more of them; dense parameters, chosen again every so many steps.
SparsifierConfig topkast(const Density& density, const Density& backward_extra, int64_t every);

}  // namespace perseid::presets
