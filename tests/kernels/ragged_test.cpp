// Ragged rows from a dense table.
//   ByHand        zeros, -0, negative, ties, NaN, subnormal, inf: exact offsets, ids, positions
//   Reference     both types, E = 1 .. 300 on both sides of the sort's switch, many ties and zeros
//   Threads       1, 2, 3, 7 threads: the same bits
//   ToDenseIsBack the table again, bit for bit, where it holds no other values than kept ones and 0
//   Empty         T = 0; rows without a pair
//   TooMany       lengths that sum to 2^31 - 1 pass, one more is an error with the sum
//   Errors        text of every check
#include "kernels/ragged.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
struct Rows {
  std::vector<int32_t> offsets, expert_idx;
  std::vector<T> values;
  std::vector<int64_t> positions;

  bool has_same_bits(const Rows& other) const {
    return offsets == other.offsets && expert_idx == other.expert_idx &&
           same_bits(values, other.values) && positions == other.positions;
  }
};

template <typename T>
Rows<T> rows_of(const std::vector<T>& table, RaggedShape shape, bool is_reference = false) {
  constexpr DType kType = DTypeOf<T>::value;
  Rows<T> rows;
  rows.offsets.assign(static_cast<size_t>(shape.num_tokens + 1), -9);
  const int64_t A = is_reference
                        ? ragged_offsets_reference(shape, kType, table.data(), rows.offsets.data())
                        : ragged_offsets(shape, kType, table.data(), rows.offsets.data());
  EXPECT_EQ(A, rows.offsets.back());
  rows.expert_idx.assign(static_cast<size_t>(A), -9);
  rows.positions.assign(static_cast<size_t>(A), -9);
  rows.values = nans<T>(A);
  const RaggedOutput output{rows.expert_idx.data(), rows.values.data(), rows.positions.data()};
  if (is_reference) {
    ragged_rows_reference(shape, kType, table.data(), rows.offsets.data(), output);
  } else {
    ragged_rows(shape, kType, table.data(), rows.offsets.data(), output);
  }
  return rows;
}

/// Zeros, few distinct values and some NaN.
template <typename T>
std::vector<T> table_of(int64_t count, uint32_t seed) {
  std::vector<T> table = normal_values<T>(count, seed);
  for (size_t i = 0; i < table.size(); ++i) {
    if (i % 3 == 0) table[i] = static_cast<T>(static_cast<int>(i / 3 % 5)) / T{4};
    if (i % 17 == 5) table[i] = -T{0};
    if (i % 29 == 7) table[i] = std::numeric_limits<T>::quiet_NaN();
  }
  return table;
}

TEST(Ragged, ByHand) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> table = {0,  .5f,  0,    .25f,  .75f,   .75f, 1, 0,    // ties
                                    0,  0,    0,    -0.0f, nan,    0,    2, nan,  //
                                    -1, -inf, -nan, inf,   1e-40f, 0,    0, 0};
  const Rows<float> rows = rows_of(table, {6, 4});
  EXPECT_EQ(rows.offsets, (std::vector<int32_t>{0, 2, 5, 5, 8, 10, 11}));
  EXPECT_EQ(rows.expert_idx, (std::vector<int32_t>{1, 3, 2, 0, 1, 2, 0, 3, 3, 2, 0}));
  EXPECT_EQ(rows.positions, (std::vector<int64_t>{1, 3, 6, 4, 5, 14, 12, 15, 19, 18, 20}));
  for (size_t a = 0; a < rows.values.size(); ++a) {
    const float expected = table[static_cast<size_t>(rows.positions[a])];
    EXPECT_EQ(std::memcmp(&rows.values[a], &expected, sizeof expected), 0) << a;
  }
}

template <typename T>
void expect_reference() {
  for (const int64_t E : {1, 2, 3, 7, 16, 33, 127, 128, 129, 300}) {
    for (const int64_t T_ : {1, 2, 37}) {
      const auto table = table_of<T>(T_ * E, static_cast<uint32_t>(E));
      EXPECT_TRUE(rows_of(table, {T_, E}).has_same_bits(rows_of(table, {T_, E}, true)))
          << E << " " << T_;
    }
    const std::vector<T> full(static_cast<size_t>(3 * E), T{1});
    EXPECT_TRUE(rows_of(full, {3, E}).has_same_bits(rows_of(full, {3, E}, true))) << E;
  }
}

TEST(Ragged, Reference) {
  expect_reference<float>();
  expect_reference<double>();
}

TEST(Ragged, Threads) {
  const int64_t T = 4001, E = 16;
  const auto table = table_of<float>(T * E, 1);
  const auto expected = rows_of(table, {T, E});
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_TRUE(rows_of(table, {T, E}).has_same_bits(expected)) << count;
  }
}

TEST(Ragged, ToDenseIsBack) {
  const int64_t T = 37, E = 5;
  auto table = table_of<double>(T * E, 2);
  for (double& weight : table) weight = weight > 0 || std::isnan(weight) ? weight : 0;
  const auto rows = rows_of(table, {T, E});
  auto dense = nans<double>(T * E);
  ragged_to_dense({T, E}, DType::kFloat64, rows.offsets.data(), rows.expert_idx.data(),
                  rows.values.data(), dense.data());
  EXPECT_TRUE(same_bits(dense, table));
}

TEST(Ragged, Empty) {
  EXPECT_EQ(rows_of<float>({}, {0, 4}).offsets, (std::vector<int32_t>{0}));
  const auto rows = rows_of<double>({0, -1, 0, 0}, {2, 2});
  EXPECT_EQ(rows.offsets, (std::vector<int32_t>{0, 0, 0}));
  std::vector<double> dense = nans<double>(4);
  ragged_to_dense({2, 2}, DType::kFloat64, rows.offsets.data(), nullptr, nullptr, dense.data());
  EXPECT_EQ(dense, (std::vector<double>{0, 0, 0, 0}));
}

TEST(Ragged, TooMany) {
  std::vector<int32_t> offsets = {-9, 1 << 30, (1 << 30) - 1};
  EXPECT_EQ(lengths_to_offsets(offsets.data(), 2), 2147483647);
  EXPECT_EQ(offsets, (std::vector<int32_t>{0, 1 << 30, 2147483647}));
  offsets = {-9, 1 << 30, 1 << 30};
  EXPECT_EQ(config_error([&] { lengths_to_offsets(offsets.data(), 2); }),
            "[routing] num_assignments=2147483648 exceeds 2147483647; split the batch");
}

TEST(Ragged, Errors) {
  const std::vector<float> table(4, 1.0f);
  std::vector<int32_t> offsets(3, 0);
  const auto offsets_error = [&](RaggedShape shape, DType dtype, const void* weights,
                                 int32_t* token_offsets) {
    return config_error([&] { ragged_offsets(shape, dtype, weights, token_offsets); });
  };
  EXPECT_EQ(offsets_error({-1, 2}, DType::kFloat32, table.data(), offsets.data()),
            "[ragged_offsets] num_tokens=-1 is negative; choose 0 or more");
  EXPECT_EQ(offsets_error({2, 0}, DType::kFloat32, table.data(), offsets.data()),
            "[ragged_offsets] num_experts=0 is outside [1, 2147483647]");
  EXPECT_EQ(offsets_error({2, 2}, DType::kBFloat16, table.data(), offsets.data()),
            "[ragged_offsets] dtype=bf16 is not supported; choose fp32 or fp64");
  EXPECT_EQ(offsets_error({2, 2}, DType::kFloat32, nullptr, offsets.data()),
            "[ragged_offsets] weights=null but 4 elements are needed; pass a buffer");
  EXPECT_EQ(offsets_error({2, 2}, DType::kFloat32, table.data(), nullptr),
            "[ragged_offsets] token_offsets=null but 3 elements are needed; pass a buffer");
  offsets = {0, 2, 4};
  EXPECT_EQ(config_error([&] {
              std::vector<float> dense(4);
              ragged_to_dense({2, 2}, DType::kFloat32, offsets.data(), nullptr, table.data(),
                              dense.data());
            }),
            "[ragged_to_dense] expert_idx=null but 4 elements are needed; pass a buffer");
}

}  // namespace
}  // namespace perseid::kernels::testing
