// counting_sort: a worked example, the reference over sizes and key ranges, threads.
#include "kernels/sort.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

struct Sorted {
  std::vector<int64_t> offsets;
  std::vector<int32_t> order;
  bool operator==(const Sorted&) const = default;
};

Sorted sorted(const std::vector<int32_t>& keys, int64_t num_buckets, bool is_reference = false) {
  Sorted result{std::vector<int64_t>(static_cast<size_t>(num_buckets + 1), -9),
                std::vector<int32_t>(keys.size(), -9)};
  const auto count = static_cast<int64_t>(keys.size());
  (is_reference ? counting_sort_reference(keys.data(), count, num_buckets, result.offsets.data(),
                                          result.order.data())
                : counting_sort(keys.data(), count, num_buckets, result.offsets.data(),
                                result.order.data()));
  return result;
}

TEST(CountingSort, Example) {
  const Sorted result = sorted({2, -1, 0, 2, 3, 0, 7, 2}, 4);
  EXPECT_EQ(result.offsets, (std::vector<int64_t>{0, 2, 2, 5, 6}));
  EXPECT_EQ(result.order, (std::vector<int32_t>{2, 5, 0, 3, 7, 4, -9, -9}));
}

TEST(CountingSort, EqualsReference) {
  std::mt19937 bits(3);
  for (const int64_t num_keys : {0, 1, 2, 100, 16384, 16385, 40000, 100003}) {
    for (const int64_t num_buckets : {0, 1, 5, 64, 100}) {
      std::vector<int32_t> keys(static_cast<size_t>(num_keys));
      // Ids below 0 and past the end among them.
      for (int32_t& key : keys) key = static_cast<int32_t>(bits() % (num_buckets + 3)) - 1;
      const Sorted expected = sorted(keys, num_buckets, true);
      for (const int count : kThreadCounts) {
        const Threads threads(count);
        ASSERT_EQ(sorted(keys, num_buckets), expected) << num_keys << " " << num_buckets;
      }
    }
  }
}

TEST(CountingSort, ManyBucketsAndOneHot) {
  const Threads threads(3);
  std::vector<int32_t> keys(70001);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<int32_t>(i * 7919 % 50021);
  const Sorted many = sorted(keys, 50021);
  int32_t before = -1;
  for (int64_t row = 0; row < 70001; ++row) {
    const int32_t i = many.order[row];
    ASSERT_TRUE(keys[i] > before || (keys[i] == before && row > 0 && i > many.order[row - 1]));
    ASSERT_TRUE(many.offsets[keys[i]] <= row && row < many.offsets[keys[i] + 1]);
    before = keys[i];
  }
  std::fill(keys.begin(), keys.end(), 2);
  const Sorted hot = sorted(keys, 4);
  EXPECT_EQ(hot.offsets, (std::vector<int64_t>{0, 0, 0, 70001, 70001}));
  for (int32_t row = 0; row < 70001; ++row) ASSERT_EQ(hot.order[row], row);
}

TEST(CountingSort, CountsOnly) {
  const std::vector<int32_t> keys = {1, 1, 0};
  std::vector<int64_t> offsets(3, -9);
  counting_sort(keys.data(), 3, 2, offsets.data(), nullptr);
  EXPECT_EQ(offsets, (std::vector<int64_t>{0, 1, 3}));
}

TEST(CountingSort, WrongArguments) {
  int64_t offset = 0;
  EXPECT_EQ(config_error([&] { counting_sort(nullptr, -1, 0, &offset, nullptr); }),
            "[counting_sort] num_keys=-1 is negative; choose 0 or more");
  EXPECT_EQ(config_error([&] { counting_sort(nullptr, int64_t{1} << 31, 0, &offset, nullptr); }),
            "[counting_sort] num_keys=2147483648 exceeds 2147483647");
}

}  // namespace
}  // namespace perseid::kernels::testing
