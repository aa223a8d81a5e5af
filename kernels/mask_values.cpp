// 64 positions at a time, a bit becomes all bits of its value and there is no branch. Reads and
// writes the values once, but none of a word that is full.
#include "kernels/mask_values.h"

#include <algorithm>
#include <type_traits>

#include "kernels/checks.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kWordsPerThread = 512;
constexpr const char* kOnCuda = "use LibTorch's masked_fill there, or give it CPU memory";

void check(const char* operation, const uint64_t* is_active, int64_t count, const void* values) {
  require_count(operation, "count", count);
  require_buffer(operation, "is_active", is_active, count);
  require_buffer(operation, "values", values, count);
}

/// Unsigned integers of a value's size.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

template <typename B>
PERSEID_SIMD_CLONES void zero_words(const uint64_t* is_active, int64_t begin, int64_t end,
                                    int64_t count, B* values) {
  for (int64_t w = begin; w < end; ++w) {
    const uint64_t word = is_active[w];
    B* const mine = values + w * 64;
    if (word == ~uint64_t{0}) continue;
    const int64_t size = std::min<int64_t>(64, count - w * 64);
    if (size < 64) {
      for (int64_t i = 0; i < size; ++i) {
        if ((word >> i & 1) == 0) mine[i] = 0;
      }
    } else if constexpr (sizeof(B) == 8) {
#pragma omp simd
      for (int i = 0; i < 64; ++i) mine[i] &= uint64_t{0} - (word >> i & 1);
    } else {
      for (int half = 0; half < 2; ++half) {
        const auto bits = static_cast<uint32_t>(word >> (32 * half));
#pragma omp simd
        for (int i = 0; i < 32; ++i) {
          mine[32 * half + i] &= static_cast<B>(0u - (bits >> i & 1u));
        }
      }
    }
  }
}

PERSEID_SIMD_CLONES void expand_words(const uint64_t* is_active, int64_t begin, int64_t end,
                                      int64_t count, uint8_t* flags) {
  for (int64_t w = begin; w < end; ++w) {
    const int64_t size = std::min<int64_t>(64, count - w * 64);
    for (int64_t i = 0; i < size; ++i) {
      flags[w * 64 + i] = static_cast<uint8_t>(is_active[w] >> i & 1);
    }
  }
}

}  // namespace

void zero_inactive(const uint64_t* is_active, int64_t count, DType dtype, void* values,
                   Stream stream) {
  constexpr const char* kOperation = "zero_inactive";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, is_active, count, values);
  dispatch_dtype(dtype, kOperation, [&](auto tag) {
    using B = Bits<decltype(tag)>;
    parallel_for(0, ceil_div(count, 64), kWordsPerThread, [&](int64_t begin, int64_t end) {
      zero_words(is_active, begin, end, count, static_cast<B*>(values));
    });
  });
}

void expand_mask(const uint64_t* is_active, int64_t count, uint8_t* flags, Stream stream) {
  constexpr const char* kOperation = "expand_mask";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, is_active, count, flags);
  parallel_for(0, ceil_div(count, 64), kWordsPerThread, [&](int64_t begin, int64_t end) {
    expand_words(is_active, begin, end, count, flags);
  });
}

void zero_inactive_reference(const uint64_t* is_active, int64_t count, DType dtype, void* values) {
  check("zero_inactive", is_active, count, values);
  dispatch_dtype(dtype, "zero_inactive", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t p = 0; p < count; ++p) {
      if ((is_active[p / 64] >> (p % 64) & 1) == 0) store(static_cast<T*>(values) + p, 0);
    }
  });
}

void expand_mask_reference(const uint64_t* is_active, int64_t count, uint8_t* flags) {
  check("expand_mask", is_active, count, flags);
  for (int64_t p = 0; p < count; ++p) {
    flags[p] = static_cast<uint8_t>(is_active[p / 64] >> (p % 64) & 1);
  }
}

}  // namespace perseid::kernels
