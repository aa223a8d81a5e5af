#pragma once
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// Statistical top-k (You et al. 2025, "Spark Transformer"; also in Gemma 3n): of scores that are
// roughly normal, those above mean + Q * std are K on average. A soft threshold in linear time,
// without a sort. On kCuda the host waits for the tables, does the work and copies the results
// back.

namespace perseid::kernels {

/// The number that a standard normal variable exceeds with probability `share` in (0, 1), to 15
/// digits.
double normal_upper_quantile(double share);

struct StatisticalTopKShape {
  int64_t num_tokens = 0;   ///< T >= 0
  int64_t num_experts = 0;  ///< E in [2, 2^31)
  int64_t top_k = 0;        ///< 1 <= K < E: at K = E no threshold is low enough
};

struct StatisticalTopKOptions {
  bool unbiased = false;          ///< std of a sample, over E - 1; else of the population, over E
  bool detach_threshold = false;  ///< the threshold is a constant for the gradient
  /// 1: a token with no score above the threshold goes to its largest one; 0: to no expert.
  int64_t min_experts = 1;
  int64_t cap = 0;  ///< at most this many experts, those of the largest scores; 0: no bound
};

/// g_j = max(z_j - theta, 0) with theta = mean(z) + Q std(z), Q = normal_upper_quantile(K / E). Of
/// more than `cap` positive ones the largest stay, equal ones with the smaller id. Where none is
/// positive and min_experts is 1, the largest z (equal ones: the smaller id) takes the mean as its
/// threshold, g = max z - mean(z), but at least the smallest normal number: equal scores choose
/// expert 0, whose output then does not count but whose gradient does. A NaN or an infinity in z:
/// experts 0 .. K-1 get NaN, the others 0.
/// Arithmetic in `dtype`: same bits for any thread count, and for z + c if c rounds nothing away.
/// Reads and writes T*E elements.
/// @param scores   [T, E] z, float32 or float64
/// @param valid    [T] 1 = a real token; null = all are. Others get zeros
/// @param weights  [T, E] g
/// @param non_finite_tokens  [1] valid tokens with a NaN or an infinity, or null
void statistical_top_k(const StatisticalTopKShape& shape, const StatisticalTopKOptions& options,
                       DType dtype, const void* scores, const uint8_t* valid, void* weights,
                       int64_t* non_finite_tokens, Stream stream = {});
void statistical_top_k_reference(const StatisticalTopKShape& shape,
                                 const StatisticalTopKOptions& options, DType dtype,
                                 const void* scores, const uint8_t* valid, void* weights,
                                 int64_t* non_finite_tokens);

/// grad z_j = rho_j - R (1/E + Q (z_j - mean(z)) / (nu std)) with rho_j = grad_weights where g > 0,
/// else 0, R = sum_j rho_j, and nu = E, or E - 1 if unbiased: scores below the threshold move it.
/// The second term is absent with detach_threshold, its part with Q where the mean is the
/// threshold. Invalid tokens get 0, tokens with a NaN or an infinity get NaN.
/// @param weights       [T, E] of the forward
/// @param grad_weights  [T, E] read only where `weights` is above 0
/// @param grad_scores   [T, E] written whole
void statistical_top_k_backward(const StatisticalTopKShape& shape,
                                const StatisticalTopKOptions& options, DType dtype,
                                const void* scores, const uint8_t* valid, const void* weights,
                                const void* grad_weights, void* grad_scores, Stream stream = {});
void statistical_top_k_backward_reference(const StatisticalTopKShape& shape,
                                          const StatisticalTopKOptions& options, DType dtype,
                                          const void* scores, const uint8_t* valid,
                                          const void* weights, const void* grad_weights,
                                          void* grad_scores);

}  // namespace perseid::kernels
