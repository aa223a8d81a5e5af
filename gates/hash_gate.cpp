#include "gates/hash_gate.h"

#include <ATen/ops/empty.h>

#include "gates/describe.h"
#include "gates/fixed_gate.h"
#include "gates/kernel_types.h"
#include "kernels/error.h"
#include "kernels/hash.h"

namespace perseid::gates {
namespace {

constexpr const char* kOperation = "hash_gate";

/// A copy of the caller's table as int32, so that it cannot change behind the gate.
at::Tensor checked_table(const HashGateOptions& options) {
  const at::Tensor& table = options.table();
  require(table.defined(), kOperation, "table", "undefined",
          "is needed with mode=table; give the expert of each key");
  require(table.dim() == 1 && table.numel() > 0 &&
              at::isIntegralType(table.scalar_type(), /*includeBool=*/false),
          kOperation, "table", describe(table), "is not an integer [V] tensor with V >= 1");
  require(!table.is_meta(), kOperation, "table.device", table.device(),
          "holds no data; move it to the CPU");
  const at::Tensor experts = table.cpu().to(at::kLong).contiguous();
  const int64_t* expert = experts.const_data_ptr<int64_t>();
  for (int64_t key = 0; key < experts.numel(); ++key) {
    if (expert[key] >= 0 && expert[key] < options.num_experts()) continue;
    const std::string argument = "table[" + to_text(key) + "]";
    require(false, kOperation, argument.c_str(), expert[key],
            "is outside [0, num_experts=" + to_text(options.num_experts()) + ")");
  }
  return experts.to(at::kInt);
}

}  // namespace

HashGate::HashGate(const HashGateOptions& options)
    : Gate(kOperation, options.num_experts(), 1), options_(options) {
  if (options.mode() == HashMode::kTable) {
    table_ = register_buffer("table", checked_table(options));
  } else {
    require(!options.table().defined(), kOperation, "table", describe(options.table()),
            "is given, but mode=random does not read it; choose mode=table");
  }
}

void HashGate::to(at::Device device, at::ScalarType /*dtype*/, bool non_blocking) {
  Gate::to(device, non_blocking);
}
void HashGate::to(at::ScalarType /*dtype*/, bool /*non_blocking*/) {}

GateOutput HashGate::forward(const GateInput& input) {
  validate(input, -1, kOperation);
  stream_of(input.tokens, kOperation);
  require(input.keys.has_value(), kOperation, "keys", "none",
          "are needed: features are never hashed; give an int64 key for each token");
  const at::Tensor keys = input.keys->cpu().contiguous();
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int64_t T = keys.size(0);
  const at::Tensor expert_idx = at::empty({T}, keys.options().dtype(at::kInt));
  int32_t* expert = expert_idx.mutable_data_ptr<int32_t>();
  kernels::hash_buckets(key, T, options_.seed(), num_experts(), expert);
  if (table_.defined()) {
    const at::Tensor table = table_.cpu().contiguous();
    const at::Tensor valid =
        input.valid.has_value() ? input.valid->cpu().contiguous() : at::Tensor();
    const int32_t* entry = table.const_data_ptr<int32_t>();
    const int64_t V = table.size(0);
    for (int64_t t = 0; t < T; ++t) {
      if (key[t] >= 0 && key[t] < V) {
        expert[t] = entry[key[t]];
      } else if (options_.oov() == OutOfTable::kError &&
                 (!valid.defined() || valid.const_data_ptr<bool>()[t])) {
        const std::string argument = "keys[" + to_text(t) + "]";
        throw DataError(
            {kOperation, argument, to_text(key[t]),
             "is outside the table [0, " + to_text(V) + "); choose oov=hash or extend it"});
      }
    }
  }
  return one_expert_per_token(input, expert_idx.to(input.tokens.device()), num_experts());
}

}  // namespace perseid::gates
