#pragma once
#include "moe/ops/gate_op.h"

// Internal: arguments that several gates have. Each gate is a function here that returns its row.

namespace perseid::ops {

GateOp top_k_op();
GateOp noisy_top_k_op();
GateOp gshard_op();
GateOp remoe_op();
GateOp comet_op();
GateOp dselect_k_op();
GateOp expert_choice_op();
GateOp base_op();
GateOp sinkhorn_op();
GateOp statistical_top_k_op();
GateOp hash_op();

// Arguments of every gate.
#define PERSEID_COMMON_ARGUMENTS                                                                  \
  "Tensor? valid=None, bool training=False, int tokens_global=0, int first_token=0, int step=0, " \
  "int seed=0, int layer_id=0, int gate_id=0"

inline gates::GateInput gate_input(const Arguments& arguments, const at::Tensor& tokens) {
  gates::GateInput input;
  input.tokens = tokens;
  if (arguments.has("valid")) input.valid = arguments.tensor("valid");
  input.training = arguments.flag("training");
  input.tokens_global = arguments.integer("tokens_global");
  input.first_token = arguments.integer("first_token");
  input.step = arguments.integer("step");
  return input;
}

template <typename Options>
Options with_key(Options options, const Arguments& arguments) {
  return options.seed(static_cast<uint64_t>(arguments.integer("seed")))
      .layer_id(arguments.integer("layer_id"))
      .gate_id(arguments.integer("gate_id"));
}

inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline gates::InputNorm input_norm(const Arguments& arguments) {
  return arguments.flag("layer_norm") ? gates::InputNorm::kLayerNorm : gates::InputNorm::kNone;
}

/// Shape of a gate with a linear router: `weight` [E, D] and `top_k`.
inline GateShape linear_shape(const Arguments& arguments) {
  const at::Tensor weight = arguments.tensor("weight");
  return {arguments.tensor("tokens").sym_size(0), weight.sym_size(0), arguments.integer("top_k"),
          compute_type(weight)};
}

/// Shape of a gate with a linear router that may give a token any number of experts.
inline GateShape ragged_shape(const Arguments& arguments) {
  const at::Tensor weight = arguments.tensor("weight");
  return {arguments.tensor("tokens").sym_size(0), weight.sym_size(0), weight.sym_size(0),
          compute_type(weight)};
}

/// The weight of a linear router, which decides E and D.
inline at::Tensor router_matrix(const char* operation, const Arguments& arguments) {
  const at::Tensor weight = arguments.tensor("weight");
  require(weight.dim() == 2 && weight.is_floating_point(), operation, "weight", weight.sizes(),
          "is not a floating [E, D] matrix");
  return weight;
}

}  // namespace perseid::ops
