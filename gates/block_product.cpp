#include "gates/block_product.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace perseid::gates {
namespace {

constexpr int64_t kRowsPerBlock = 256;
constexpr int64_t kColumnsPerBlock = 64;

}  // namespace

at::Tensor multiply_in_blocks(const at::Tensor& a, const at::Tensor& b, int64_t dim) {
  at::Tensor product = at::empty({a.size(0), b.size(1)}, a.options());
  const int64_t size = product.size(dim);
  const int64_t block = dim == 0 ? kRowsPerBlock : kColumnsPerBlock;
  const int64_t num_blocks = (size + block - 1) / block;
  // At least two tasks, one of them perhaps idle: a single one would not open a region.
  at::parallel_for(0, std::max<int64_t>(num_blocks, 2), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_graph;
    for (int64_t i = begin; i < std::min(end, num_blocks); ++i) {
      const int64_t start = i * block;
      const int64_t length = std::min(block, size - start);
      at::Tensor part = product.narrow(dim, start, length);
      at::mm_out(part, dim == 0 ? a.narrow(0, start, length) : a,
                 dim == 0 ? b : b.narrow(1, start, length));
    }
  });
  return product;
}

}  // namespace perseid::gates
