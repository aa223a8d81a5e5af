#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

// Internal: the matrix product of gates.

namespace perseid::gates {

/// a b in blocks of rows (dim 0) or columns (dim 1) of the product, without a graph. Bits of a BLAS
/// product may depend on its number of threads. In an OpenMP region each call runs on one thread,
/// so blocks of fixed size do not.
at::Tensor multiply_in_blocks(const at::Tensor& a, const at::Tensor& b, int64_t dim);

}  // namespace perseid::gates
