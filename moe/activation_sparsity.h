#pragma once
#include <cstdint>

namespace perseid {

enum class ActivationSparsityKind : uint8_t { kNone, kTopK, kStatisticalTopK };

/// How many of the F hidden values of a row an expert uses, by its pre-activations z (gated
/// experts: those of the gate branch), before the activation function. Exact zeros then, but
/// products stay dense: no time is saved in training.
struct ActivationSparsity {
  ActivationSparsityKind kind = ActivationSparsityKind::kNone;
  int64_t k = 0;
  bool unbiased = false;          ///< kStatisticalTopK: std over F - 1 instead of F
  bool detach_threshold = false;  ///< kStatisticalTopK: no gradient through the threshold

  /// The k largest z of each row as they are, equal ones with the smaller index; the others are 0,
  /// which all activations here map to 0. NaN stays. k = F is the dense expert.
  static ActivationSparsity top_k(int64_t k) { return {ActivationSparsityKind::kTopK, k}; }
  /// max(z - theta, 0), theta = mean(z) + Q std(z) with Q = kernels::normal_upper_quantile(k / F):
  /// of z that are normally distributed k are above it on average. Linear time, 1 <= k < F.
  static ActivationSparsity statistical_top_k(int64_t k) {
    return {ActivationSparsityKind::kStatisticalTopK, k};
  }
};

/// Throws ConfigError that names `operation` unless k fits d_ff = F.
void validate(const ActivationSparsity& sparsity, int64_t d_ff, const char* operation);

}  // namespace perseid
