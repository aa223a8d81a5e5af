// Golden values of splitmix64 and of the hash, fill_uniform against its definition.
#include "kernels/random.h"

#include "kernels/hash.h"
#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

std::vector<int32_t> buckets_of(const std::vector<int64_t>& keys, uint64_t seed, int64_t buckets) {
  std::vector<int32_t> result(keys.size(), -7);
  hash_buckets(keys.data(), static_cast<int64_t>(keys.size()), seed, buckets, result.data());
  return result;
}

TEST(Hash, GoldenValues) {
  EXPECT_EQ(splitmix64(0), 0xE220A8397B1DCDAFull);
  const std::vector<int64_t> keys = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  using Row = std::vector<int32_t>;
  EXPECT_EQ(buckets_of(keys, 0, 8), (Row{7, 4, 4, 0, 3, 3, 5, 3, 4, 5, 0, 2}));
  EXPECT_EQ(buckets_of(keys, 0, 5), (Row{4, 2, 2, 0, 2, 1, 3, 1, 3, 3, 0, 1}));
  EXPECT_EQ(buckets_of(keys, 42, 8), (Row{0, 1, 6, 0, 0, 3, 0, 5, 0, 3, 5, 3}));
  EXPECT_EQ(buckets_of(keys, 42, 5), (Row{0, 1, 4, 0, 0, 2, 0, 3, 0, 2, 3, 1}));
  EXPECT_EQ(buckets_of({-1}, 0, 8), Row{7});
  EXPECT_EQ(buckets_of({-1}, 42, 8), Row{6});
}

TEST(Hash, EdgesAndThreads) {
  EXPECT_TRUE(buckets_of({}, 0, 8).empty());
  std::vector<int64_t> keys(100001);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<int64_t>(i * i) - 77;
  const std::vector<int32_t> expected = buckets_of(keys, 3, 100);
  for (size_t i = 0; i < keys.size(); ++i) ASSERT_EQ(expected[i], hash_bucket(keys[i], 3, 100));
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_EQ(buckets_of(keys, 3, 100), expected);
  }
  EXPECT_NE(config_error([] { buckets_of({1}, 0, 0); }).find("[hash_buckets] num_buckets=0"),
            std::string::npos);
}

TEST(Random, KeysAreOrdered) {
  const RandomKey key = random_key(5);
  EXPECT_NE(key.with(1).with(2).value, key.with(2).with(1).value);
  EXPECT_NE(random_bits(key, 0), random_bits(key, 1));
  for (uint64_t i = 0; i < 1000; ++i) {
    EXPECT_GE(random_uniform(key, i), 0.0);
    EXPECT_LT(random_uniform(key, i), 1.0);
    EXPECT_LT(random_below(key, i, 7), 7u);
  }
}

template <typename T>
std::vector<T> filled(int64_t count, double low, double high) {
  std::vector<T> values = nans<T>(count);
  fill_uniform(values.data(), count, DTypeOf<T>::value, low, high, random_key(9).with(4));
  return values;
}

TEST(Random, FillIsTheDefinition) {
  const RandomKey key = random_key(9).with(4);
  const auto doubles = filled<double>(50001, -2.0, 3.0);
  const auto floats = filled<float>(50001, -2.0, 3.0);
  for (size_t i = 0; i < doubles.size(); ++i) {
    ASSERT_EQ(doubles[i], -2.0 + 5.0 * random_uniform(key, i));
    ASSERT_EQ(floats[i], static_cast<float>(doubles[i]));
  }
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_TRUE(same_bits(filled<float>(50001, -2.0, 3.0), floats));
  }
}

/// The T next to x among its neighbours, ties to even bits: one rounding, by search.
template <typename T>
uint16_t nearest(double x) {
  const uint16_t start = make<T>(x).bits;
  uint16_t best = start;
  for (int step = -1; step <= 1; ++step) {
    const auto bits = static_cast<uint16_t>(start + step);
    const double distance = std::abs(to_float(T{bits}) - x);
    const double best_distance = std::abs(to_float(T{best}) - x);
    if (distance < best_distance || (distance == best_distance && bits % 2 == 0)) best = bits;
  }
  return best;
}

/// @param step  from 1 to the next T
template <typename T>
void expect_one_rounding(double step) {
  // low == high puts one chosen value into the output: just above a tie, lost if rounded to float.
  const double half = step / 2, little = 0x1p-40;
  for (const double x : {1 + half + little, 1 + 3 * half - little, -1 - half - little,
                         -1 - 3 * half + little, 1 + half, 0.1, -0.3, 0.0, 1e-6}) {
    EXPECT_EQ(filled<T>(1, x, x)[0].bits, nearest<T>(x)) << x;
  }
  const RandomKey key = random_key(9).with(4);
  const auto values = filled<T>(20001, -2.0, 3.0);
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(values[i].bits, nearest<T>(-2.0 + 5.0 * random_uniform(key, i)));
  }
}

TEST(Random, FillRoundsOnce) {
  expect_one_rounding<BFloat16>(0x1p-7);
  expect_one_rounding<Float16>(0x1p-10);
}

TEST(Random, WrongArguments) {
  const double inf = std::numeric_limits<double>::infinity();
  EXPECT_EQ(config_error([&] { filled<float>(1, 0.0, inf); }),
            "[fill_uniform] high=inf is not finite");
  EXPECT_EQ(config_error([] { fill_uniform(nullptr, -1, DType::kFloat32, 0, 1, {}); }),
            "[fill_uniform] count=-1 is negative; choose 0 or more");
}

TEST(Random, Normal) {
  const RandomKey key = random_key(3);
  const int64_t count = 100000;
  std::vector<double> values(count);
  fill_normal(values.data(), count, DType::kFloat64, key);
  double sum = 0, square = 0, fourth = 0;
  for (const double x : values) sum += x, square += x * x, fourth += x * x * x * x;
  EXPECT_NEAR(sum / double(count), 0, 5 / std::sqrt(double(count)));
  EXPECT_NEAR(square / double(count), 1, 5 * std::sqrt(2. / double(count)));
  EXPECT_NEAR(fourth / double(count), 3, 5 * std::sqrt(96. / double(count)));
  // Element i has its own numbers: a part of the stream can be drawn alone.
  for (const int64_t first : {500, 501}) {
    for (const int64_t size : {0, 1, 10, 11}) {
      std::vector<double> part(static_cast<size_t>(size));
      fill_normal(part.data(), size, DType::kFloat64, key, static_cast<uint64_t>(first));
      EXPECT_EQ(part, std::vector<double>(values.begin() + first, values.begin() + first + size));
    }
  }
  double neighbours = 0;
  for (int64_t i = 0; i + 1 < count; ++i) neighbours += values[i] * values[i + 1];
  EXPECT_NEAR(neighbours / double(count), 0, 5 / std::sqrt(double(count)));
  std::vector<double> uniform(20), uniform_part(5);
  fill_uniform(uniform.data(), 20, DType::kFloat64, 1, 2, key);
  fill_uniform(uniform_part.data(), 5, DType::kFloat64, 1, 2, skip(key, 7));
  EXPECT_EQ(uniform_part, std::vector<double>(uniform.begin() + 7, uniform.begin() + 12));
}

}  // namespace
}  // namespace perseid::kernels::testing
