#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "comm/group.h"
#include "examples/train_fashion/train.h"
#include "gates/comet_gate.h"

namespace perseid::examples {

/// Counts over batches of images.
class TreeCounter {
 public:
  /// @param gate  borrowed; not static, so that its switches have weights
  TreeCounter(const gates::CometGate& gate, int64_t num_domains);
  /// @param tokens   [n, D] what the gate reads
  /// @param domains  [n] int64 in [0, num_domains)
  void add(const at::Tensor& tokens, const at::Tensor& domains);
  /// Collective: counts of all ranks.
  TreeCounts total(const comm::Group& world) const;

 private:
  template <typename T>
  void add_rows(const at::Tensor& logits, const int64_t* domains);

  const gates::CometGate& gate_;
  int64_t num_domains_;
  TreeCounts counts_;
};

}  // namespace perseid::examples
