#include "kernels/random.h"

#include <cmath>

#include "kernels/checks.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

void store_once(double* p, double x) { *p = x; }
void store_once(float* p, double x) { *p = static_cast<float>(x); }

/// Rounding to float first may land on a tie that the double was not. Round to odd instead: then
/// the second rounding sees whether anything was cut off.
void store_once(BFloat16* p, double x) {
  float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) != x) {
    uint32_t bits = std::bit_cast<uint32_t>(nearest);
    if (std::abs(static_cast<double>(nearest)) > std::abs(x)) --bits;  // now cut off towards 0
    nearest = std::bit_cast<float>(bits | 1u);
  }
  *p = to_bfloat16(nearest);
}

}  // namespace

void fill_uniform(void* out, int64_t count, DType dtype, double low, double high, RandomKey key) {
  constexpr const char* kOperation = "fill_uniform";
  require_count(kOperation, "count", count);
  require(std::isfinite(low), kOperation, "low", low, "is not finite");
  require(std::isfinite(high), kOperation, "high", high, "is not finite");
  require_buffer(kOperation, "out", out, count);
  dispatch_dtype(dtype, kOperation, [&](auto tag) {
    auto* const values = static_cast<decltype(tag)*>(out);
    parallel_for(0, count, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double u = random_uniform(key, static_cast<uint64_t>(i));
        store_once(values + i, low + (high - low) * u);
      }
    });
  });
}

void fill_normal(void* out, int64_t count, DType dtype, RandomKey key, uint64_t first) {
  constexpr const char* kOperation = "fill_normal";
  constexpr double kTwoPi = 6.28318530717958647692;
  require_count(kOperation, "count", count);
  require_buffer(kOperation, "out", out, count);
  dispatch_dtype(dtype, kOperation, [&](auto tag) {
    auto* const values = static_cast<decltype(tag)*>(out);
    parallel_for(0, count, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const uint64_t number = first + static_cast<uint64_t>(i);
        const uint64_t pair = number & ~uint64_t{1};
        // 1 - u is in (0, 1]: its logarithm is finite.
        const double radius = std::sqrt(-2.0 * std::log(1.0 - random_uniform(key, pair)));
        const double angle = kTwoPi * random_uniform(key, pair + 1);
        if (number == pair) store_once(values + i++, radius * std::cos(angle));
        if (i < end) store_once(values + i++, radius * std::sin(angle));
      }
    });
  });
}

}  // namespace perseid::kernels
