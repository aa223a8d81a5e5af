// select_k against a sort: random values, heavy ties, NaN, infinities and both zeros.
#include "kernels/select.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
std::vector<uint8_t> kept(const std::vector<T>& values, int64_t k, bool is_reference = false) {
  std::vector<uint8_t> result(values.size(), 9);
  const auto count = static_cast<int64_t>(values.size());
  const DType dtype = DTypeOf<T>::value;
  (is_reference ? select_k_reference(values.data(), count, k, dtype, result.data())
                : select_k(values.data(), count, k, dtype, result.data()));
  return result;
}

TEST(SelectK, Examples) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  using Row = std::vector<uint8_t>;
  EXPECT_EQ(kept<float>({1, 3, 2, 3}, 2), (Row{0, 1, 0, 1}));
  EXPECT_EQ(kept<float>({-0.0f, 0.0f, -0.0f, -1}, 2), (Row{1, 1, 0, 0}));
  EXPECT_EQ(kept<float>({nan, -inf, -5, nan}, 1), (Row{0, 0, 1, 0}));
  EXPECT_EQ(kept<float>({nan, -inf, -5, nan}, 2), (Row{1, 0, 1, 0}));
  EXPECT_EQ(kept<float>({-nan, -inf, -5, nan}, 3), (Row{1, 1, 1, 0}));
  EXPECT_EQ(kept<float>({1, inf, nan}, 1), (Row{0, 1, 0}));
  EXPECT_EQ(kept<float>({1, 2}, 0), (Row{0, 0}));
  EXPECT_EQ(kept<float>({1, nan}, 5), (Row{1, 1}));
  EXPECT_EQ(kept<float>({}, 5), Row{});
}

template <typename T>
void expect_reference(const std::vector<T>& values, const std::string& what) {
  const auto count = static_cast<int64_t>(values.size());
  for (const int64_t k :
       {int64_t{0}, int64_t{1}, count / 10, count / 2, count - 1, count, count + 1}) {
    if (k < 0) continue;
    const auto expected = kept(values, k, true);
    ASSERT_EQ(std::count(expected.begin(), expected.end(), 1), std::min(k, count));
    for (const int threads_used : kThreadCounts) {
      const Threads threads(threads_used);
      ASSERT_EQ(kept(values, k), expected) << what << " count=" << count << " k=" << k;
    }
  }
}

template <typename T>
class SelectTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(SelectTyped, Types);

TYPED_TEST(SelectTyped, EqualsReference) {
  using T = TypeParam;
  for (const int64_t count : {0, 1, 2, 37, 1000, 65536, 65537, 131073}) {
    expect_reference(normal_values<T>(count, 1), "normal");
    auto ties = normal_values<T>(count, 2, 2.0);
    for (T& value : ties) value = std::trunc(value);  // -0 among them
    expect_reference(ties, "ties");
    auto odd = normal_values<T>(count, 3);
    for (size_t i = 0; i < odd.size(); ++i) {
      if (i % 3 == 0) odd[i] = std::numeric_limits<T>::quiet_NaN();
      if (i % 5 == 0) odd[i] = -std::numeric_limits<T>::infinity();
      if (i % 7 == 0) odd[i] = std::numeric_limits<T>::infinity();
      if (i % 11 == 0) odd[i] = std::numeric_limits<T>::denorm_min();
    }
    expect_reference(odd, "odd");
    expect_reference(std::vector<T>(static_cast<size_t>(count), T{-3}), "constant");
  }
}

TYPED_TEST(SelectTyped, RowsEqualReference) {
  using T = TypeParam;
  struct Size {
    int64_t rows, cols;
  };
  for (const auto& [rows, cols] :
       std::vector<Size>{{0, 3}, {3, 0}, {1, 1}, {5000, 4}, {7, 37}, {3, 40000}}) {
    auto values = normal_values<T>(rows * cols, 4, 3.0);
    for (size_t i = 0; i < values.size(); ++i) {
      if (i % 2 == 0) values[i] = std::trunc(values[i]);
      if (i % 13 == 0) values[i] = std::numeric_limits<T>::quiet_NaN();
    }
    for (const int64_t k : {int64_t{0}, int64_t{1}, cols / 2, cols, cols + 1}) {
      std::vector<uint8_t> expected(values.size(), 9);
      select_k_rows_reference(values.data(), rows, cols, k, DTypeOf<T>::value, expected.data());
      for (const int threads_used : kThreadCounts) {
        const Threads threads(threads_used);
        std::vector<uint8_t> found(values.size(), 9);
        select_k_rows(values.data(), rows, cols, k, DTypeOf<T>::value, found.data());
        ASSERT_EQ(found, expected) << rows << "x" << cols << " k=" << k;
      }
    }
  }
}

TEST(SelectK, WrongArguments) {
  EXPECT_EQ(config_error([] { select_k_rows(nullptr, 1, 2, 1, DType::kFloat32, nullptr); }),
            "[select_k_rows] values=null but 2 elements are needed; pass a buffer");
  EXPECT_EQ(config_error([] { kept<float>({1}, -1); }),
            "[select_k] k=-1 is negative; choose 0 or more");
  EXPECT_EQ(config_error([] { select_k(nullptr, -2, 1, DType::kFloat32, nullptr); }),
            "[select_k] count=-2 is negative; choose 0 or more");
}

}  // namespace
}  // namespace perseid::kernels::testing
