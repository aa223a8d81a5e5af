// permute, unpermute: copies of whole rows by index. One warp a row, in the widest accesses that
// row width and pointers allow; narrow rows, such as weights, take one thread each. Reads num_rows
// * (row_bytes + 4) B, writes num_rows * row_bytes B. Deterministic. Bound by memory.
#include "kernels/cuda_launchers.h"
#include "kernels/vector.cuh"

namespace perseid::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
/// Rows of up to this many accesses are copied by one thread.
constexpr int64_t kNarrow = 2;

// ---- kernels -----------------------------------------------------------------------------------
/// Registers: 40. out[target(i)] = rows[source(i)] of one of the two: row_of names the source or,
/// for kIsInverse, the target.
template <typename Unit, bool kIsInverse>
__global__ void __launch_bounds__(kThreads)
    permute_wide_kernel(const Unit* __restrict__ rows, const int32_t* __restrict__ row_of,
                        Unit* __restrict__ out, int64_t num_rows, int64_t units) {
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (i >= num_rows) return;
  const int64_t other = row_of == nullptr ? i : row_of[i];
  const Unit* const source = rows + (kIsInverse ? i : other) * units;
  Unit* const target = out + (kIsInverse ? other : i) * units;
  for (int64_t u = threadIdx.x % kWarpSize; u < units; u += kWarpSize) target[u] = source[u];
}

/// Registers: 32.
template <typename Unit, bool kIsInverse>
__global__ void __launch_bounds__(kThreads)
    permute_narrow_kernel(const Unit* __restrict__ rows, const int32_t* __restrict__ row_of,
                          Unit* __restrict__ out, int64_t num_rows, int64_t units) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= num_rows) return;
  const int64_t other = row_of == nullptr ? i : row_of[i];
  const Unit* const source = rows + (kIsInverse ? i : other) * units;
  Unit* const target = out + (kIsInverse ? other : i) * units;
  for (int64_t u = 0; u < units; ++u) target[u] = source[u];
}

// ---- launch ------------------------------------------------------------------------------------
template <bool kIsInverse>
void move_rows(const char* operation, const void* rows, const int32_t* row_of, void* out,
               int64_t num_rows, int64_t row_bytes, const Stream& stream) {
  dispatch_unit(row_bytes, {rows, out}, [&](auto unit) {
    using Unit = decltype(unit);
    const int64_t units = row_bytes / int64_t{sizeof(Unit)};
    const auto* const source = static_cast<const Unit*>(rows);
    auto* const target = static_cast<Unit*>(out);
    if (units <= kNarrow) {
      launch(operation, &permute_narrow_kernel<Unit, kIsInverse>, ceil_div(num_rows, kThreads),
             kThreads, stream, source, row_of, target, num_rows, units);
    } else {
      launch(operation, &permute_wide_kernel<Unit, kIsInverse>, ceil_div(num_rows, kWarps),
             kThreads, stream, source, row_of, target, num_rows, units);
    }
  });
}

}  // namespace

void cuda::permute(const void* rows, const int32_t* row_of, void* out, int64_t num_out,
                   int64_t row_bytes, const Stream& stream) {
  move_rows<false>("permute", rows, row_of, out, num_out, row_bytes, stream);
}
void cuda::unpermute(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
                     int64_t row_bytes, const Stream& stream) {
  move_rows<true>("unpermute", rows, row_of, out, num_rows, row_bytes, stream);
}

}  // namespace perseid::kernels
