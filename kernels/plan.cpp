// kernels/plan.h on the CPU: integers are moved as they are; sum_by_expert reads the rows once, by
// tiles of columns whose sums stay in the first-level cache. An expert's tile is summed by one
// thread in the order that the header fixes, so the result does not depend on the threads.
#include "kernels/plan.h"

#include <algorithm>
#include <limits>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"
#include "kernels/plan_parts.h"

namespace perseid::kernels {
namespace {

/// Fewer elements take less time than waking a thread.
constexpr int64_t kElementsPerThread = int64_t{1} << 14;
/// Columns summed at a time.
constexpr int64_t kTile = 512;
constexpr int64_t kCountMax = std::numeric_limits<int32_t>::max();

void require_int32(const char* operation, const char* argument, int64_t value) {
  require_count(operation, argument, value);
  require(value <= kCountMax, operation, argument, value, "exceeds " + to_text(kCountMax));
}

template <typename T>
PERSEID_SIMD_CLONES void sum_tile(const T* rows, int64_t num_rows, int64_t width, int64_t columns,
                                  T* out) {
  using A = Accumulate<T>;
  alignas(64) A total[kTile], chunk[kTile];
  for (int64_t i = 0; i < columns; ++i) total[i] = 0;
  for (int64_t begin = 0; begin < num_rows; begin += kChunkRows) {
    for (int64_t i = 0; i < columns; ++i) chunk[i] = 0;
    for (int64_t r = begin; r < std::min(begin + kChunkRows, num_rows); ++r) {
      const T* const row = rows + r * width;
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) chunk[i] += load(row + i);
    }
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) total[i] += chunk[i];
  }
  for (int64_t i = 0; i < columns; ++i) store(out + i, total[i]);
}

}  // namespace

void invert_order(const int32_t* order, int64_t num_rows, int32_t* place_of, Stream stream) {
  constexpr const char* kOperation = "invert_order";
  require_int32(kOperation, "num_rows", num_rows);
  require_buffer(kOperation, "order", order, num_rows);
  require_buffer(kOperation, "place_of", place_of, num_rows);
  if (stream.device == Device::kCuda) return cuda::invert_order(order, num_rows, place_of, stream);
  parallel_for(0, num_rows, kElementsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) place_of[order[r]] = static_cast<int32_t>(r);
  });
}

void row_of_sorted(const int32_t* order, int64_t num_places, const int32_t* row_offsets,
                   int64_t num_rows, int64_t fixed, int32_t* row_of, Stream stream) {
  constexpr const char* kOperation = "row_of_sorted";
  require_int32(kOperation, "num_places", num_places);
  require_int32(kOperation, "num_rows", num_rows);
  require_buffer(kOperation, "order", order, num_places);
  require_buffer(kOperation, "row_of", row_of, num_places);
  if (row_offsets == nullptr && num_places > 0) {
    require(fixed >= 1 && fixed <= kCountMax, kOperation, "fixed", fixed,
            "is outside [1, 2147483647], and row_offsets=null; pass one of them");
  }
  if (num_places == 0) return;
  if (stream.device == Device::kCuda) {
    return cuda::row_of_sorted(order, num_places, row_offsets, num_rows, fixed, row_of, stream);
  }
  parallel_for(0, num_places, kElementsPerThread / 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      row_of[r] = static_cast<int32_t>(row_offsets == nullptr
                                           ? order[r] / fixed
                                           : row_of_offset(row_offsets, num_rows, order[r]));
    }
  });
}

void expert_ends(const int64_t* offsets, int64_t num_experts, int32_t* ends, Stream stream) {
  constexpr const char* kOperation = "expert_ends";
  require_int32(kOperation, "num_experts", num_experts);
  require_buffer(kOperation, "offsets", offsets, num_experts);
  require_buffer(kOperation, "ends", ends, num_experts);
  if (stream.device == Device::kCuda) return cuda::expert_ends(offsets, num_experts, ends, stream);
  for (int64_t l = 0; l < num_experts; ++l) ends[l] = static_cast<int32_t>(offsets[l + 1]);
}

void sum_by_expert(const void* rows, int64_t num_rows, int64_t width, const int64_t* offsets,
                   int64_t num_experts, void* out, DType dtype, Stream stream) {
  constexpr const char* kOperation = "sum_by_expert";
  require_int32(kOperation, "num_rows", num_rows);
  require_int32(kOperation, "width", width);
  require_int32(kOperation, "num_experts", num_experts);
  require_buffer(kOperation, "rows", rows, num_rows * width);
  require_buffer(kOperation, "offsets", offsets, num_experts);
  require_buffer(kOperation, "out", out, num_experts * width);
  if (num_experts == 0 || width == 0) return;
  if (stream.device == Device::kCuda) {
    return cuda::sum_by_expert(rows, num_rows, width, offsets, num_experts, out, dtype, stream);
  }
  const int64_t num_tiles = ceil_div(width, kTile);
  const int64_t tile_elements = ceil_div(num_rows, num_experts) * std::min(kTile, width);
  dispatch_dtype(dtype, kOperation, [&](auto element) {
    using T = decltype(element);
    parallel_for(0, num_experts * num_tiles,
                 ceil_div(kElementsPerThread, std::max<int64_t>(tile_elements, 1)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t expert = i / num_tiles, column = i % num_tiles * kTile;
                     sum_tile(static_cast<const T*>(rows) + offsets[expert] * width + column,
                              offsets[expert + 1] - offsets[expert], width,
                              std::min(kTile, width - column),
                              static_cast<T*>(out) + expert * width + column);
                   }
                 });
  });
}

void sum_by_expert_reference(const void* rows, int64_t width, const int64_t* offsets,
                             int64_t num_experts, void* out, DType dtype) {
  dispatch_dtype(dtype, "sum_by_expert", [&](auto element) {
    using T = decltype(element);
    for (int64_t l = 0; l < num_experts; ++l) {
      for (int64_t i = 0; i < width; ++i) {
        double sum = 0;
        for (int64_t r = offsets[l]; r < offsets[l + 1]; ++r) {
          sum += load(static_cast<const T*>(rows) + r * width + i);
        }
        store(static_cast<T*>(out) + l * width + i, static_cast<Accumulate<T>>(sum));
      }
    }
  });
}

}  // namespace perseid::kernels
