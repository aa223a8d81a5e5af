#include "moe/ops/gate_op.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gates/losses.h"

#include "moe/ops/gate_arguments.h"
#include "moe/threads.h"

namespace perseid::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

enum Output : uint8_t { kWeights, kExpertIdx, kOffsets, kLosses, kTokensPerExpert };
/// Of the backward, before those of the gate.
enum BackwardArgument : uint8_t { kGradWeights, kGradLosses, kWanted, kFirstOfGate };

std::string backward_name(const std::string& forward) { return forward + "_backward"; }

/// The gate behind an operation or its backward.
const GateOp& gate_of(const c10::OperatorHandle& op) {
  std::string_view name = op.schema().name();
  name.remove_prefix(name.rfind(':') + 1);
  for (const GateOp& gate : gate_ops()) {
    if (name == gate.name || name == backward_name(gate.name)) return gate;
  }
  PERSEID_INVARIANT(false && "an operation of no gate");
}

/// A loss over the tokens of this call alone, undefined if the gate has it switched off.
Tensor local_loss(const gates::GateOutput& output, std::string_view name) {
  const int64_t num_tokens = output.stats.num_tokens;
  for (const gates::GlobalLoss& loss : output.global_losses) {
    if (loss.name != name) continue;
    return gates::finish_global_loss(loss, loss.local_sum.detach(), num_tokens, 1).value;
  }
  if (name == "aux_loss" && output.balance.score_sum.defined()) {
    return gates::load_balance_loss(output.balance, output.balance.tokens_per_expert, num_tokens)
        .value;
  }
  return {};
}

/// [N] losses. Those that are no means over tokens count by the share of the tokens that is here.
Tensor all_losses(const GateOp& gate, const gates::GateOutput& output, int64_t tokens_global,
                  at::ScalarType type) {
  const auto num_tokens = static_cast<double>(output.stats.num_tokens);
  const double share = tokens_global > 0 ? num_tokens / static_cast<double>(tokens_global) : 1.0;
  std::vector<Tensor> losses;
  for (const char* name : gate.losses) {
    Tensor loss = local_loss(output, name);
    if (loss.defined()) loss = loss.mul(share);
    for (const gates::NamedLoss& finished : output.losses) {
      if (finished.name == name) loss = finished.value;
    }
    losses.push_back(loss.defined() ? loss.to(type) : at::zeros({}, type));
  }
  return losses.empty() ? at::zeros({0}, type) : at::stack(losses);
}

Tensor padded(const Tensor& values, int64_t capacity, double value) {
  const int64_t gap = capacity - values.size(0);
  PERSEID_INVARIANT(gap >= 0);
  return gap == 0 ? values.contiguous() : at::constant_pad_nd(values, {0, gap}, value);
}

/// The outputs of a call, in the graph if gradients are on.
std::vector<Tensor> run_gate(const GateOp& gate, const Arguments& arguments) {
  use_libtorch_threads();
  const gates::GateOutput output = gate.run(arguments);
  const GateShape shape = gate.shape(arguments);
  const int64_t capacity = (shape.num_tokens * shape.experts_per_token).expect_int();
  return {padded(output.routing.weights, capacity, 0),
          padded(output.routing.expert_idx, capacity, -1), gates::explicit_offsets(output.routing),
          all_losses(gate, output, arguments.integer("tokens_global"), shape.type),
          output.stats.tokens_per_expert};
}

template <typename Values>
void answer(Stack& stack, size_t num_arguments, Values&& values) {
  torch::jit::drop(stack, num_arguments);
  for (Tensor& value : values) stack.emplace_back(std::move(value));
}

void forward_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  std::vector<Tensor> outputs;
  {
    const c10::NoGradGuard no_grad;
    const Arguments arguments(op.schema(), torch::jit::last(*stack, count));
    outputs = run_gate(gate_of(op), arguments);
  }
  answer(*stack, count, outputs);
}

void forward_on_meta(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  std::vector<Tensor> outputs;
  {
    const Arguments arguments(op.schema(), torch::jit::last(*stack, count));
    const GateOp& gate = gate_of(op);
    const GateShape shape = gate.shape(arguments);
    const c10::SymInt capacity = shape.num_tokens * shape.experts_per_token;
    const at::TensorOptions options = at::TensorOptions(at::kMeta).dtype(shape.type);
    const auto make = [&](const c10::SymInt& size, at::ScalarType type) {
      return at::empty_symint({size}, options.dtype(type));
    };
    outputs = {make(capacity, shape.type), make(capacity, at::kInt),
               make(shape.num_tokens + 1, at::kInt),
               make(static_cast<int64_t>(gate.losses.size()), shape.type),
               make(shape.num_experts, at::kLong)};
  }
  answer(*stack, count, outputs);
}

/// Lets a kernel, which runs below autograd, use autograd for itself.
class OwnGraph {
 private:
  c10::impl::ForceDispatchKeyGuard keys_{c10::default_included_set, c10::default_excluded_set};
  c10::AutoGradMode grad_mode_{true};
};

/// Contiguous, with memory that no other tensor shares: gradients of parts of one tensor are views
/// of it, and outputs of an operation must not be.
Tensor own(const Tensor& gradient) {
  const bool is_alone = gradient.is_contiguous() && gradient.storage().use_count() == 1;
  return is_alone ? gradient : gradient.clone(at::MemoryFormat::Contiguous);
}

/// Gradients of the wanted arguments; `values` are those of the backward's schema.
variable_list gate_gradients(const GateOp& gate, const c10::FunctionSchema& schema, Stack values) {
  const OwnGraph own_graph;
  variable_list leaves;
  for (size_t i = 0; i < gate.differentiable.size(); ++i) {
    if (!values[kWanted].toBoolList().get(i)) continue;
    const auto place = schema.argumentIndexWithName(gate.differentiable[i]);
    leaves.push_back(values[static_cast<size_t>(*place)].toTensor().detach().requires_grad_(true));
    values[static_cast<size_t>(*place)] = leaves.back();
  }
  const std::vector<Tensor> outputs = run_gate(gate, Arguments(schema, values));
  variable_list roots, gradients;
  const auto add_root = [&](const Tensor& root, const c10::IValue& gradient) {
    if (gradient.isNone() || !root.requires_grad()) return;
    roots.push_back(root);
    gradients.push_back(gradient.toTensor());
  };
  add_root(outputs[kWeights], values[kGradWeights]);
  add_root(outputs[kLosses], values[kGradLosses]);

  variable_list results(leaves.size());
  if (!roots.empty() && !leaves.empty()) {
    results = torch::autograd::grad(roots, leaves, gradients, /*retain_graph=*/false,
                                    /*create_graph=*/false, /*allow_unused=*/true);
  }
  for (size_t i = 0; i < results.size(); ++i) {
    results[i] = results[i].defined() ? own(results[i]) : own(at::zeros_like(leaves[i].detach()));
  }
  return results;
}

void backward_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const variable_list results =
      gate_gradients(gate_of(op), op.schema(), torch::jit::last(*stack, count).vec());
  torch::jit::drop(*stack, count);
  stack->emplace_back(results);
}

void backward_on_meta(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  variable_list results;
  {
    const Arguments arguments(op.schema(), torch::jit::last(*stack, count));
    const auto wanted = arguments["wanted"].toBoolList();
    const GateOp& gate = gate_of(op);
    for (size_t i = 0; i < gate.differentiable.size(); ++i) {
      if (!wanted.get(i)) continue;
      results.push_back(at::empty_like(arguments.tensor(gate.differentiable[i]), {}, {}, {}, {},
                                       at::MemoryFormat::Contiguous));
    }
  }
  torch::jit::drop(*stack, count);
  stack->emplace_back(results);
}

/// Calls the kernel below autograd and, in the backward, the backward operation: the graph of
/// torch.compile sees these two.
struct GateFunction : torch::autograd::Function<GateFunction> {
  /// @param differentiable  those that are given, in the order of GateOp
  static variable_list forward(AutogradContext* ctx, at::TensorList /*differentiable*/,
                               const c10::OperatorHandle* op, const Stack* arguments) {
    const auto& names = op->schema().arguments();
    variable_list tensors;
    for (size_t i = 0; i < names.size(); ++i) {
      const c10::IValue& value = (*arguments)[i];
      if (value.isTensor()) {
        tensors.push_back(value.toTensor());
      } else {
        ctx->saved_data[names[i].name()] = value;
      }
    }
    ctx->save_for_backward(tensors);
    ctx->saved_data["name"] = op->schema().name();
    ctx->set_materialize_grads(false);

    at::AutoDispatchBelowADInplaceOrView below;
    Stack stack = *arguments;
    op->callBoxed(stack);
    variable_list outputs;
    for (const c10::IValue& value : stack) outputs.push_back(value.toTensor());
    ctx->mark_non_differentiable(
        {outputs[kOffsets], outputs[kExpertIdx], outputs[kTokensPerExpert]});
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const std::string forward_name = ctx->saved_data["name"].toStringRef();
    const auto backward =
        c10::Dispatcher::singleton().findSchemaOrThrow(backward_name(forward_name).c_str(), "");
    const GateOp& gate = gate_of(backward);
    const auto gradient = [&](Output output) {
      return gradients[output].defined() ? c10::IValue(gradients[output]) : c10::IValue();
    };
    Stack stack = {gradient(kWeights), gradient(kLosses), c10::List<bool>()};
    const auto& names = backward.schema().arguments();
    const variable_list saved = ctx->get_saved_variables();
    size_t next = 0;
    for (size_t i = kFirstOfGate; i < names.size(); ++i) {
      const auto value = ctx->saved_data.find(names[i].name());
      stack.push_back(value == ctx->saved_data.end() ? c10::IValue(saved[next++]) : value->second);
    }

    const Arguments arguments(backward.schema(), stack);
    c10::List<bool> wanted;
    std::vector<bool> is_wanted;  // of those that are given, as the inputs of forward
    for (const char* name : gate.differentiable) {
      const bool is_given = arguments.has(name);
      wanted.push_back(is_given && ctx->needs_input_grad(is_wanted.size()));
      if (is_given) is_wanted.push_back(wanted.get(wanted.size() - 1));
    }
    stack[kWanted] = wanted;
    backward.callBoxed(stack);

    const std::vector<Tensor> computed = stack[0].toTensorVector();
    variable_list results;
    size_t next_computed = 0;
    for (const bool wants : is_wanted) {
      results.push_back(wants ? computed[next_computed++] : Tensor());
    }
    results.resize(results.size() + 2);  // nothing for the operation and its arguments
    return results;
  }
};

void autograd(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const Stack values = torch::jit::last(*stack, count).vec();
  const Arguments arguments(op.schema(), values);
  variable_list differentiable;
  for (const char* name : gate_of(op).differentiable) {
    if (arguments.has(name)) differentiable.push_back(arguments.tensor(name));
  }
  variable_list outputs = GateFunction::apply(at::TensorList(differentiable), &op, &values);
  answer(*stack, count, outputs);
}

template <auto Forward, auto Backward>
void implement(torch::Library& library) {
  for (const GateOp& gate : gate_ops()) {
    library.impl(gate.name, torch::CppFunction::makeFromBoxedFunction<Forward>());
    library.impl(backward_name(gate.name).c_str(),
                 torch::CppFunction::makeFromBoxedFunction<Backward>());
  }
}

}  // namespace

const std::vector<GateOp>& gate_ops() {
  static const std::vector<GateOp> ops = {
      top_k_op(),    noisy_top_k_op(),       gshard_op(),        remoe_op(),
      comet_op(),    dselect_k_op(),         expert_choice_op(), base_op(),
      sinkhorn_op(), statistical_top_k_op(), hash_op()};
  return ops;
}

void define_gates(torch::Library& library) {
  for (const GateOp& gate : gate_ops()) {
    const std::string arguments = std::string(gate.arguments) + ")";
    const std::string forward = std::string(gate.name) + "(" + arguments +
                                " -> (Tensor weights, Tensor expert_idx, Tensor token_offsets, "
                                "Tensor losses, Tensor tokens_per_expert)";
    const std::string backward = backward_name(gate.name) +
                                 "(Tensor? grad_weights, Tensor? grad_losses, bool[] wanted, " +
                                 arguments + " -> Tensor[]";
    library.def(forward.c_str());
    library.def(backward.c_str());
  }
}

void implement_gates_on_cpu(torch::Library& library) {
  implement<&forward_on_cpu, &backward_on_cpu>(library);
}
void implement_gates_on_meta(torch::Library& library) {
  implement<&forward_on_meta, &backward_on_meta>(library);
}
void implement_gates_autograd(torch::Library& library) {
  for (const GateOp& gate : gate_ops()) {
    library.impl(gate.name, torch::CppFunction::makeFromBoxedFunction<&autograd>());
    library.impl(backward_name(gate.name).c_str(),
                 torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace perseid::ops
