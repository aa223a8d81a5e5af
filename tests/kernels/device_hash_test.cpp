// hash_buckets on a device against the twin.
#include "kernels/hash.h"

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

class DeviceHash : public DeviceTest {};

TEST_F(DeviceHash, EqualsTwin) {
  for (const int64_t count : {0, 1, 255, 600}) {
    std::vector<int64_t> keys;
    for (int64_t i = 0; i < count; ++i) keys.push_back((i - 3) * (int64_t{1} << (i % 60)));
    for (const int64_t num_buckets : {int64_t{1}, int64_t{8}, int64_t{2147483647}}) {
      std::vector<int32_t> expected(keys.size(), -9);
      DeviceArray<int64_t> on_device(keys, stream());
      DeviceArray<int32_t> buckets(expected, stream());
      hash_buckets(on_device.data(), count, 7, num_buckets, buckets.data(), stream());
      hash_buckets(keys.data(), count, 7, num_buckets, expected.data());
      EXPECT_EQ(buckets.read(), expected);
    }
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
