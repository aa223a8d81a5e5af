// permute and unpermute. Payload: byte b of row r is unique in a row and differs from row to row.
//   ClosedForm     out[i] is row row_of[i]; the cells were 0xEE before
//   IsTranspose    <permute(x), y> == <x, unpermute(y)> for a row_of without repeats, exactly
//   Untouched      unpermute leaves rows that no entry names
#include "kernels/permute.h"

#include <numeric>

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

using Bytes = std::vector<uint8_t>;

uint8_t payload(int64_t row, int64_t byte) {
  return static_cast<uint8_t>(row * 31 + row / 7 + byte * 3 + 1);
}
Bytes rows_of(int64_t num_rows, int64_t row_bytes) {
  Bytes rows;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t byte = 0; byte < row_bytes; ++byte) rows.push_back(payload(row, byte));
  }
  return rows;
}
std::vector<int32_t> shuffled(int64_t count, uint32_t seed) {
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

TEST(Permute, ClosedForm) {
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    for (const int64_t row_bytes : {1, 2, 3, 4, 8, 16, 17, 64, 1024, 5000}) {
      for (const int64_t num_out : {0, 1, 2, 131, 1003}) {
        const int64_t num_rows = 57;
        const Bytes rows = rows_of(num_rows, row_bytes);
        std::vector<int32_t> row_of;
        for (int64_t i = 0; i < num_out; ++i)
          row_of.push_back(static_cast<int32_t>(i * 23 % num_rows));
        Bytes out(static_cast<size_t>(num_out * row_bytes), 0xEE), reference = out;
        permute(rows.data(), row_of.data(), out.data(), num_out, row_bytes);
        permute_reference(rows.data(), row_of.data(), reference.data(), num_out, row_bytes);
        ASSERT_EQ(out, reference);
        for (int64_t i = 0; i < num_out; ++i) {
          for (int64_t byte = 0; byte < row_bytes; ++byte) {
            ASSERT_EQ(out[i * row_bytes + byte], payload(i * 23 % num_rows, byte));
          }
        }
      }
    }
  }
}

TEST(Permute, NullIsTheIdentity) {
  const Threads threads(3);
  const Bytes rows = rows_of(301, 777);
  Bytes out(rows.size(), 0xEE), back = out;
  permute(rows.data(), nullptr, out.data(), 301, 777);
  EXPECT_EQ(out, rows);
  unpermute(rows.data(), nullptr, back.data(), 301, 777);
  EXPECT_EQ(back, rows);
}

TEST(Unpermute, ClosedForm) {
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    for (const int64_t row_bytes : {1, 2, 3, 4, 8, 16, 17, 64, 1024, 5000}) {
      for (const int64_t num_rows : {0, 1, 2, 131, 1003}) {
        const Bytes rows = rows_of(num_rows, row_bytes);
        const auto row_of = shuffled(num_rows, 3);
        Bytes out(rows.size(), 0xEE), reference = out;
        unpermute(rows.data(), row_of.data(), out.data(), num_rows, row_bytes);
        unpermute_reference(rows.data(), row_of.data(), reference.data(), num_rows, row_bytes);
        ASSERT_EQ(out, reference);
        for (int64_t i = 0; i < num_rows; ++i) {
          for (int64_t byte = 0; byte < row_bytes; ++byte) {
            ASSERT_EQ(out[row_of[i] * row_bytes + byte], payload(i, byte));
          }
        }
      }
    }
  }
}

TEST(Unpermute, LeavesOtherRowsUntouched) {
  const Bytes rows = rows_of(2, 3);
  const std::vector<int32_t> row_of = {3, 1};
  Bytes out(5 * 3, 0xEE);
  unpermute(rows.data(), row_of.data(), out.data(), 2, 3);
  const Bytes expected = {0xEE,          0xEE,          0xEE, payload(1, 0), payload(1, 1),
                          payload(1, 2), 0xEE,          0xEE, 0xEE,          payload(0, 0),
                          payload(0, 1), payload(0, 2), 0xEE, 0xEE,          0xEE};
  EXPECT_EQ(out, expected);
}

TEST(Permute, IsTranspose) {
  const int64_t num_rows = 101, num_out = 67, width = 13;
  auto row_of = shuffled(num_rows, 5);
  row_of.resize(num_out);
  // Small integers: both sums are exact.
  std::vector<double> x(num_rows * width), y(num_out * width);
  std::mt19937 bits(1);
  for (double& value : x) value = static_cast<int>(bits() % 1001) - 500;
  for (double& value : y) value = static_cast<int>(bits() % 1001) - 500;
  std::vector<double> permuted = nans<double>(num_out * width), back(num_rows * width, 0.0);
  permute(x.data(), row_of.data(), permuted.data(), num_out, width * 8);
  unpermute(y.data(), row_of.data(), back.data(), num_out, width * 8);
  EXPECT_EQ(dot(permuted, y), dot(x, back));
}

TEST(Permute, WrongArguments) {
  EXPECT_EQ(config_error([] { permute(nullptr, nullptr, nullptr, -1, 4); }),
            "[permute] num_out=-1 is negative; choose 0 or more");
  EXPECT_EQ(config_error([] { unpermute(nullptr, nullptr, nullptr, 1, -4); }),
            "[unpermute] row_bytes=-4 is negative; choose 0 or more");
  EXPECT_NE(config_error([] { permute(nullptr, nullptr, nullptr, 2, 4); }).find("rows=null"),
            std::string::npos);
}

}  // namespace
}  // namespace perseid::kernels::testing
