#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "gates/comet_gate.h"
#include "gates/smooth_step_gate.h"
#include "kernels/comet.h"

// Internal: the differentiable core of the COMET gate.

namespace perseid::gates {

inline constexpr const char* kCometGate = "comet_gate";  ///< in errors

struct CometParameters {
  at::Tensor split_weight, split_bias, leaf_weight, leaf_bias;  ///< weights undefined: static
};

struct CometCoreOptions {
  kernels::CometOptions kernel;
  int64_t num_experts = 0;
  int64_t num_trees = 0;
  int64_t num_tokens = 0;
  int64_t num_valid = 0;
  at::Tensor expert_map;  ///< [K, E] int32, contiguous; undefined: leaf l is expert l
  Descent descent = Descent::kAuto;
};

/// Logits, kernels::comet and the ragged rows of its weights: one node of the graph. Static
/// parameters: one evaluation, whose row every valid token gets; sums count it num_valid times.
/// Same bits for any number of threads. No second derivatives.
/// @param features  [T, D] in the compute type; not read if static
/// @param valid     [T] bool or undefined: all are
/// @param counts    written
SmoothStepResult comet_core(const at::Tensor& features, const CometParameters& parameters,
                            const at::Tensor& valid, const CometCoreOptions& options,
                            SmoothStepCounts& counts);

}  // namespace perseid::gates
