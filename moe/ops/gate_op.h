#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <string>
#include <string_view>
#include <vector>

#include "gates/gate.h"
#include "moe/ops/arguments.h"

namespace torch {
class Library;
}

// Internal: a gate as two operations of LibTorch's dispatcher,
//
//   NAME(ARGUMENTS) -> (Tensor weights, Tensor expert_idx, Tensor token_offsets, Tensor losses,
//                       Tensor tokens_per_expert)
//   NAME_backward(Tensor? grad_weights, Tensor? grad_losses, bool[] wanted, ARGUMENTS) -> Tensor[]
//
// weights [C], expert_idx [C] int32, token_offsets [T+1] int32, losses [N], tokens_per_expert [E]
// int64. The number of assignments A = token_offsets[T] is known after the call only, so both
// tables have room for the most that this gate can select, C: shapes follow from shapes, as
// torch.compile needs them. Entries from A on are 0 and -1.
//
// The backward takes the same arguments, forms the gate once more and differentiates that, so the
// graph keeps the arguments and nothing else. A gate is a pure function: both calls select the
// same pairs, bit for bit.

namespace perseid::ops {

/// Sizes of the outputs of a call, from the sizes of its arguments.
struct GateShape {
  c10::SymInt num_tokens;
  c10::SymInt num_experts;
  c10::SymInt experts_per_token;  ///< at most: C = num_tokens * experts_per_token
  at::ScalarType type;            ///< of weights and losses
};

struct GateOp {
  const char* name;
  const char* arguments;                    ///< of the schema
  std::vector<const char*> differentiable;  ///< tensors among them that get a gradient
  std::vector<const char*> losses;          ///< names, in the order of the output
  GateShape (*shape)(const Arguments&);
  gates::GateOutput (*run)(const Arguments&);
};

/// All gates.
const std::vector<GateOp>& gate_ops();

void define_gates(torch::Library& library);
void implement_gates_on_cpu(torch::Library& library);
void implement_gates_on_meta(torch::Library& library);
void implement_gates_autograd(torch::Library& library);

}  // namespace perseid::ops
