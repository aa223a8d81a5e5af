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
  TORCH_ARG(at::Tensor, table) = {};   ///< [V] expert of each key, for kTable: hash_tables.h
  TORCH_ARG(int64_t, num_hashes) = 1;  ///< n, experts per token; in [1, E]
  TORCH_ARG(OutOfTable, oov) = OutOfTable::kHash;
  TORCH_ARG(uint64_t, seed) = 0;
};

/// n experts per token from an integer key (hash layers, Roller et al. 2021): no parameters, no
/// gate gradient, weights 1/n. GateInput::keys is required: features are never hashed. A token's
/// experts depend on its key alone, and are equal on every platform and rank count:
///   hash 0      the table's expert, or kernels::hash_bucket(key, seed, E)
///   hash h > 0  of the E - h experts that are still free, in order of their ids, number
///               kernels::hash_bucket(key, random_key(seed).with(h), E - h)
/// so the n experts are distinct, and the hashes independent. A table is copied into a buffer named
/// "table". Throws ConfigError for bad options or missing keys, DataError for a valid token whose
/// key is outside the table with OutOfTable::kError.
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
  at::Tensor first_experts(const GateInput& input, const at::Tensor& keys) const;
  at::Tensor with_more_experts(const at::Tensor& first, const at::Tensor& keys) const;

  HashGateOptions options_;
  at::Tensor table_;  // [V] int32 on kTable
};

}  // namespace perseid::gates
