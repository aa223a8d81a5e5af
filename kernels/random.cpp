#include "kernels/random.h"

#include <cmath>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"
#include "kernels/random_element.h"

namespace perseid::kernels {

void fill_uniform(void* out, int64_t count, DType dtype, double low, double high, RandomKey key,
                  Stream stream) {
  constexpr const char* kOperation = "fill_uniform";
  require_count(kOperation, "count", count);
  require(std::isfinite(low), kOperation, "low", low, "is not finite");
  require(std::isfinite(high), kOperation, "high", high, "is not finite");
  require_buffer(kOperation, "out", out, count);
  const UniformRange range{low, high};
  if (stream.device == Device::kCuda) {
    return cuda::fill_uniform(out, count, dtype, range, key, stream);
  }
  dispatch_dtype(dtype, kOperation, [&](auto tag) {
    auto* const values = static_cast<decltype(tag)*>(out);
    parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        store_once(values + i, uniform_element(range, key, static_cast<uint64_t>(i)));
      }
    });
  });
}

void fill_normal(void* out, int64_t count, DType dtype, RandomKey key, uint64_t first,
                 Stream stream) {
  constexpr const char* kOperation = "fill_normal";
  require_count(kOperation, "count", count);
  require_buffer(kOperation, "out", out, count);
  if (stream.device == Device::kCuda) {
    return cuda::fill_normal(out, count, dtype, key, first, stream);
  }
  dispatch_dtype(dtype, kOperation, [&](auto tag) {
    auto* const values = static_cast<decltype(tag)*>(out);
    parallel_for(0, count, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const uint64_t number = first + static_cast<uint64_t>(i);
        const uint64_t pair = number & ~uint64_t{1};
        const NormalPoint point = normal_point(key, pair);
        const double angle = kTwoPi * point.turn;
        if (number == pair) store_once(values + i++, point.radius * std::cos(angle));
        if (i < end) store_once(values + i++, point.radius * std::sin(angle));
      }
    });
  });
}

}  // namespace perseid::kernels
