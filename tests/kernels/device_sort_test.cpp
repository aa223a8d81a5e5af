// counting_sort on a device against the twin, number for number; outputs held -9 before.
//   EqualsTwin     0, 1 and odd numbers of keys, around a tile and around one block's tiles; bucket
//                  counts on both sides of each digit width, of one pass and several; lost keys
//   HeavyTies      one hot bucket, all keys lost, all buckets empty but the last
//   CountsOnly     a null order
#include "kernels/sort.h"

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

class DeviceSort : public DeviceTest {
 protected:
  void compare(const std::vector<int32_t>& keys, int64_t num_buckets, bool has_order = true) {
    const auto num_keys = static_cast<int64_t>(keys.size());
    std::vector<int64_t> expected_offsets(static_cast<size_t>(num_buckets + 1), -9);
    std::vector<int32_t> expected_order(keys.size(), -9);
    DeviceArray<int32_t> on_device(keys, stream()), order(expected_order, stream());
    DeviceArray<int64_t> offsets(expected_offsets, stream());
    counting_sort(on_device.data(), num_keys, num_buckets, offsets.data(),
                  has_order ? order.data() : nullptr, stream());
    counting_sort(keys.data(), num_keys, num_buckets, expected_offsets.data(),
                  has_order ? expected_order.data() : nullptr);
    ASSERT_EQ(offsets.read(), expected_offsets) << num_keys << " keys, " << num_buckets;
    ASSERT_EQ(order.read(), expected_order) << num_keys << " keys, " << num_buckets;
  }
  /// Some below 0 and past the last bucket.
  static std::vector<int32_t> some_keys(int64_t num_keys, int64_t num_buckets) {
    std::mt19937 bits(static_cast<uint32_t>(num_keys + num_buckets));
    std::vector<int32_t> keys(static_cast<size_t>(num_keys));
    for (int32_t& key : keys) {
      key = static_cast<int32_t>(bits() % static_cast<uint64_t>(num_buckets + 3)) - 1;
    }
    return keys;
  }
};

TEST_F(DeviceSort, EqualsTwin) {
  for (const int64_t num_keys : {0, 1, 2048, 2049, 5001}) {
    for (const int64_t num_buckets : {0, 1, 63, 64, 256, 511, 1023}) {
      compare(some_keys(num_keys, num_buckets), num_buckets);
    }
  }
  // Two tiles a block for most, and a block that has one.
  compare(some_keys(int64_t{2048} * 512 + 5, 8), 8);
}

TEST_F(DeviceSort, SeveralPasses) {
  for (const int64_t num_keys : {1, 2500}) {
    for (const int64_t num_buckets : {1024, 262144, 262145}) {
      compare(some_keys(num_keys, num_buckets), num_buckets);
    }
  }
  // Keys of few buckets of many, so that each pass has ties.
  std::vector<int32_t> keys = some_keys(3000, 40);
  for (int32_t& key : keys) key = key * 131 - 77;
  compare(keys, 5000);
  compare(keys, 5000, false);
}

TEST_F(DeviceSort, HeavyTies) {
  for (const int32_t key : {-1, 0, 7, 8, 2000, 1 << 30}) {
    compare(std::vector<int32_t>(4100, key), 8);
    compare(std::vector<int32_t>(4100, key), 2000);
  }
}

TEST_F(DeviceSort, CountsOnly) {
  for (const int64_t num_buckets : {1, 64, 600, 1500}) {
    compare(some_keys(3001, num_buckets), num_buckets, false);
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
