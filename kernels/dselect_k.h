#pragma once
#include <bit>
#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/stream.h"

// The DSelect-k gate (Hazimeh et al. 2021, "DSelect-k: Differentiable Selection in the Mixture of
// Experts with Applications to Multi-Task Learning", arXiv 2106.03760): K selectors, each of which
// picks one expert by the bits of its number, smoothly. Once the bits of a token are saturated it
// has at most K experts.

namespace perseid::kernels {

/// Bits of an expert's number, ceil(log2 E); 0 for one expert.
inline int64_t dselect_k_bits(int64_t num_experts) {
  return std::bit_width(static_cast<uint64_t>(num_experts - 1));
}

struct DSelectKShape {
  int64_t num_tokens = 0;     ///< T >= 0
  int64_t num_experts = 0;    ///< E in [1, 2^31), any number; bits = dselect_k_bits(E)
  int64_t num_selectors = 0;  ///< 1 <= K <= E
};

struct DSelectKOptions {
  double gamma = 1;  ///< width of the switches, above 0
  /// Weights below it become 0, the others stay as they are; 0: exact.
  double min_weight = 0;
  /// Each selector counts as one-hot on the expert of its largest r, equal ones on the smaller
  /// code: at most K experts. Entropy and penalty and their gradients stay those of the soft
  /// selector.
  bool hard_eval = false;
  /// Weights are divided by their sum, where that is not 0.
  bool renormalize = false;
};

/// Inputs; floating ones are float32 or float64, as `dtype` says.
struct DSelectKInput {
  /// [T, K*bits + K] first the code logits z [K, bits], most significant bit first, then the
  /// selector logits omega [K]
  const void* logits = nullptr;
  /// [K, E] expert of each code below E, in [0, E); null: code j is expert j. Two codes of a
  /// selector may share an expert.
  const int32_t* expert_map = nullptr;
  const uint8_t* valid = nullptr;  ///< [T] 1 = a real token; null = all are. Others get zeros
};

/// Outputs; a null pointer is not written.
struct DSelectKOutput {
  void* weights = nullptr;                ///< [T, E] g
  double* entropy_sum = nullptr;          ///< [1] sum over valid tokens, selectors, experts of
                                          ///< -r log(r + 1e-6)
  double* penalty_sum = nullptr;          ///< [1] sum over valid tokens and selectors of
                                          ///< 1 / (1e-6 + sum_j r_j)
  double* removed_weight = nullptr;       ///< [1] sum of the weights below min_weight
  int64_t* num_switches = nullptr;        ///< [1] K*bits for each valid token without a NaN
  int64_t* saturated_switches = nullptr;  ///< [1] of these, at exactly 0 or 1
  int64_t* non_finite_tokens = nullptr;   ///< [1] valid tokens with a NaN or an infinity in a logit
};

/// s_ib = S(z_ib; gamma) (kernels/smooth_step.h); r_ij = prod_b (s_ib where bit b of j is 1, else
/// 1 - s_ib) for the codes j < E, and 0 where it is below the smallest normal number; alpha =
/// softmax(omega); g_m = sum of alpha_i r_ij over selectors and their codes of expert m. So g is
/// exactly 0 where every such r is. Its sum is 1 if E is a power of two, else 1 less the mass on
/// the codes from E on; a token whose mass is all there has no expert. Selectors with omega = +inf
/// share all weight equally; if all have -inf, alpha = 1/K. A NaN in a logit: experts 0 .. K-1 get
/// NaN, the others 0, and the sums become NaN. Neither entropy nor penalty depends on the map.
/// Arithmetic in `dtype`, sums over tokens in double over fixed blocks of tokens: same bits for any
/// thread count. Reads T*K*(bits+1), writes T*E elements.
void dselect_k(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
               const DSelectKInput& input, const DSelectKOutput& output, Stream stream = {});
void dselect_k_reference(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
                         const DSelectKInput& input, const DSelectKOutput& output);

/// Gradients that reach the gate; a null pointer means zero.
struct DSelectKGradInput {
  const void* weights = nullptr;             ///< [T, E] of the forward
  const void* grad_weights = nullptr;        ///< [T, E] read only where `weights` is above 0
  const double* grad_entropy_sum = nullptr;  ///< [1]
  const double* grad_penalty_sum = nullptr;  ///< [1]
};

/// Writes grad_logits [T, K*bits + K] whole. With rho = grad_weights where g > 0, else 0 (after
/// renormalize by N: (rho - sum_m g_m rho_m) / N), rho_ij that of the expert of selector i's code
/// j, d_i = sum_j r_ij rho_ij, c = grad_entropy_sum and p = grad_penalty_sum:
///   grad omega_i = alpha_i (d_i - sum_k alpha_k d_k)
///   G_ij = alpha_i rho_ij + c (-log(r_ij + eps) - r_ij / (r_ij + eps)) - p / (eps + sum_l r_il)^2
///   grad z_ib = S'(z_ib) sum_j G_ij (2 bit_b(j) - 1) prod_{b' != b}(...)
/// with eps = 1e-6 and G = 0 where r = 0; the products leave out one factor, none is divided away.
/// Exact though rho is not read where g = 0: such an r has a saturated switch. With hard_eval r
/// does not depend on z in g. Where the largest omega is infinite, alpha is a convention and has no
/// gradient. Invalid tokens get 0, tokens with a NaN get NaN. Same inputs as the forward; reads and
/// writes T*K*(bits+1), reads T*E. Deterministic.
void dselect_k_backward(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
                        const DSelectKInput& input, const DSelectKGradInput& grad,
                        void* grad_logits, Stream stream = {});
void dselect_k_backward_reference(const DSelectKShape& shape, const DSelectKOptions& options,
                                  DType dtype, const DSelectKInput& input,
                                  const DSelectKGradInput& grad, void* grad_logits);

}  // namespace perseid::kernels
