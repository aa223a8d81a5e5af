// permute, unpermute: copies of whole rows by index. Read and write num_rows * row_bytes bytes, no
// arithmetic. Bound by memory; rows of one element, such as weights, are moved without memcpy
// calls.
#include "kernels/permute.h"

#include <algorithm>
#include <cstring>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

/// Smaller pieces cost more in waking a thread than the copy itself.
constexpr int64_t kBytesPerThread = int64_t{1} << 16;
/// Rows ahead that are asked for: their order is irregular, so the hardware cannot foresee them.
constexpr int64_t kRowsAhead = 4;

/// row_bytes known at compile time: memcpy becomes one or two moves.
template <int64_t kRowBytes, typename Source, typename Target>
void copy_small(const char* rows, char* out, int64_t begin, int64_t end, Source source,
                Target target) {
  for (int64_t i = begin; i < end; ++i) {
    std::memcpy(out + target(i) * kRowBytes, rows + source(i) * kRowBytes, kRowBytes);
  }
}

template <typename Source, typename Target>
void copy_rows(const char* rows, char* out, int64_t num_rows, int64_t row_bytes, Source source,
               Target target) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / row_bytes);
  parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    switch (row_bytes) {
      case 2:
        return copy_small<2>(rows, out, begin, end, source, target);
      case 4:
        return copy_small<4>(rows, out, begin, end, source, target);
      case 8:
        return copy_small<8>(rows, out, begin, end, source, target);
      case 16:
        return copy_small<16>(rows, out, begin, end, source, target);
      default:
        break;
    }
    for (int64_t i = begin; i < end; ++i) {
      if (i + kRowsAhead < end) {
        const char* const ahead = rows + source(i + kRowsAhead) * row_bytes;
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + std::min<int64_t>(64, row_bytes - 1));
      }
      std::memcpy(out + target(i) * row_bytes, rows + source(i) * row_bytes,
                  static_cast<size_t>(row_bytes));
    }
  });
}

void copy_all(const char* rows, char* out, int64_t bytes) {
  parallel_for(0, bytes, kBytesPerThread, [&](int64_t begin, int64_t end) {
    std::memcpy(out + begin, rows + begin, static_cast<size_t>(end - begin));
  });
}

void check(const char* operation, const char* count_name, const void* rows, const void* out,
           int64_t num_rows, int64_t row_bytes) {
  require_count(operation, count_name, num_rows);
  require_count(operation, "row_bytes", row_bytes);
  require_buffer(operation, "rows", rows, num_rows * row_bytes);
  require_buffer(operation, "out", out, num_rows * row_bytes);
}

int64_t row_at(const int32_t* row_of, int64_t i) { return row_of == nullptr ? i : row_of[i]; }

}  // namespace

void permute(const void* rows, const int32_t* row_of, void* out, int64_t num_out, int64_t row_bytes,
             Stream stream) {
  check("permute", "num_out", rows, out, num_out, row_bytes);
  if (num_out == 0 || row_bytes == 0) return;
  if (stream.device == Device::kCuda) {
    return cuda::permute(rows, row_of, out, num_out, row_bytes, stream);
  }
  const auto* const source = static_cast<const char*>(rows);
  auto* const target = static_cast<char*>(out);
  if (row_of == nullptr) return copy_all(source, target, num_out * row_bytes);
  copy_rows(
      source, target, num_out, row_bytes, [row_of](int64_t i) { return int64_t{row_of[i]}; },
      [](int64_t i) { return i; });
}

void permute_reference(const void* rows, const int32_t* row_of, void* out, int64_t num_out,
                       int64_t row_bytes) {
  check("permute", "num_out", rows, out, num_out, row_bytes);
  for (int64_t i = 0; i < num_out; ++i) {
    for (int64_t byte = 0; byte < row_bytes; ++byte) {
      static_cast<char*>(out)[i * row_bytes + byte] =
          static_cast<const char*>(rows)[row_at(row_of, i) * row_bytes + byte];
    }
  }
}

void unpermute(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
               int64_t row_bytes, Stream stream) {
  check("unpermute", "num_rows", rows, out, num_rows, row_bytes);
  if (num_rows == 0 || row_bytes == 0) return;
  if (stream.device == Device::kCuda) {
    return cuda::unpermute(rows, row_of, out, num_rows, row_bytes, stream);
  }
  const auto* const source = static_cast<const char*>(rows);
  auto* const target = static_cast<char*>(out);
  if (row_of == nullptr) return copy_all(source, target, num_rows * row_bytes);
  copy_rows(
      source, target, num_rows, row_bytes, [](int64_t i) { return i; },
      [row_of](int64_t i) { return int64_t{row_of[i]}; });
}

void unpermute_reference(const void* rows, const int32_t* row_of, void* out, int64_t num_rows,
                         int64_t row_bytes) {
  check("unpermute", "num_rows", rows, out, num_rows, row_bytes);
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t byte = 0; byte < row_bytes; ++byte) {
      static_cast<char*>(out)[row_at(row_of, i) * row_bytes + byte] =
          static_cast<const char*>(rows)[i * row_bytes + byte];
    }
  }
}

}  // namespace perseid::kernels
