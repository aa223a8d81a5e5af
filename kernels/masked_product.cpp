// A row of a stays in the first-level cache while it meets the rows of b that its bits name.
#include "kernels/masked_product.h"

#include <algorithm>

#include "kernels/checks.h"
#include "kernels/mask_bits.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kValuesPerThread = int64_t{1} << 15;

void check(const void* a, const void* b, const uint64_t* is_wanted, int64_t M, int64_t N, int64_t D,
           const void* out) {
  constexpr const char* kOperation = "masked_product";
  require_count(kOperation, "M", M);
  require_count(kOperation, "N", N);
  require_count(kOperation, "D", D);
  require_buffer(kOperation, "a", a, M * D);
  require_buffer(kOperation, "b", b, N * D);
  require_buffer(kOperation, "is_wanted", is_wanted, M * N);
  require_buffer(kOperation, "out", out, M * N);
}

template <typename T>
PERSEID_INLINE T dot(const T* a, const T* b, int64_t D) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

template <typename T>
PERSEID_SIMD_CLONES void product_rows(const T* a, const T* b, const uint64_t* is_wanted,
                                      int64_t begin, int64_t end, int64_t N, int64_t D, T* out) {
  std::fill(out + begin * N, out + end * N, T{0});
  for (int64_t m = begin; m < end; ++m) {
    for_each_set(is_wanted, m * N, (m + 1) * N,
                 [&](int64_t i) { out[i] = dot(a + m * D, b + (i - m * N) * D, D); });
  }
}

}  // namespace

void masked_product(const void* a, const void* b, const uint64_t* is_wanted, int64_t M, int64_t N,
                    int64_t D, DType dtype, void* out, Stream stream) {
  require_device(stream, "masked_product",
                 "use LibTorch's dense products there, or give it CPU memory");
  check(a, b, is_wanted, M, N, D, out);
  dispatch_float_dtype(dtype, "masked_product", [&](auto tag) {
    using T = decltype(tag);
    const int64_t grain = ceil_div(kValuesPerThread, std::max<int64_t>(N, 1));
    parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
      product_rows(static_cast<const T*>(a), static_cast<const T*>(b), is_wanted, begin, end, N, D,
                   static_cast<T*>(out));
    });
  });
}

void masked_product_reference(const void* a, const void* b, const uint64_t* is_wanted, int64_t M,
                              int64_t N, int64_t D, DType dtype, void* out) {
  check(a, b, is_wanted, M, N, D, out);
  dispatch_float_dtype(dtype, "masked_product", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = 0; i < M * N; ++i) {
      double sum = 0;
      for (int64_t d = 0; d < D; ++d) {
        sum += double{static_cast<const T*>(a)[i / N * D + d]} *
               double{static_cast<const T*>(b)[i % N * D + d]};
      }
      static_cast<T*>(out)[i] = (is_wanted[i / 64] >> (i % 64) & 1) != 0 ? static_cast<T>(sum) : 0;
    }
  });
}

}  // namespace perseid::kernels
