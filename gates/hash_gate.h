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

/// One expert per token from an integer key (hash layers, Roller et al. 2021): no parameters, no gate
/// gradient, weight 1. GateInput::keys is required: features are never hashed. The hash is
/// kernels::hash_bucket, equal on every platform and rank count. A table is a buffer named "table".
class HashGate : public Gate {
 public:
  explicit HashGate(const HashGateOptions& options);
  GateOutput forward(const GateInput& input) override;
  const HashGateOptions& options() const { return options_; }

 private:
  HashGateOptions options_;
};

}  // namespace perseid::gates
