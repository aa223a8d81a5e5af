// Ragged rows on a device against the twins, number for number; outputs held -9 or NaN before.
//   EqualsTwin   0, 1 and more tokens than a tile; experts around a warp and more than are
//   gathered;
//                heavy ties, NaN, -0, rows without pairs and full rows
//   NullOutputs  each output alone
//   ToDense      the way back writes zeros elsewhere
#include "kernels/ragged.h"

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class DeviceRagged : public DeviceTest {
 protected:
  static constexpr DType kDType = DTypeOf<T>::value;
  /// Few values, so that many are equal; row t keeps about 1 weight in 1 + t % 4.
  static std::vector<T> table(const RaggedShape& shape) {
    std::mt19937 bits(static_cast<uint32_t>(shape.num_tokens + shape.num_experts));
    std::vector<T> weights;
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t e = 0; e < shape.num_experts; ++e) {
        const auto draw = static_cast<int64_t>(bits() % 64);
        const bool is_kept = t % 7 == 5 || (t % 7 != 3 && draw % (1 + t % 4) == 0);
        T weight = is_kept ? T(1 + draw % 5) / 8 : draw % 2 == 0 ? -T(0) : -T(1);
        if (draw == 63) weight = std::numeric_limits<T>::quiet_NaN();
        weights.push_back(weight);
      }
    }
    return weights;
  }
  void compare(const RaggedShape& shape, int wanted = 7) {
    const std::string name = to_text(shape.num_tokens) + "x" + to_text(shape.num_experts);
    const std::vector<T> weights = table(shape);
    std::vector<int32_t> offsets(static_cast<size_t>(shape.num_tokens + 1), -9);
    DeviceArray<T> d_weights(weights, this->stream());
    DeviceArray<int32_t> d_offsets(offsets, this->stream());
    const int64_t count =
        ragged_offsets(shape, kDType, d_weights.data(), d_offsets.data(), this->stream());
    ASSERT_EQ(ragged_offsets(shape, kDType, weights.data(), offsets.data()), count) << name;
    ASSERT_EQ(d_offsets.read(), offsets) << name;

    std::vector<int32_t> experts(static_cast<size_t>(count), -9);
    std::vector<int64_t> positions(static_cast<size_t>(count), -9);
    std::vector<T> values(static_cast<size_t>(count), T(-9));
    DeviceArray<int32_t> d_experts(experts, this->stream());
    DeviceArray<int64_t> d_positions(positions, this->stream());
    DeviceArray<T> d_values(values, this->stream());
    const auto output = [&](int32_t* first, void* second, int64_t* third) {
      return RaggedOutput{wanted & 1 ? first : nullptr, wanted & 2 ? second : nullptr,
                          wanted & 4 ? third : nullptr};
    };
    ragged_rows(shape, kDType, weights.data(), offsets.data(),
                output(experts.data(), values.data(), positions.data()));
    ragged_rows(shape, kDType, d_weights.data(), d_offsets.data(),
                output(d_experts.data(), d_values.data(), d_positions.data()), this->stream());
    ASSERT_EQ(d_experts.read(), experts) << name;
    ASSERT_EQ(d_positions.read(), positions) << name;
    ASSERT_TRUE(same_bits(d_values.read(), values)) << name;
    if (wanted != 7) return;

    std::vector<T> dense(weights.size(), T(-9));
    DeviceArray<T> d_dense(dense, this->stream());
    ragged_to_dense(shape, kDType, offsets.data(), experts.data(), values.data(), dense.data());
    ragged_to_dense(shape, kDType, d_offsets.data(), d_experts.data(), d_values.data(),
                    d_dense.data(), this->stream());
    ASSERT_TRUE(same_bits(d_dense.read(), dense)) << name;
  }
};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(DeviceRagged, Types);

TYPED_TEST(DeviceRagged, EqualsTwin) {
  for (const int64_t num_tokens : {0, 1, 5, 61}) {
    for (const int64_t num_experts : {1, 31, 32, 33, 100}) this->compare({num_tokens, num_experts});
  }
  this->compare({9, 300});
  this->compare({1024, 2});
  this->compare({1025, 2});
}

TYPED_TEST(DeviceRagged, NullOutputs) {
  for (const int wanted : {1, 2, 4, 0}) this->compare({13, 40}, wanted);
}

}  // namespace
}  // namespace perseid::kernels::testing
