#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "gates/smooth_step_gate.h"
#include "kernels/dselect_k.h"

// Internal: the differentiable core of the DSelect-k gate.

namespace perseid::gates {

inline constexpr const char* kDSelectKGate = "dselect_k_gate";  ///< in errors

struct DSelectKCoreOptions {
  kernels::DSelectKOptions kernel;
  int64_t num_experts = 0;
  int64_t num_selectors = 0;
  int64_t num_tokens = 0;
  int64_t num_valid = 0;
  bool per_token = true;
  at::Tensor expert_map;  ///< [K, E] int32, contiguous; undefined: code j is expert j
};

struct DSelectKResult {
  SmoothStepResult rows;
  at::Tensor penalty_sum;  ///< scalar float64, differentiable: sum over valid tokens and selectors
};

/// kernels::dselect_k and the ragged rows of its weights: one node of the graph. It keeps logits
/// and weights [T, E]. Not per_token: one evaluation, whose row every valid token gets; sums count
/// it num_valid times. Same bits for any number of threads. No second derivatives.
/// @param logits  [T, K*bits + K], or [1, K*bits + K] if not per_token; float32 or float64
/// @param valid   [T] bool or undefined: all are
/// @param counts  written
DSelectKResult dselect_k_core(const at::Tensor& logits, const at::Tensor& valid,
                              const DSelectKCoreOptions& options, SmoothStepCounts& counts);

}  // namespace perseid::gates
