// kernels/plan.h on a GPU. Integers: one thread an element. sum_by_expert: one block sums 32 rows
// of one expert at 128 accesses of 16 bytes, where width and pointers allow, into scratch of
// (num_rows / 32 + num_experts) * width * 4 B (8 for fp64); then one thread a column and expert
// adds these sums up. Reads each row once; no atomics, and only additions in one order:
// deterministic, with the twin's bits. Bound by memory.
#include <algorithm>

#include "kernels/cuda_launchers.h"
#include "kernels/device_memory.h"
#include "kernels/plan_parts.h"
#include "kernels/vector.cuh"

namespace perseid::kernels {
namespace {

constexpr int kThreads = 128;
/// Rows that a thread has in flight.
constexpr int kRowsAtOnce = 4;

/// First chunk of an expert in the scratch: chunks of the experts do not overlap, as rows/32
/// rounded down grows by one less than the chunks at most.
PERSEID_INLINE int64_t first_chunk(const int64_t* offsets, int64_t expert) {
  return offsets[expert] / kChunkRows + expert;
}

// ---- integers ----------------------------------------------------------------------------------
/// Registers: 16.
__global__ void __launch_bounds__(kThreads)
    invert_kernel(const int32_t* __restrict__ order, int64_t num_rows,
                  int32_t* __restrict__ place_of) {
  const int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (r < num_rows) place_of[order[r]] = static_cast<int32_t>(r);
}

/// Registers: 32.
__global__ void __launch_bounds__(kThreads)
    row_of_kernel(const int32_t* order, int64_t num_places, const int32_t* __restrict__ row_offsets,
                  int64_t num_rows, int fixed, int32_t* row_of) {
  const int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (r >= num_places) return;
  row_of[r] = row_offsets == nullptr
                  ? order[r] / fixed
                  : static_cast<int32_t>(row_of_offset(row_offsets, num_rows, order[r]));
}

/// Registers: 16.
__global__ void __launch_bounds__(kThreads)
    ends_kernel(const int64_t* __restrict__ offsets, int64_t num_experts,
                int32_t* __restrict__ ends) {
  const int64_t l = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (l < num_experts) ends[l] = static_cast<int32_t>(offsets[l + 1]);
}

// ---- sums --------------------------------------------------------------------------------------
template <typename T, int kCount>
struct SumJob {
  const Pack<T, kCount>* rows;
  const int64_t* offsets;
  int64_t num_experts;
  int64_t units;
  int unit_blocks;      ///< blocks that share a chunk, each with kThreads accesses
  Accumulate<T>* sums;  ///< [chunks, width]
};

/// Registers: 48.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) sum_chunk_kernel(const SumJob<T, kCount> job) {
  using A = Accumulate<T>;
  constexpr int kStored = std::min(kCount, 16 / static_cast<int>(sizeof(A)));
  const int64_t chunk = blockIdx.x / static_cast<unsigned>(job.unit_blocks);
  const int64_t unit =
      int64_t{blockIdx.x % static_cast<unsigned>(job.unit_blocks)} * kThreads + threadIdx.x;
  if (unit >= job.units) return;
  int64_t expert = 0, last = job.num_experts - 1;  // the last whose first chunk is not behind
  while (expert < last) {
    const int64_t middle = (expert + last + 1) / 2;
    if (first_chunk(job.offsets, middle) <= chunk) {
      expert = middle;
    } else {
      last = middle - 1;
    }
  }
  const int64_t begin =
      job.offsets[expert] + (chunk - first_chunk(job.offsets, expert)) * kChunkRows;
  const int64_t end = std::min(begin + kChunkRows, job.offsets[expert + 1]);
  if (begin >= end || begin < job.offsets[expert]) return;
  A sum[kCount] = {};
  int64_t r = begin;
  for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) {
    Pack<T, kCount> row[kRowsAtOnce];
    for (int j = 0; j < kRowsAtOnce; ++j) row[j] = job.rows[(r + j) * job.units + unit];
    for (int j = 0; j < kRowsAtOnce; ++j) {
      for (int i = 0; i < kCount; ++i) sum[i] += load(&row[j].values[i]);
    }
  }
  for (; r < end; ++r) {
    const Pack<T, kCount> row = job.rows[r * job.units + unit];
    for (int i = 0; i < kCount; ++i) sum[i] += load(&row.values[i]);
  }
  auto* const target =
      reinterpret_cast<Pack<A, kStored>*>(job.sums + (chunk * job.units + unit) * kCount);
  for (int p = 0; p < kCount / kStored; ++p) {
    Pack<A, kStored> out;
    for (int i = 0; i < kStored; ++i) out.values[i] = sum[p * kStored + i];
    target[p] = out;
  }
}

/// Registers: 32.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_chunks_kernel(const Accumulate<T>* __restrict__ sums, const int64_t* __restrict__ offsets,
                      int64_t width, int column_blocks, T* __restrict__ out) {
  const int64_t expert = blockIdx.x / static_cast<unsigned>(column_blocks);
  const int64_t column =
      int64_t{blockIdx.x % static_cast<unsigned>(column_blocks)} * kThreads + threadIdx.x;
  if (column >= width) return;
  const int64_t first = first_chunk(offsets, expert);
  const int64_t num_chunks = ceil_div(offsets[expert + 1] - offsets[expert], kChunkRows);
  Accumulate<T> total = 0;
  for (int64_t c = 0; c < num_chunks; ++c) total += sums[(first + c) * width + column];
  store(out + expert * width + column, total);
}

}  // namespace

// ---- launch ------------------------------------------------------------------------------------
void cuda::invert_order(const int32_t* order, int64_t num_rows, int32_t* place_of,
                        const Stream& stream) {
  launch("invert_order", &invert_kernel, ceil_div(num_rows, kThreads), kThreads, stream, order,
         num_rows, place_of);
}

void cuda::row_of_sorted(const int32_t* order, int64_t num_places, const int32_t* row_offsets,
                         int64_t num_rows, int64_t fixed, int32_t* row_of, const Stream& stream) {
  launch("row_of_sorted", &row_of_kernel, ceil_div(num_places, kThreads), kThreads, stream, order,
         num_places, row_offsets, num_rows, fixed, row_of);
}

void cuda::expert_ends(const int64_t* offsets, int64_t num_experts, int32_t* ends,
                       const Stream& stream) {
  launch("expert_ends", &ends_kernel, ceil_div(num_experts, kThreads), kThreads, stream, offsets,
         num_experts, ends);
}

void cuda::sum_by_expert(const void* rows, int64_t num_rows, int64_t width, const int64_t* offsets,
                         int64_t num_experts, void* out, DType dtype, const Stream& stream) {
  constexpr const char* kOperation = "sum_by_expert";
  dispatch_dtype(dtype, kOperation, [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    const int64_t num_chunks = num_rows / kChunkRows + num_experts;
    const DeviceMemory sums(num_chunks * width * int64_t{sizeof(A)}, stream);
    dispatch_pack<T>(width, {rows}, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      const int64_t units = width / kCount, unit_blocks = ceil_div(units, kThreads);
      const SumJob<T, kCount> job{static_cast<const Pack<T, kCount>*>(rows),
                                  offsets,
                                  num_experts,
                                  units,
                                  static_cast<int>(unit_blocks),
                                  sums.as<A>()};
      launch(kOperation, &sum_chunk_kernel<T, kCount>, num_chunks * unit_blocks, kThreads, stream,
             job);
    });
    const int64_t column_blocks = ceil_div(width, kThreads);
    launch(kOperation, &add_chunks_kernel<T>, num_experts * column_blocks, kThreads, stream,
           sums.as<A>(), offsets, width, column_blocks, static_cast<T*>(out));
  });
}

}  // namespace perseid::kernels
