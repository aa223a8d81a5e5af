// select_k: radix select on ordered integer keys, 11 bits a pass, highest first: 3 passes over
// float32, 6 over float64, fewer if a pass ends between two values; then one pass that marks. Reads
// the values in each pass, writes count bytes. Integer counts of fixed blocks: deterministic for
// any thread count. select_k_rows: short rows by nth_element on their keys, one thread a row; reads
// the values twice.
#include "kernels/select.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/ordered_key.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kValuesPerBlock = int64_t{1} << 16;
constexpr int kDigitBits = 11;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;
/// Rows of more values are dealt to threads in blocks.
constexpr int64_t kShortRow = int64_t{1} << 15;
/// Fewer values take less time than waking a thread.
constexpr int64_t kValuesPerThread = int64_t{1} << 12;

void check(const void* values, int64_t count, int64_t k, const uint8_t* is_kept) {
  constexpr const char* kOperation = "select_k";
  require_count(kOperation, "count", count);
  require_count(kOperation, "k", k);
  require_buffer(kOperation, "values", values, count);
  require_buffer(kOperation, "is_kept", is_kept, count);
}

/// The keys seen so far to be at the limit: those with key >> shift == prefix. Keys above are kept,
/// and `num_needed` of those at the limit.
template <typename Key>
struct Limit {
  Key prefix = 0;
  int shift = std::numeric_limits<Key>::digits;
  int64_t num_needed = 0;
  int64_t num_at_limit = 0;
};

/// key >> shift for shifts up to the full width, where a search starts.
template <typename Key>
PERSEID_INLINE Key high_bits(Key key, int shift) {
  return shift == std::numeric_limits<Key>::digits ? Key{0} : key >> shift;
}

template <typename T>
void count_digits(const T* values, int64_t begin, int64_t end, const Limit<UnsignedKey<T>>& limit,
                  int next_shift, int64_t* histogram) {
  const UnsignedKey<T> digit_mask = (UnsignedKey<T>{1} << (limit.shift - next_shift)) - 1;
  for (int64_t i = begin; i < end; ++i) {
    const UnsignedKey<T> key = unsigned_key(values[i]);
    if (high_bits(key, limit.shift) == limit.prefix) ++histogram[(key >> next_shift) & digit_mask];
  }
}

/// Marks keys above the limit; of those at it the first `num_at_limit` of this range.
template <typename T>
PERSEID_SIMD_CLONES void mark(const T* values, int64_t begin, int64_t end, UnsignedKey<T> prefix,
                              int shift, int64_t num_at_limit, uint8_t* is_kept) {
  const bool are_all_kept = num_at_limit >= end - begin;
  const UnsignedKey<T> lowest = prefix + (are_all_kept ? 0 : 1);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    is_kept[i] = static_cast<uint8_t>((unsigned_key(values[i]) >> shift) >= lowest);
  }
  if (are_all_kept) return;
  for (int64_t i = begin; i < end && num_at_limit > 0; ++i) {
    if ((unsigned_key(values[i]) >> shift) == prefix) {
      is_kept[i] = 1;
      --num_at_limit;
    }
  }
}

template <typename T>
void select_values(const T* values, int64_t count, int64_t k, uint8_t* is_kept) {
  using Key = UnsignedKey<T>;
  const int64_t num_blocks = ceil_div(count, kValuesPerBlock);
  const auto for_each_block = [&](const std::function<void(int64_t, int64_t, int64_t)>& body) {
    parallel_for(0, num_blocks, 1, [&](int64_t block_begin, int64_t block_end) {
      for (int64_t block = block_begin; block < block_end; ++block) {
        body(block, block * kValuesPerBlock, std::min((block + 1) * kValuesPerBlock, count));
      }
    });
  };

  Limit<Key> limit;
  limit.num_needed = k;
  limit.num_at_limit = count;
  // One histogram per block would outgrow the values, so the sum of a thread's blocks is added up.
  std::vector<int64_t> histogram(kDigits);
  std::mutex histogram_mutex;
  while (limit.shift > 0 && limit.num_needed < limit.num_at_limit) {
    const int next_shift = std::max(0, limit.shift - kDigitBits);
    std::fill(histogram.begin(), histogram.end(), 0);
    parallel_for(0, num_blocks, 1, [&](int64_t block_begin, int64_t block_end) {
      std::vector<int64_t> mine(kDigits, 0);
      count_digits(values, block_begin * kValuesPerBlock,
                   std::min(block_end * kValuesPerBlock, count), limit, next_shift, mine.data());
      const std::lock_guard<std::mutex> lock(histogram_mutex);
      for (int64_t digit = 0; digit < kDigits; ++digit) histogram[digit] += mine[digit];
    });
    int64_t digit = kDigits - 1;
    while (histogram[digit] < limit.num_needed) limit.num_needed -= histogram[digit--];
    limit.num_at_limit = histogram[digit];
    limit.prefix = (limit.prefix << (limit.shift - next_shift)) | static_cast<Key>(digit);
    limit.shift = next_shift;
  }

  // Values at the limit are taken by smaller index: each block learns how many are left for it.
  std::vector<int64_t> share(static_cast<size_t>(num_blocks), kValuesPerBlock);
  if (limit.num_needed < limit.num_at_limit) {
    for_each_block([&](int64_t block, int64_t begin, int64_t end) {
      share[block] = std::count_if(values + begin, values + end, [&](T value) {
        return (unsigned_key(value) >> limit.shift) == limit.prefix;
      });
    });
    int64_t num_left = limit.num_needed;
    for (int64_t& at_limit : share) {
      at_limit = std::min(at_limit, num_left);
      num_left -= at_limit;
    }
  }
  for_each_block([&](int64_t block, int64_t begin, int64_t end) {
    mark(values, begin, end, limit.prefix, limit.shift, share[block], is_kept);
  });
}

/// 1 <= k < count.
template <typename T>
void select_short_row(const T* values, int64_t count, int64_t k, uint8_t* is_kept,
                      std::vector<UnsignedKey<T>>& keys) {
  using Key = UnsignedKey<T>;
  keys.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) keys[static_cast<size_t>(i)] = unsigned_key(values[i]);
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<Key>());
  const Key limit = keys[static_cast<size_t>(k - 1)];
  // nth_element has put the larger ones, and some at the limit, before it.
  int64_t num_at_limit = 1 + std::count(keys.begin(), keys.begin() + (k - 1), limit);
  for (int64_t i = 0; i < count; ++i) {
    const Key key = unsigned_key(values[i]);
    const bool is_taken_at_limit = key == limit && num_at_limit > 0;
    num_at_limit -= is_taken_at_limit ? 1 : 0;
    is_kept[i] = static_cast<uint8_t>(key > limit || is_taken_at_limit);
  }
}

void check_rows(const void* values, int64_t num_rows, int64_t num_cols, int64_t k,
                const uint8_t* is_kept) {
  constexpr const char* kOperation = "select_k_rows";
  require_count(kOperation, "num_rows", num_rows);
  require_count(kOperation, "num_cols", num_cols);
  require_count(kOperation, "k", k);
  require_buffer(kOperation, "values", values, num_rows * num_cols);
  require_buffer(kOperation, "is_kept", is_kept, num_rows * num_cols);
}

}  // namespace

void select_k(const void* values, int64_t count, int64_t k, DType dtype, uint8_t* is_kept,
              Stream stream) {
  check(values, count, k, is_kept);
  if (stream.device == Device::kCuda) {
    return cuda::select_k(values, count, k, dtype, is_kept, stream);
  }
  dispatch_float_dtype(dtype, "select_k", [&](auto tag) {
    using T = decltype(tag);
    if (k == 0 || k >= count) {
      std::fill(is_kept, is_kept + count, static_cast<uint8_t>(k > 0));
    } else {
      select_values(static_cast<const T*>(values), count, k, is_kept);
    }
  });
}

void select_k_reference(const void* values, int64_t count, int64_t k, DType dtype,
                        uint8_t* is_kept) {
  check(values, count, k, is_kept);
  dispatch_float_dtype(dtype, "select_k", [&](auto tag) {
    using T = decltype(tag);
    const auto value_at = [&](int64_t i) {
      const T value = static_cast<const T*>(values)[i];
      return std::isnan(value) ? -std::numeric_limits<T>::infinity() : value;
    };
    std::vector<int64_t> by_value(static_cast<size_t>(count));
    std::iota(by_value.begin(), by_value.end(), 0);
    std::stable_sort(by_value.begin(), by_value.end(),
                     [&](int64_t a, int64_t b) { return value_at(a) > value_at(b); });
    std::fill(is_kept, is_kept + count, uint8_t{0});
    for (int64_t i = 0; i < std::min(k, count); ++i) is_kept[by_value[i]] = 1;
  });
}

void select_k_rows(const void* values, int64_t num_rows, int64_t num_cols, int64_t k, DType dtype,
                   uint8_t* is_kept, Stream stream) {
  check_rows(values, num_rows, num_cols, k, is_kept);
  require_device(stream, "select_k_rows", "give it CPU memory");
  dispatch_float_dtype(dtype, "select_k_rows", [&](auto tag) {
    using T = decltype(tag);
    const T* const first = static_cast<const T*>(values);
    if (k == 0 || k >= num_cols) {
      std::fill_n(is_kept, num_rows * num_cols, static_cast<uint8_t>(k > 0));
    } else if (num_cols > kShortRow) {
      for (int64_t r = 0; r < num_rows; ++r) {
        select_values(first + r * num_cols, num_cols, k, is_kept + r * num_cols);
      }
    } else {
      const int64_t grain = ceil_div(kValuesPerThread, num_cols);
      parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
        std::vector<UnsignedKey<T>> keys;
        for (int64_t r = begin; r < end; ++r) {
          select_short_row(first + r * num_cols, num_cols, k, is_kept + r * num_cols, keys);
        }
      });
    }
  });
}

void select_k_rows_reference(const void* values, int64_t num_rows, int64_t num_cols, int64_t k,
                             DType dtype, uint8_t* is_kept) {
  check_rows(values, num_rows, num_cols, k, is_kept);
  const int64_t row_bytes = num_cols * dtype_bytes(dtype);
  for (int64_t r = 0; r < num_rows; ++r) {
    select_k_reference(static_cast<const uint8_t*>(values) + r * row_bytes, num_cols, k, dtype,
                       is_kept + r * num_cols);
  }
}

}  // namespace perseid::kernels
