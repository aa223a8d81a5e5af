#pragma once
#include <ATen/ops/from_blob.h>

#include <cstdint>
#include <vector>

#include "examples/train_fashion/domains.h"
#include "examples/train_fashion/train.h"

namespace perseid::examples {

/// Tensors over images, which they borrow.
struct ImageTensors {
  ImageTensors(const DomainImages& images, GateKind gate)
      : pixels(view(images.pixels, at::kByte).view({images.size(), kImagePixels})),
        labels(view(images.labels, at::kLong)),
        domains(view(images.domains, at::kLong)),
        keys(gate == GateKind::kOracle ? domains : view(images.keys, at::kLong)) {}

  at::Tensor pixels;   ///< [n, 784] uint8
  at::Tensor labels;   ///< [n] int64
  at::Tensor domains;  ///< [n] int64
  at::Tensor keys;     ///< [n] int64 what gates without features route by

 private:
  template <typename T>
  static at::Tensor view(const std::vector<T>& values, at::ScalarType dtype) {
    // from_blob wants a mutable pointer; nothing here writes through it.
    return at::from_blob(const_cast<T*>(values.data()), {static_cast<int64_t>(values.size())},
                         dtype);
  }
};

}  // namespace perseid::examples
