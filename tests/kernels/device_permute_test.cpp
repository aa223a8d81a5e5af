// permute and unpermute on a device against the twins, byte for byte; outputs held 0xEE before.
//   Sizes      row widths of all access widths and none of them, 0 and odd numbers of rows
//   Unaligned  rows that begin at odd addresses
#include "kernels/permute.h"

#include <numeric>

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

using Bytes = std::vector<uint8_t>;

class DevicePermute : public DeviceTest {
 protected:
  void compare(int64_t num_rows, int64_t num_out, int64_t row_bytes, int64_t shift) {
    Bytes rows(static_cast<size_t>(shift + num_rows * row_bytes));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint8_t>(i * 31 + i / 251);
    std::vector<int32_t> row_of, order(static_cast<size_t>(num_rows));
    for (int64_t i = 0; i < num_out; ++i) {
      row_of.push_back(static_cast<int32_t>(i * 23 % std::max<int64_t>(num_rows, 1)));
    }
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(3));
    DeviceArray<uint8_t> on_device(rows, stream());
    DeviceArray<int32_t> index(row_of, stream()), shuffled(order, stream());

    Bytes expected(static_cast<size_t>(shift + num_out * row_bytes), 0xEE);
    DeviceArray<uint8_t> out(expected, stream());
    permute(on_device.data() + shift, index.data(), out.data() + shift, num_out, row_bytes,
            stream());
    permute_reference(rows.data() + shift, row_of.data(), expected.data() + shift, num_out,
                      row_bytes);
    ASSERT_EQ(out.read(), expected) << num_rows << " " << num_out << " " << row_bytes;

    Bytes expected_back(rows.size(), 0xEE);
    DeviceArray<uint8_t> back(expected_back, stream());
    unpermute(on_device.data() + shift, shuffled.data(), back.data() + shift, num_rows, row_bytes,
              stream());
    unpermute_reference(rows.data() + shift, order.data(), expected_back.data() + shift, num_rows,
                        row_bytes);
    ASSERT_EQ(back.read(), expected_back) << num_rows << " " << row_bytes;
  }
};

TEST_F(DevicePermute, Sizes) {
  for (const int64_t row_bytes : {1, 2, 3, 4, 8, 12, 16, 17, 32, 48, 64, 1024, 1040, 5000}) {
    for (const int64_t num_out : {0, 1, 2, 131, 300}) compare(57, num_out, row_bytes, 0);
  }
}

TEST_F(DevicePermute, Unaligned) {
  for (const int64_t shift : {1, 2, 4, 8}) {
    for (const int64_t row_bytes : {3, 16, 64, 1024}) compare(57, 61, row_bytes, shift);
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
