#pragma once
#include <ATen/core/Tensor.h>

#include "moe/activation_sparsity.h"

// Internal: activation sparsity on some rows of an expert, forward and backward without a graph. On
// the CPU.

namespace perseid {

/// The text of `kind`, for errors.
const char* name_of(ActivationSparsityKind kind);

class SparsePre {
 public:
  /// @param pre   [n, width] contiguous; the first d_ff of each row are z. Not changed
  SparsePre(const at::Tensor& pre, int64_t d_ff, const ActivationSparsity& sparsity);

  /// What the activation reads: `pre` with sparse z, or itself if nothing is to be done.
  const at::Tensor& rows() const { return rows_; }
  /// Turns the gradient of rows() into that of `pre`, in place.
  /// @param grad  [n, width]
  void backward(const at::Tensor& grad) const;

 private:
  int64_t d_ff_;
  ActivationSparsity sparsity_;
  at::Tensor rows_;
  at::Tensor z_;         ///< [n, d_ff] float32 or float64, contiguous; undefined if dense
  at::Tensor sparse_z_;  ///< kStatisticalTopK
  at::Tensor dropped_;   ///< kTopK: [n, d_ff] bool
};

}  // namespace perseid
