#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

namespace perseid::kernels {

struct SinkhornShape {
  int64_t num_tokens = 0;   ///< T >= 0
  int64_t num_experts = 0;  ///< E >= 1
};

struct SinkhornOptions {
  int64_t max_iterations = 50;  ///< >= 1
  double tolerance = 1e-4;      ///< >= 0, of the mean change of log d1 in one iteration
};

/// Balances a table of logits (S-BASE, Clark et al. 2022; Sinkhorn): with M = e^logits it
/// alternates
///   d0[t] = 1 / (T sum_e M[t, e] d1[e])     d1[e] = 1 / (E sum_t M[t, e] d0[t]),     d1 = 1 at
///   first,
/// so that the plan d0 M d1 has rows of sum 1/T and columns of sum 1/E. It ends when the mean over
/// experts of |change of log d1| is at most the tolerance, or after max_iterations. The plan orders
/// the experts of a token like logits[t, e] + log d1[e].
///
/// Logarithms throughout, logits relative to the largest of their token and each sum relative to
/// its largest term: logits of any size are safe. Exponentials in the type of the logits, sums over
/// tokens in double by fixed blocks: same bits for any thread count.
/// @param logits  [T, E] fp32 or fp64, finite
/// @param log_d1  [E] float64; 0 for T = 0
/// Returns the number of iterations. Each costs 2*T*E exponentials. On kCuda the host waits for the
/// logits, does the work and copies log_d1 back.
int64_t sinkhorn(const SinkhornShape& shape, const SinkhornOptions& options, DType dtype,
                 const void* logits, double* log_d1, Stream stream = {});
int64_t sinkhorn_reference(const SinkhornShape& shape, const SinkhornOptions& options, DType dtype,
                           const void* logits, double* log_d1);

}  // namespace perseid::kernels
