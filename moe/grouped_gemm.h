#pragma once
#include <ATen/core/Tensor.h>

#include "moe/routing_plan.h"

// Internal: products over the rows of each expert, for rows sorted by expert, as whole-batch
// operations: the form that GPUs want. (On the CPU moe/products.h deals segments to threads.)

namespace perseid {

/// Back ends, chosen by type and shape:
///   aten  at::_grouped_mm: float32, bfloat16 and float16 whose rows are multiples of 16 bytes, up
///   to
///         1023 experts. With bfloat16 on compute capability 9 the offsets stay on the GPU and the
///         host does not wait; otherwise LibTorch itself loops, and the host waits.
///   loop  one product for each expert: everything else, and the oracle. The host waits for
///   offsets.
class GroupedGemm {
 public:
  enum class Backend : uint8_t { kAuto, kLoop };
  explicit GroupedGemm(const LocalPlan& plan, Backend backend = Backend::kAuto);

  /// rows W_e^T. @param rows [R, k] @param weight [L, n, k] @return [R, n]
  at::Tensor forward(const at::Tensor& rows, const at::Tensor& weight) const;
  /// grad W_e. @param grad [R, n] @param weight [L, n, k] @return [R, k]
  at::Tensor grad_input(const at::Tensor& grad, const at::Tensor& weight) const;
  /// grad_e^T rows_e for each expert, 0 for experts without rows. @return [L, n, k]
  at::Tensor grad_weight(const at::Tensor& grad, const at::Tensor& rows) const;

 private:
  bool fits_aten(const at::Tensor& a, const at::Tensor& b) const;
  const LocalPlan& plan_;
  Backend backend_;
  at::Tensor ends_;  // [L] int32, sorted places before the next expert
};

}  // namespace perseid
