#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Sinkhorn's relaxation of permutations (Mena et al. 2018, arXiv 1802.08665; as used by COMET+,
// Ibrahim et al. 2023, arXiv 2306.02824): a matrix of scores becomes an almost doubly stochastic
// one, and a permutation as the temperature goes to 0.

namespace perseid::kernels {

struct DoublyStochasticShape {
  int64_t num_matrices = 0;  ///< B >= 0, each by itself
  int64_t size = 0;          ///< n >= 1: matrices are [n, n]
};

struct DoublyStochasticOptions {
  double temperature = 1e-3;  ///< above 0, finite; 1e-7 is safe for scores of any size
  int64_t iterations = 20;    ///< >= 1
};

/// With x = scores / temperature it repeats `iterations` times
///   x[i, j] -= log sum_j e^x[i, j]   then   x[i, j] -= log sum_i e^x[i, j]
/// and returns pi = e^x: columns sum to 1, rows nearly so, as columns come last.
///
/// Kept as potentials, x[i, j] = scores[i, j] / temperature - row[i] - column[j], in double
/// whatever `dtype` is, each sum relative to its largest term or to one near it: no overflow at any
/// temperature. A value of pi is good to about 1e-16 * |scores / temperature|, relative. A matrix
/// with a score that is not finite, or above 1e12 times the temperature, becomes all NaN,
/// potentials included. Matrices run in parallel, same bits for any thread count. On the CPU an
/// iteration costs 2*n^2 products and, if potentials are kept, 2n logarithms; only the first one,
/// and some that follow where potentials drift far, n^2 exponentials; memory of a thread: 2*n^2
/// doubles. On kCuda an iteration costs 2*n^2 exponentials.
/// @param scores   [B, n, n] fp32 or fp64
/// @param pi       [B, n, n] of `dtype`
/// @param rows     [B, iterations, n] row potentials after each iteration, for the backward; null,
///                 with `columns`: not kept
/// @param columns  [B, iterations, n] likewise
void doubly_stochastic(const DoublyStochasticShape& shape, const DoublyStochasticOptions& options,
                       DType dtype, const void* scores, void* pi, double* rows, double* columns,
                       Stream stream = {});
/// x itself, iteration by iteration.
void doubly_stochastic_reference(const DoublyStochasticShape& shape,
                                 const DoublyStochasticOptions& options, DType dtype,
                                 const void* scores, void* pi);

/// The gradient through all iterations, exact. With S the softmax of a step over the sums it formed
/// (e^(x before it - its potential), from the kept potentials), the gradient d of a potential goes
/// to the scores as S*d and to the potentials before it. Terms of the size of grad_pi / temperature
/// cancel; they are good to about 1e-16 * |scores / temperature|. A matrix that became NaN has a
/// gradient of NaN. On the CPU an iteration costs 4*n^2 products and 3n exponentials; memory of a
/// thread: 4*n^2 doubles. On kCuda an iteration costs 2*n^2 exponentials; memory of a matrix: n^2
/// doubles.
/// @param rows, columns  those of the forward
/// @param grad_pi        [B, n, n] of `dtype`
/// @param grad_scores    [B, n, n] of `dtype`, written whole
void doubly_stochastic_backward(const DoublyStochasticShape& shape,
                                const DoublyStochasticOptions& options, DType dtype,
                                const void* scores, const double* rows, const double* columns,
                                const void* grad_pi, void* grad_scores, Stream stream = {});
/// Keeps x of every step and goes back through them.
void doubly_stochastic_backward_reference(const DoublyStochasticShape& shape,
                                          const DoublyStochasticOptions& options, DType dtype,
                                          const void* scores, const void* grad_pi,
                                          void* grad_scores);

}  // namespace perseid::kernels
