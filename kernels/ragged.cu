// ragged_offsets, ragged_rows, ragged_to_dense: one warp a token, which reads its E weights. The
// lengths become offsets by sums over tiles of 1024 tokens, one block that adds up the tiles, and a
// pass that writes. Pairs of a row are gathered in shared memory and each counts those before it: n
// * n / 32 comparisons a lane; rows of more than 256 pairs count in the table. Each reads T * E
// weights once, or from a cache; integers and copies only: deterministic, equal to the twin.
#include "kernels/cuda_launchers.h"
#include "kernels/device_memory.h"
#include "kernels/launch.cuh"
#include "kernels/prim.cuh"
#include "kernels/ragged_parts.h"

namespace perseid::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
/// Longer rows are not gathered.
constexpr int kGatheredMax = 256;
constexpr int kScanThreads = 256;
constexpr int kLengthsPerThread = 4;
constexpr int64_t kTileTokens = kScanThreads * kLengthsPerThread;

PERSEID_INLINE int lane_of_thread(unsigned thread) { return static_cast<int>(thread) % kWarpSize; }
PERSEID_INLINE unsigned lanes_below(int lane) { return (1u << lane) - 1; }

// ---- offsets -----------------------------------------------------------------------------------
/// Registers: 32.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const RaggedShape shape, const T* __restrict__ weights,
                 int32_t* __restrict__ lengths) {
  const int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (t >= shape.num_tokens) return;  // a whole warp
  const int lane = lane_of_thread(threadIdx.x);
  const T* const row = weights + t * shape.num_experts;
  int length = 0;
  for (int64_t e = lane; e < shape.num_experts; e += kWarpSize) length += is_kept(row[e]) ? 1 : 0;
  length = __reduce_add_sync(kFullWarp, length);
  if (lane == 0) lengths[t] = length;
}

/// Sum of a thread's lengths, which it keeps.
PERSEID_INLINE int64_t read_lengths(const int32_t* lengths, int64_t first, int64_t num_tokens,
                                    int (&mine)[kLengthsPerThread]) {
  int64_t sum = 0;
  for (int i = 0; i < kLengthsPerThread; ++i) {
    mine[i] = first + i < num_tokens ? lengths[first + i] : 0;
    sum += mine[i];
  }
  return sum;
}

/// Registers: 32. Shared: 80.
__global__ void __launch_bounds__(kScanThreads)
    sum_tiles_kernel(const int32_t* __restrict__ lengths, int64_t num_tokens,
                     int64_t* __restrict__ tile_sums) {
  using Reduce = prim::BlockReduce<int64_t, kScanThreads>;
  __shared__ typename Reduce::TempStorage storage;
  int mine[kLengthsPerThread];
  const int64_t first = blockIdx.x * kTileTokens + threadIdx.x * kLengthsPerThread;
  const int64_t sum = Reduce(storage).Sum(read_lengths(lengths, first, num_tokens, mine));
  if (threadIdx.x == 0) tile_sums[blockIdx.x] = sum;
}

/// Registers: 32. Shared: 2336. One block: each sum becomes that of the tiles before; `total` that
/// of all.
__global__ void __launch_bounds__(kScanThreads)
    scan_tiles_kernel(int64_t* __restrict__ tile_sums, int64_t num_tiles,
                      int64_t* __restrict__ total) {
  using Scan = prim::BlockScan<int64_t, kScanThreads>;
  __shared__ typename Scan::TempStorage storage;
  int64_t before = 0;
  for (int64_t begin = 0; begin < num_tiles; begin += kScanThreads) {
    const int64_t tile = begin + threadIdx.x;
    int64_t prefix = 0, sum = 0;
    Scan(storage).ExclusiveSum(tile < num_tiles ? tile_sums[tile] : 0, prefix, sum);
    if (tile < num_tiles) tile_sums[tile] = before + prefix;
    before += sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) *total = before;
}

/// Registers: 40. Shared: 2336. Lengths at token_offsets + 1 become offsets where they are.
__global__ void __launch_bounds__(kScanThreads)
    write_offsets_kernel(const int64_t* __restrict__ tile_sums, int64_t num_tokens,
                         int32_t* token_offsets) {
  using Scan = prim::BlockScan<int64_t, kScanThreads>;
  __shared__ typename Scan::TempStorage storage;
  int mine[kLengthsPerThread];
  const int64_t first = blockIdx.x * kTileTokens + threadIdx.x * kLengthsPerThread;
  int64_t before = 0;
  Scan(storage).ExclusiveSum(read_lengths(token_offsets + 1, first, num_tokens, mine), before);
  before += tile_sums[blockIdx.x];
  for (int i = 0; i < kLengthsPerThread; ++i) {
    before += mine[i];
    if (first + i < num_tokens) token_offsets[first + i + 1] = static_cast<int32_t>(before);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) token_offsets[0] = 0;
}

// ---- rows --------------------------------------------------------------------------------------
template <typename T>
PERSEID_INLINE void write_pair(const RaggedOutput& output, int64_t a, int64_t expert,
                               int64_t position, T weight) {
  if (output.expert_idx != nullptr) output.expert_idx[a] = static_cast<int32_t>(expert);
  if (output.values != nullptr) static_cast<T*>(output.values)[a] = weight;
  if (output.positions != nullptr) output.positions[a] = position;
}

/// A long row: each pair counts those before it in the table.
template <typename T>
PERSEID_INLINE void write_long_row(const T* row, int num_experts, int64_t t, int lane,
                                   int64_t first, const RaggedOutput& output) {
  for (int64_t e = lane; e < num_experts; e += kWarpSize) {
    if (!is_kept(row[e])) continue;
    const SignedKey<T> key = kept_key(row[e]);
    int place = 0;
    for (int j = 0; j < num_experts; ++j) {
      const SignedKey<T> other = kept_key(row[j]);
      place += is_kept(row[j]) && (other > key || (other == key && j < e)) ? 1 : 0;
    }
    write_pair(output, first + place, e, t * num_experts + e, row[e]);
  }
}

/// Registers: 32. Shared: 12288. That is for float64.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const RaggedShape shape, const T* __restrict__ weights,
                const int32_t* __restrict__ token_offsets, const RaggedOutput output) {
  __shared__ SignedKey<T> gathered_keys[kWarps][kGatheredMax];
  __shared__ int gathered_experts[kWarps][kGatheredMax];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_of_thread(threadIdx.x);
  const int64_t t = int64_t{blockIdx.x} * kWarps + warp;
  if (t >= shape.num_tokens) return;
  const T* const row = weights + t * shape.num_experts;
  const int64_t first = token_offsets[t];
  const int length = static_cast<int>(token_offsets[t + 1] - first);
  if (length > kGatheredMax) {
    write_long_row(row, static_cast<int>(shape.num_experts), t, lane, first, output);
    return;
  }
  SignedKey<T>* const keys = gathered_keys[warp];
  int* const experts = gathered_experts[warp];
  int count = 0;
  for (int64_t begin = 0; begin < shape.num_experts && count < length; begin += kWarpSize) {
    const int64_t e = begin + lane;
    const bool keeps = e < shape.num_experts && is_kept(row[e]);
    const unsigned kept = __ballot_sync(kFullWarp, keeps);
    if (keeps) {
      const int place = count + __popc(kept & lanes_below(lane));
      keys[place] = kept_key(row[e]);
      experts[place] = static_cast<int>(e);
    }
    count += __popc(kept);
  }
  __syncwarp();
  for (int i = lane; i < length; i += kWarpSize) {
    const SignedKey<T> key = keys[i];
    int place = 0;
    for (int j = 0; j < length; ++j) place += keys[j] > key || (keys[j] == key && j < i) ? 1 : 0;
    const int64_t position = t * shape.num_experts + experts[i];
    write_pair(output, first + place, experts[i], position, weights[position]);
  }
}

/// Registers: 32.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    to_dense_kernel(const RaggedShape shape, const int32_t* __restrict__ token_offsets,
                    const int32_t* __restrict__ expert_idx, const T* __restrict__ values,
                    T* table) {
  const int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (t >= shape.num_tokens) return;
  const int lane = lane_of_thread(threadIdx.x);
  T* const row = table + t * shape.num_experts;
  for (int64_t e = lane; e < shape.num_experts; e += kWarpSize) row[e] = 0;
  __syncwarp();  // the zeros are there before another lane's value
  for (int64_t a = token_offsets[t] + lane; a < token_offsets[t + 1]; a += kWarpSize) {
    row[expert_idx[a]] = values[a];
  }
}

}  // namespace

// ---- launch ------------------------------------------------------------------------------------
int64_t cuda::ragged_offsets(const RaggedShape& shape, DType dtype, const void* weights,
                             int32_t* token_offsets, const Stream& stream) {
  constexpr const char* kOperation = "ragged_offsets";
  if (shape.num_tokens == 0) {
    fill_zero(token_offsets, sizeof(int32_t), stream);
    return 0;
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    launch(kOperation, &count_kernel<T>, ceil_div(shape.num_tokens, kWarps), kThreads, stream,
           shape, static_cast<const T*>(weights), token_offsets + 1);
  });
  const int64_t num_tiles = ceil_div(shape.num_tokens, kTileTokens);
  const DeviceMemory sums((num_tiles + 1) * int64_t{sizeof(int64_t)}, stream);
  auto* const tile_sums = sums.as<int64_t>();
  launch(kOperation, &sum_tiles_kernel, num_tiles, kScanThreads, stream, token_offsets + 1,
         shape.num_tokens, tile_sums);
  launch(kOperation, &scan_tiles_kernel, 1, kScanThreads, stream, tile_sums, num_tiles,
         tile_sums + num_tiles);
  launch(kOperation, &write_offsets_kernel, num_tiles, kScanThreads, stream, tile_sums,
         shape.num_tokens, token_offsets);
  int64_t num_assignments = 0;
  copy_bytes(&num_assignments, tile_sums + num_tiles, sizeof(num_assignments), stream);
  synchronize(stream);  // the host wait that the header announces
  require_assignments(num_assignments);
  return num_assignments;
}

void cuda::ragged_rows(const RaggedShape& shape, DType dtype, const void* weights,
                       const int32_t* token_offsets, const RaggedOutput& output,
                       const Stream& stream) {
  constexpr const char* kOperation = "ragged_rows";
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    launch(kOperation, &rows_kernel<T>, ceil_div(shape.num_tokens, kWarps), kThreads, stream, shape,
           static_cast<const T*>(weights), token_offsets, output);
  });
}

void cuda::ragged_to_dense(const RaggedShape& shape, DType dtype, const int32_t* token_offsets,
                           const int32_t* expert_idx, const void* values, void* table,
                           const Stream& stream) {
  constexpr const char* kOperation = "ragged_to_dense";
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    launch(kOperation, &to_dense_kernel<T>, ceil_div(shape.num_tokens, kWarps), kThreads, stream,
           shape, token_offsets, expert_idx, static_cast<const T*>(values), static_cast<T*>(table));
  });
}

}  // namespace perseid::kernels
