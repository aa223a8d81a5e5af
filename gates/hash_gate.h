#pragma once
#include <torch/arg.h>

#include "gates/gate.h"

namespace perseid::gates {

enum class HashMode : uint8_t { kRandom, kTable };
/// What a table does with keys outside [0, V).
enum class OutOfTable : uint8_t { kHash, kError };

struct HashGateOptions {
  explicit HashGateOptions(int64_t num_experts) : num_experts_(num_experts) {}
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(HashMode, mode) = HashMode::kRandom;
  TORCH_ARG(at::Tensor, table) = {};  ///< [V] expert of each key, for kTable
  TORCH_ARG(OutOfTable, oov) = OutOfTable::kHash;
  TORCH_ARG(uint64_t, seed) = 0;
};

/// One expert per token from an integer key (hash layers, Roller et al. 2021): no parameters, no
/// gate gradient, weight 1. GateInput::keys is required: features are never hashed. The hash is
/// kernels::hash_bucket, equal on every platform and rank count. A table is copied into a buffer
/// named "table". Throws ConfigError for bad options or missing keys, DataError for a valid token
/// whose key is outside the table with OutOfTable::kError.
class HashGate : public Gate {
 public:
  explicit HashGate(const HashGateOptions& options);
  GateOutput forward(const GateInput& input) override;
  const HashGateOptions& options() const { return options_; }

  using Gate::to;
  /// The table holds ids: it moves between devices, its type stays int32.
  void to(at::Device device, at::ScalarType dtype, bool non_blocking = false) override;
  void to(at::ScalarType dtype, bool non_blocking = false) override;

 private:
  HashGateOptions options_;
  at::Tensor table_;  // [V] int32 on kTable
};

}  // namespace perseid::gates
