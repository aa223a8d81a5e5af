// dselect_k and dselect_k_backward on a device against the CPU: weights and gradients to rounding,
// zeros and counts exactly; outputs held NaN or -9 before.
//   Sizes        numbers of experts of which some are no power of two, below and above a warp; 0,
//                1 and more tokens than a block; open and saturated switches
//   Variants     width x hard_eval x cut-off x renormalize x mask x map
//   SharedMap    codes of a selector that share an expert, experts without a code
//   IdentityMap  the bits of no map
//   Edges        NaN, infinities and ties in logits, a token without a real neighbour
//   Nulls        outputs and gradients that are null; only the sums
//   Large        memory of a token that an SM does not have
//   SameBits     twice
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/dselect_k_fixture.h"

namespace perseid::kernels::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// The inputs of a case on a device.
template <typename T>
struct DSelectKOnDevice {
  DSelectKOnDevice(const DSelectKCase<T>& at, const Stream& stream)
      : logits(at.logits, stream),
        map(at.map, stream),
        valid(at.valid, stream),
        input{logits.data(), at.map.empty() ? nullptr : map.data(),
              at.valid.empty() ? nullptr : valid.data()} {}
  DeviceArray<T> logits;
  DeviceArray<int32_t> map;
  DeviceArray<uint8_t> valid;
  DSelectKInput input;
};

class DeviceDSelectK : public DeviceTest {
 protected:
  template <typename T>
  DSelectKResult<T> forward(const DSelectKCase<T>& at) {
    const DSelectKOnDevice<T> on_device(at, stream());
    DeviceArray<T> weights(nans<T>(at.shape.num_tokens * at.shape.num_experts), stream());
    DeviceArray<double> sums({-9, -9, -9}, stream());
    DeviceArray<int64_t> counts({-9, -9, -9}, stream());
    dselect_k(at.shape, at.options, DTypeOf<T>::value, on_device.input,
              {weights.data(), sums.data(), sums.data() + 1, sums.data() + 2, counts.data(),
               counts.data() + 1, counts.data() + 2},
              stream());
    const auto sum = sums.read();
    const auto count = counts.read();
    return {weights.read(), sum[0], sum[1], sum[2], count[0], count[1], count[2]};
  }
  template <typename T>
  std::vector<T> backward(const DSelectKCase<T>& at, const std::vector<T>& weights,
                          const std::vector<T>& upstream, const SumCoefficients& coefficients) {
    const DSelectKOnDevice<T> on_device(at, stream());
    DeviceArray<T> of_forward(weights, stream()), grad(upstream, stream());
    DeviceArray<double> sums({coefficients.entropy, coefficients.penalty}, stream());
    DeviceArray<T> result(nans<T>(static_cast<int64_t>(at.logits.size())), stream());
    dselect_k_backward(
        at.shape, at.options, DTypeOf<T>::value, on_device.input,
        {of_forward.data(), upstream.empty() ? nullptr : grad.data(), sums.data(), sums.data() + 1},
        result.data(), stream());
    return result.read();
  }
  template <typename T>
  void compare(const DSelectKCase<T>& at) {
    constexpr double kTolerance = 4 * tolerance<T>();
    const DSelectKResult<T> actual = forward(at), expected = at.forward();
    expect_close(actual.weights, expected.weights, kTolerance, at.name() + "weights");
    for (size_t i = 0; i < expected.weights.size(); ++i) {
      ASSERT_EQ(actual.weights[i] == T{0}, expected.weights[i] == T{0}) << at.name() << i;
    }
    expect_close<double>({actual.entropy_sum}, {expected.entropy_sum}, kTolerance, at.name());
    expect_close<double>({actual.penalty_sum}, {expected.penalty_sum}, kTolerance, at.name());
    expect_close<double>({actual.removed_weight}, {expected.removed_weight}, kTolerance, at.name());
    ASSERT_EQ(actual.num_switches, expected.num_switches) << at.name();
    ASSERT_EQ(actual.saturated_switches, expected.saturated_switches) << at.name();
    ASSERT_EQ(actual.non_finite_tokens, expected.non_finite_tokens) << at.name();

    const auto upstream = normal_values<T>(at.shape.num_tokens * at.shape.num_experts, 7);
    const auto empty = std::vector<T>{};
    for (const auto& grad : {upstream, empty}) {
      if (grad.empty() && at.shape.num_tokens > 11) continue;
      const SumCoefficients coefficients{grad.empty() ? 0.3 : 0.1, 0.2};
      expect_close(backward(at, expected.weights, grad, coefficients),
                   at.backward(grad, coefficients), 4 * kTolerance, at.name() + "gradient");
    }
  }
};

TEST_F(DeviceDSelectK, Sizes) {
  for (const int64_t E : {1, 2, 5, 8, 64, 100}) {
    for (const int64_t K : {1, 2, 4}) {
      if (K > E) continue;
      for (const int64_t num_tokens : {0, 1, 37}) {
        compare(random_dselect_k<float>(num_tokens, E, K, 3));
        compare(random_dselect_k<double>(num_tokens, E, K, 4));
      }
      for (const double scale : {0.05, 5.0}) {
        compare(random_dselect_k<double>(4, E, K, 4, scale));
      }
    }
    compare(random_dselect_k<float>(300, E, 1));
    compare(random_dselect_k<double>(130, E, std::min<int64_t>(E, 2)));
  }
}

TEST_F(DeviceDSelectK, Variants) {
  for (const int64_t E : {5, 100}) {
    for_each_variant(random_dselect_k<float>(5, E, 3), [&](const auto& at) { compare(at); });
    for_each_variant(random_dselect_k<double>(5, E, 3), [&](const auto& at) { compare(at); });
  }
}

TEST_F(DeviceDSelectK, SharedMap) {
  for (const int64_t E : {7, 70}) {
    auto at = random_dselect_k<double>(5, E, 3);
    for (int64_t x = 0; x < 3 * E; ++x) at.map.push_back(static_cast<int32_t>(x * x % (E - 2)));
    for (const bool hard : {false, true}) {
      at.options.hard_eval = hard;
      compare(at);
    }
  }
}

TEST_F(DeviceDSelectK, IdentityMap) {
  for (const int64_t E : {5, 100}) {
    auto at = random_dselect_k<float>(70, E, 3);
    const auto upstream = normal_values<float>(70 * E, 7);
    for (const bool hard : {false, true}) {
      at.options.hard_eval = hard;
      at.map.clear();
      const auto expected = forward(at);
      const auto expected_grad = backward(at, expected.weights, upstream, {.1, .2});
      for (int64_t i = 0; i < 3; ++i) {
        for (int32_t j = 0; j < E; ++j) at.map.push_back(j);
      }
      EXPECT_TRUE(forward(at).has_same_bits(expected)) << at.name();
      EXPECT_TRUE(same_bits(backward(at, expected.weights, upstream, {.1, .2}), expected_grad))
          << at.name();
    }
  }
}

TEST_F(DeviceDSelectK, Edges) {
  for (const int64_t E : {5, 64}) {
    for_each_variant(random_dselect_k<double>(9, E, 3), [&](auto at) {
      at.z(1, 2, 1) = kNaN;
      at.omega(2, 0) = kNaN;  // of a token that a mask leaves out
      at.z(3, 0, 0) = -kInf;
      at.omega(4, 1) = kInf;
      for (int64_t i = 0; i < 3; ++i) at.omega(5, i) = -kInf;
      for (int64_t i = 0; i < 3; ++i) at.z(7, i, 0) = at.z(7, i, 1) = 0;  // equal products
      compare(at);
    });
  }
  auto at = random_dselect_k<float>(3, 64, 2);
  for (int64_t b = 0; b < 6; ++b) at.z(1, 0, b) = -.499994f;  // products below normal numbers
  compare(at);
}

TEST_F(DeviceDSelectK, Nulls) {
  const auto at = random_dselect_k<double>(70, 20, 2);
  const auto expected = at.forward();
  DeviceArray<double> logits(at.logits, stream()), penalty({-9}, stream());
  DeviceArray<double> weights(nans<double>(70 * 20), stream());
  dselect_k(at.shape, at.options, DType::kFloat64, {logits.data()},
            {nullptr, nullptr, penalty.data()}, stream());
  expect_close(penalty.read(), {expected.penalty_sum}, 1e-13, "penalty");
  dselect_k(at.shape, at.options, DType::kFloat64, {logits.data()}, {weights.data()}, stream());
  expect_close(weights.read(), expected.weights, 1e-13, "weights");
  DeviceArray<double> grad(nans<double>(static_cast<int64_t>(at.logits.size())), stream());
  dselect_k_backward(at.shape, at.options, DType::kFloat64, {logits.data()}, {}, grad.data(),
                     stream());
  EXPECT_EQ(grad.read(), std::vector<double>(at.logits.size(), 0.0));
}

TEST_F(DeviceDSelectK, Large) {
  for (auto at : {random_dselect_k<double>(3, 6000, 2), random_dselect_k<double>(3, 3000, 2)}) {
    compare(at);
    at.options.hard_eval = true;
    compare(at);
    at.map = shuffled_map(at.shape.num_selectors, at.shape.num_experts);
    compare(at);
    at.options.hard_eval = false;
    compare(at);
  }
}

TEST_F(DeviceDSelectK, SameBits) {
  auto at = random_dselect_k<float>(140, 100, 2);
  at.map = shuffled_map(2, 100);
  const auto once = forward(at);
  EXPECT_TRUE(once.has_same_bits(forward(at)));
  const auto upstream = normal_values<float>(140 * 100, 7);
  EXPECT_TRUE(same_bits(backward(at, once.weights, upstream, {.1, .2}),
                        backward(at, once.weights, upstream, {.1, .2})));
}

}  // namespace
}  // namespace perseid::kernels::testing
