#include <ATen/ops/zeros.h>

#include "gates/hash_gate.h"
#include "moe/ops/gate_arguments.h"

namespace perseid::ops {
namespace {

using at::Tensor;

GateShape shape(const Arguments& arguments) {
  return {arguments.tensor("keys").sym_size(0), arguments.integer("num_experts"),
          arguments.integer("num_hashes"), at::kFloat};
}

gates::GateOutput run(const Arguments& arguments) {
  const Tensor keys = arguments.tensor("keys");
  require(keys.dim() == 1, "hash_gate", "keys", keys.sizes(), "is not [T]");
  auto options = gates::HashGateOptions(arguments.integer("num_experts"))
                     .num_hashes(arguments.integer("num_hashes"))
                     .seed(static_cast<uint64_t>(arguments.integer("seed")));
  if (arguments.has("table")) {
    options.mode(gates::HashMode::kTable).table(arguments.tensor("table"));
    options.oov(choice<gates::OutOfTable>(
        "hash_gate", "oov", arguments.text("oov"),
        {{"hash", gates::OutOfTable::kHash}, {"error", gates::OutOfTable::kError}}));
  }
  gates::GateInput input = gate_input(arguments, at::zeros({keys.size(0), 0}, at::kFloat));
  input.keys = keys;
  return gates::HashGate(options).forward(input);
}

}  // namespace

GateOp hash_op() {
  return {"hash_gate",
          "Tensor keys, Tensor? table=None, *, int num_experts, int num_hashes=1, "
          "str oov='hash', " PERSEID_COMMON_ARGUMENTS,
          {},
          {},
          &shape,
          &run};
}

}  // namespace perseid::ops
