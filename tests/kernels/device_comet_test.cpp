// comet and comet_backward on a device against the CPU: weights and gradients to rounding, zeros
// and counts exactly; outputs held NaN or -9 before.
//   Sizes      numbers of experts of which some are no power of two, below and above a warp; 0, 1
//              and more tokens than a block; open and saturated switches
//   Variants   width x map x mask x hard_eval x cut-off
//   SharedMap  leaves of a tree that share an expert, experts without a leaf
//   Edges      NaN, infinities and ties in logits
//   Nulls      outputs and gradients that are null; only the sums
//   Large      memory of a token that an SM does not have
//   SameBits   twice
#include "tests/kernels/comet_fixture.h"
#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// The inputs of a case on a device.
template <typename T>
struct CometOnDevice {
  CometOnDevice(const CometCase<T>& at, const Stream& stream)
      : splits(at.splits, stream),
        leaves(at.leaves, stream),
        map(at.map, stream),
        valid(at.valid, stream),
        input{splits.data(), leaves.data(), at.map.empty() ? nullptr : map.data(),
              at.valid.empty() ? nullptr : valid.data()} {}
  DeviceArray<T> splits, leaves;
  DeviceArray<int32_t> map;
  DeviceArray<uint8_t> valid;
  CometInput input;
};

class DeviceComet : public DeviceTest {
 protected:
  template <typename T>
  CometResult<T> forward(const CometCase<T>& at) {
    const CometOnDevice<T> on_device(at, stream());
    DeviceArray<T> weights(nans<T>(at.shape.num_tokens * at.shape.num_experts), stream());
    DeviceArray<double> sums({-9, -9}, stream());
    DeviceArray<int64_t> counts({-9, -9, -9}, stream());
    comet(at.shape, at.options, DTypeOf<T>::value, on_device.input,
          {weights.data(), sums.data(), sums.data() + 1, counts.data(), counts.data() + 1,
           counts.data() + 2},
          stream());
    const auto sum = sums.read();
    const auto count = counts.read();
    return {weights.read(), sum[0], sum[1], count[0], count[1], count[2]};
  }
  template <typename T>
  CometGrads<T> backward(const CometCase<T>& at, const std::vector<T>& weights,
                         const std::vector<T>& upstream, double entropy_coeff) {
    const CometOnDevice<T> on_device(at, stream());
    DeviceArray<T> of_forward(weights, stream()), grad(upstream, stream());
    DeviceArray<double> coefficient({entropy_coeff}, stream());
    DeviceArray<T> splits(nans<T>(static_cast<int64_t>(at.splits.size())), stream());
    DeviceArray<T> leaves(nans<T>(static_cast<int64_t>(at.leaves.size())), stream());
    comet_backward(
        at.shape, at.options, DTypeOf<T>::value, on_device.input,
        {of_forward.data(), upstream.empty() ? nullptr : grad.data(), coefficient.data()},
        splits.data(), leaves.data(), stream());
    return {splits.read(), leaves.read()};
  }
  template <typename T>
  void compare(const CometCase<T>& at) {
    constexpr double kTolerance = 4 * tolerance<T>();
    const CometResult<T> actual = forward(at), expected = at.forward();
    expect_close(actual.weights, expected.weights, kTolerance, at.name() + " weights");
    for (size_t i = 0; i < expected.weights.size(); ++i) {
      ASSERT_EQ(actual.weights[i] == T{0}, expected.weights[i] == T{0}) << at.name() << i;
    }
    expect_close<double>({actual.entropy_sum}, {expected.entropy_sum}, kTolerance, at.name());
    expect_close<double>({actual.removed_weight}, {expected.removed_weight}, kTolerance, at.name());
    ASSERT_EQ(actual.reached_nodes, expected.reached_nodes) << at.name();
    ASSERT_EQ(actual.saturated_nodes, expected.saturated_nodes) << at.name();
    ASSERT_EQ(actual.non_finite_tokens, expected.non_finite_tokens) << at.name();

    const auto upstream = normal_values<T>(at.shape.num_tokens * at.shape.num_experts, 7);
    for (const auto& grad : {upstream, std::vector<T>{}}) {
      if (grad.empty() && at.shape.num_tokens > 11) continue;
      const double coefficient = grad.empty() ? 0.3 : 0.1;
      const CometGrads<T> mine = backward(at, expected.weights, grad, coefficient);
      const CometGrads<T> twin = at.backward(grad, coefficient);
      expect_close(mine.splits, twin.splits, 4 * kTolerance, at.name() + " grad z");
      expect_close(mine.leaves, twin.leaves, 4 * kTolerance, at.name() + " grad a");
    }
  }
};

TEST_F(DeviceComet, Sizes) {
  for (const int64_t E : {1, 2, 5, 8, 64, 100}) {
    for (const int64_t K : {1, 2, 4}) {
      if (K > E) continue;
      for (const int64_t num_tokens : {0, 1, 37}) {
        compare(random_comet<float>(num_tokens, E, K, 3));
        compare(random_comet<double>(num_tokens, E, K, 4));
      }
      for (const double scale : {0.05, 5.0}) compare(random_comet<double>(4, E, K, 4, scale));
    }
    compare(random_comet<float>(300, E, 1));
    compare(random_comet<double>(130, E, std::min<int64_t>(E, 2)));
  }
}

TEST_F(DeviceComet, Variants) {
  for (const int64_t E : {5, 100}) {
    for_each_variant(random_comet<float>(5, E, 3), [&](const auto& at) { compare(at); });
    for_each_variant(random_comet<double>(5, E, 3), [&](const auto& at) { compare(at); });
  }
}

TEST_F(DeviceComet, SharedMap) {
  for (const int64_t E : {7, 70}) {
    auto at = random_comet<double>(5, E, 3);
    for (int64_t x = 0; x < 3 * E; ++x) at.map.push_back(static_cast<int32_t>(x * x % (E - 2)));
    compare(at);
  }
}

TEST_F(DeviceComet, Edges) {
  for (const int64_t E : {5, 64}) {
    for_each_variant(random_comet<double>(9, E, 3), [&](auto at) {
      const auto split = [&](int64_t t, int64_t n) -> double& {
        return at.splits[static_cast<size_t>(t * 3 * (E - 1) + n)];
      };
      const auto leaf = [&](int64_t t, int64_t n) -> double& {
        return at.leaves[static_cast<size_t>(t * 3 * E + n)];
      };
      split(1, 2 * (E - 1) + 1) = kNaN;
      leaf(2, E + 3) = kNaN;  // of a token that a mask leaves out
      split(3, 0) = -kInf;
      leaf(4, E - 1) = kInf;
      for (int64_t n = 0; n < 3 * E; ++n) leaf(5, n) = -kInf;
      for (int64_t n = 0; n < 3 * (E - 1); ++n) split(7, n) = 0;  // equal leaves
      compare(at);
    });
  }
  auto at = random_comet<float>(3, 64, 2);
  for (int64_t q = 0; q < 63; ++q) at.splits[static_cast<size_t>(126 + q)] = -.499994f;
  compare(at);  // products below normal numbers
}

TEST_F(DeviceComet, Nulls) {
  const auto at = random_comet<double>(70, 20, 2);
  const auto expected = at.forward();
  const CometOnDevice<double> on_device(at, stream());
  DeviceArray<double> entropy({-9}, stream()), weights(nans<double>(70 * 20), stream());
  comet(at.shape, at.options, DType::kFloat64, on_device.input, {nullptr, entropy.data()},
        stream());
  expect_close(entropy.read(), {expected.entropy_sum}, 1e-13, "entropy");
  comet(at.shape, at.options, DType::kFloat64, on_device.input, {weights.data()}, stream());
  expect_close(weights.read(), expected.weights, 4e-13, "weights");
  DeviceArray<double> splits(nans<double>(70 * 38), stream()), leaves(nans<double>(2800), stream());
  comet_backward(at.shape, at.options, DType::kFloat64, on_device.input, {}, splits.data(),
                 leaves.data(), stream());
  EXPECT_EQ(splits.read(), std::vector<double>(70 * 38, 0.0));
  EXPECT_EQ(leaves.read(), std::vector<double>(2800, 0.0));
}

TEST_F(DeviceComet, Large) {
  for (const int64_t E : {300, 1500}) {
    auto at = random_comet<double>(3, E, E == 300 ? 64 : 2);
    compare(at);
    at.options.hard_eval = true;
    at.map = shuffled_map(at.shape.num_trees, E);
    compare(at);
  }
}

TEST_F(DeviceComet, SameBits) {
  auto at = random_comet<float>(140, 100, 2);
  at.map = shuffled_map(2, 100);
  const auto once = forward(at);
  EXPECT_TRUE(once.has_same_bits(forward(at)));
  const auto upstream = normal_values<float>(140 * 100, 7);
  const auto grads = backward(at, once.weights, upstream, .1);
  const auto again = backward(at, once.weights, upstream, .1);
  EXPECT_TRUE(same_bits(grads.splits, again.splits));
  EXPECT_TRUE(same_bits(grads.leaves, again.leaves));
}

}  // namespace
}  // namespace perseid::kernels::testing
