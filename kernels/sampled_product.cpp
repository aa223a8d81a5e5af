// A product of two rows of D for each element. A thread owns rows of the weight, whose elements are
// a range of the values. Reads the bits twice, and a row of x for each element.
#include "kernels/sampled_product.h"

#include <algorithm>
#include <vector>

#include "kernels/checks.h"
#include "kernels/dense_row.h"
#include "kernels/mask_bits.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kValuesPerThread = int64_t{1} << 15;
constexpr const char* kSampledProduct = "sampled_product";

void check(const void* delta, const void* x, const uint64_t* is_sampled, int64_t M, int64_t N,
           int64_t D) {
  require_count(kSampledProduct, "M", M);
  require_count(kSampledProduct, "N", N);
  require_count(kSampledProduct, "D", D);
  require_buffer(kSampledProduct, "is_sampled", is_sampled, M * N);
  require_buffer(kSampledProduct, "delta", delta, M * D);
  require_buffer(kSampledProduct, "x", x, N * D);
}

template <typename T>
PERSEID_INLINE Accumulate<T> dot_of(const T* a, const T* b, int64_t count) {
  if constexpr (kIsConverted<T>) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < count; ++d) sum += load(a + d) * load(b + d);
    return sum;
  } else {
    return dot(a, b, count);
  }
}

/// @param next  of the values, where row `begin` starts
template <typename T>
PERSEID_SIMD_CLONES void sample_rows(const T* delta, const T* x, const uint64_t* is_sampled,
                                     int64_t begin, int64_t end, int64_t N, int64_t D,
                                     Accumulate<T>* next) {
  for (int64_t m = begin; m < end; ++m) {
    for_each_set(is_sampled, m * N, (m + 1) * N,
                 [&](int64_t i) { *next++ += dot_of(delta + m * D, x + (i - m * N) * D, D); });
  }
}

}  // namespace

void sampled_product(const void* delta, const void* x, const uint64_t* is_sampled, int64_t M,
                     int64_t N, int64_t D, DType dtype, void* values, Stream stream) {
  require_device(stream, kSampledProduct, "use LibTorch there, or give it CPU memory");
  check(delta, x, is_sampled, M, N, D);
  std::vector<int64_t> first_of_row = {0};
  for (int64_t m = 0; m < M; ++m) {
    first_of_row.push_back(first_of_row.back() + count_set(is_sampled, m * N, (m + 1) * N));
  }
  const int64_t count = first_of_row.back();
  require_buffer(kSampledProduct, "values", values, count);
  const int64_t per_row = ceil_div(count, std::max<int64_t>(M, 1)) * std::max<int64_t>(D, 1);
  const int64_t grain = ceil_div(kValuesPerThread, std::max<int64_t>(per_row, 1));
  dispatch_dtype(dtype, kSampledProduct, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
      sample_rows(static_cast<const T*>(delta), static_cast<const T*>(x), is_sampled, begin, end, N,
                  D,
                  static_cast<Accumulate<T>*>(values) + first_of_row[static_cast<size_t>(begin)]);
    });
  });
}

void sampled_product_reference(const void* delta, const void* x, const uint64_t* is_sampled,
                               int64_t M, int64_t N, int64_t D, DType dtype, void* values) {
  check(delta, x, is_sampled, M, N, D);
  dispatch_dtype(dtype, kSampledProduct, [&](auto tag) {
    using T = decltype(tag);
    auto* next = static_cast<Accumulate<T>*>(values);
    for (int64_t i = 0; i < M * N; ++i) {
      if ((is_sampled[i / 64] >> (i % 64) & 1) == 0) continue;
      double sum = 0;
      for (int64_t d = 0; d < D; ++d) {
        sum += double{load(static_cast<const T*>(delta) + i / N * D + d)} *
               double{load(static_cast<const T*>(x) + i % N * D + d)};
      }
      *next = static_cast<Accumulate<T>>(*next + sum);
      ++next;
    }
  });
}

}  // namespace perseid::kernels
