#include "gates/hash_gate.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "gates/describe.h"
#include "gates/fixed_gate.h"
#include "gates/kernel_types.h"
#include "kernels/error.h"
#include "kernels/hash.h"
#include "kernels/random.h"

namespace perseid::gates {
namespace {

constexpr const char* kHashGate = "hash_gate";

/// A copy of the caller's table as int32, so that it cannot change behind the gate.
at::Tensor checked_table(const HashGateOptions& options) {
  const at::Tensor& table = options.table();
  require(table.defined(), kHashGate, "table", "undefined",
          "is needed with mode=table; give the expert of each key");
  require(table.dim() == 1 && table.numel() > 0 &&
              at::isIntegralType(table.scalar_type(), /*includeBool=*/false),
          kHashGate, "table", describe(table), "is not an integer [V] tensor with V >= 1");
  require(!table.is_meta(), kHashGate, "table.device", table.device(),
          "holds no data; move it to the CPU");
  const at::Tensor experts = table.cpu().to(at::kLong).contiguous();
  const int64_t* expert = experts.const_data_ptr<int64_t>();
  for (int64_t key = 0; key < experts.numel(); ++key) {
    if (expert[key] >= 0 && expert[key] < options.num_experts()) continue;
    const std::string argument = "table[" + to_text(key) + "]";
    require(false, kHashGate, argument.c_str(), expert[key],
            "is outside [0, num_experts=" + to_text(options.num_experts()) + ")");
  }
  return experts.to(at::kInt);
}

int64_t checked_num_hashes(const HashGateOptions& options) {
  const int64_t n = options.num_hashes(), E = options.num_experts();
  require(E < 1 || (n >= 1 && n <= E), kHashGate, "num_hashes", n,
          "is outside [1, num_experts=" + to_text(E) + "]: the experts of a token are distinct");
  return n;
}

}  // namespace

HashGate::HashGate(const HashGateOptions& options)
    : Gate(kHashGate, options.num_experts(), checked_num_hashes(options)), options_(options) {
  if (options.mode() == HashMode::kTable) {
    table_ = register_buffer("table", checked_table(options));
  } else {
    require(!options.table().defined(), kHashGate, "table", describe(options.table()),
            "is given, but mode=random does not read it; choose mode=table");
  }
}

void HashGate::to(at::Device device, at::ScalarType /*dtype*/, bool non_blocking) {
  Gate::to(device, non_blocking);
}
void HashGate::to(at::ScalarType /*dtype*/, bool /*non_blocking*/) {}

/// Hash 0 of each key. [T]
at::Tensor HashGate::first_experts(const GateInput& input, const at::Tensor& keys) const {
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int64_t T = keys.size(0);
  const at::Tensor expert_idx = at::empty({T}, keys.options().dtype(at::kInt));
  auto* const expert = expert_idx.mutable_data_ptr<int32_t>();
  kernels::hash_buckets(key, T, options_.seed(), num_experts(), expert);
  if (!table_.defined()) return expert_idx;
  const at::Tensor table = table_.cpu().contiguous();
  const at::Tensor valid = input.valid.has_value() ? input.valid->cpu().contiguous() : at::Tensor();
  const int32_t* entry = table.const_data_ptr<int32_t>();
  const int64_t V = table.size(0);
  for (int64_t t = 0; t < T; ++t) {
    if (key[t] >= 0 && key[t] < V) {
      expert[t] = entry[key[t]];
    } else if (options_.oov() == OutOfTable::kError &&
               (!valid.defined() || valid.const_data_ptr<bool>()[t])) {
      const std::string argument = "keys[" + to_text(t) + "]";
      throw DataError(
          {kHashGate, argument, to_text(key[t]),
           "is outside the table [0, " + to_text(V) + "); choose oov=hash or extend it"});
    }
  }
  return expert_idx;
}

/// Puts hashes 1 .. n-1 beside hash 0; rows ascend. [T, n]
at::Tensor HashGate::with_more_experts(const at::Tensor& first, const at::Tensor& keys) const {
  const int64_t T = keys.size(0), n = options_.num_hashes(), E = num_experts();
  const at::Tensor result = at::empty({T, n}, first.options());
  const int64_t* key = keys.const_data_ptr<int64_t>();
  const int32_t* hash0 = first.const_data_ptr<int32_t>();
  auto* const rows = result.mutable_data_ptr<int32_t>();
  for (int64_t t = 0; t < T; ++t) {
    int32_t* const row = rows + t * n;
    row[0] = hash0[t];
    for (int64_t h = 1; h < n; ++h) {
      const uint64_t seed =
          kernels::random_key(options_.seed()).with(static_cast<uint64_t>(h)).value;
      int32_t expert = kernels::hash_bucket(key[t], seed, E - h);
      int32_t* place = row;  // the row ascends: each taken expert up to here moves the number on
      for (; place != row + h && *place <= expert; ++place) ++expert;
      std::copy_backward(place, row + h, row + h + 1);
      *place = expert;
    }
  }
  return result;
}

GateOutput HashGate::forward(const GateInput& input) {
  validate(input, -1, kHashGate);
  stream_of(input.tokens, kHashGate);
  require(input.keys.has_value(), kHashGate, "keys", "none",
          "are needed: features are never hashed; give an int64 key for each token");
  const at::Tensor keys = input.keys->cpu().contiguous();
  const at::Tensor experts = with_more_experts(first_experts(input, keys), keys);
  return equal_experts_per_token(input, experts.to(input.tokens.device()), num_experts());
}

}  // namespace perseid::gates
