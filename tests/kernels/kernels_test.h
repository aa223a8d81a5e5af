#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/error.h"
#include "kernels/parallel.h"
#include "tests/config_error.h"

namespace perseid::kernels::testing {

inline const std::vector<int> kThreadCounts = {1, 2, 3, 7};

/// Runs parallel_for on up to `count` threads while it lives.
class Threads {
 public:
  explicit Threads(int count) {
    set_parallel_for(
        [count](int64_t begin, int64_t end, int64_t grain,
                const std::function<void(int64_t, int64_t)>& body) {
          const int64_t ranges =
              std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, count);
          std::vector<std::thread> threads;
          for (int64_t i = 0; i < ranges; ++i) {
            const int64_t from = begin + (end - begin) * i / ranges;
            const int64_t to = begin + (end - begin) * (i + 1) / ranges;
            threads.emplace_back([&body, from, to] { body(from, to); });
          }
          for (std::thread& thread : threads) thread.join();
        },
        [count] { return count; });
  }
  ~Threads() { set_parallel_for(nullptr, nullptr); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
};

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBFloat16;
};

template <>
struct DTypeOf<Float16> {
  static constexpr DType value = DType::kFloat16;
};

/// Relative error of float32 arithmetic with one rounding to T: types of 16 bits may end one step
/// apart.
template <typename T>
constexpr double tolerance() {
  if (std::is_same_v<T, double>) return 1e-13;
  if (std::is_same_v<T, float>) return 2e-6;
  return std::is_same_v<T, BFloat16> ? 0x1p-7 : 0x1p-10;
}

template <typename T>
T make(double x) {
  T value;
  store(&value, static_cast<Accumulate<T>>(x));
  return value;
}

template <typename T>
std::vector<T> normal_values(int64_t count, uint32_t seed, double scale = 1.0) {
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = make<T>(normal(bits));
  return values;
}

/// Maps of experts [K, E], another permutation for each of K parts.
inline std::vector<int32_t> shuffled_map(int64_t num_parts, int64_t num_experts) {
  std::vector<int32_t> map;
  std::mt19937 bits(5);
  for (int64_t i = 0; i < num_parts; ++i) {
    std::vector<int32_t> experts(static_cast<size_t>(num_experts));
    for (size_t l = 0; l < experts.size(); ++l) experts[l] = static_cast<int32_t>(l);
    std::shuffle(experts.begin(), experts.end(), bits);
    map.insert(map.end(), experts.begin(), experts.end());
  }
  return map;
}

/// What an output holds before the call: a cell that is left out shows.
template <typename T>
std::vector<T> nans(int64_t count) {
  return std::vector<T>(static_cast<size_t>(count),
                        make<T>(std::numeric_limits<double>::quiet_NaN()));
}

template <typename T>
std::vector<double> to_doubles(const std::vector<T>& values) {
  std::vector<double> result;
  for (const T& value : values) result.push_back(load(&value));
  return result;
}

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// Equal up to `relative` of each value and a tenth of that of the largest; NaN equals NaN.
template <typename T>
void expect_close(const std::vector<T>& actual, const std::vector<T>& expected, double relative,
                  const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  double largest = 0;
  for (const double x : to_doubles(expected)) {
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    const double a = load(&actual[i]), e = load(&expected[i]);
    if ((std::isnan(a) && std::isnan(e)) || a == e) continue;
    ASSERT_LE(std::abs(a - e), relative * (std::abs(e) + 0.1 * largest))
        << what << " [" << i << "] is " << a << ", expected " << e;
  }
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

using perseid::testing::config_error;

}  // namespace perseid::kernels::testing
