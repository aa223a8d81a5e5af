// Activations on a device against the twin; outputs were NaN before.
//   EqualsTwin     every activation, gated and plain, all dtypes; widths of one warp, of four and
//   of
//                  no wide access, to a few roundings
//   NullOutputs    each output alone has the same bits; null weights; weighted_act in place
//   ExtremeValues  NaN, infinities and -0 as on the host
#include "kernels/activation.h"

#include <cstring>

#include "tests/kernels/device_fixture.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class DeviceActivation : public DeviceTest {
 protected:
  using A = Accumulate<T>;
  static constexpr DType kDType = DTypeOf<T>::value;
  static int64_t pre_width(const ActivationShape& shape) {
    return (shape.gated ? 2 : 1) * shape.d_ff;
  }
  struct Outputs {
    std::vector<T> grad_pre, weighted_act;
    std::vector<A> grad_weights;
  };
  struct Inputs {
    explicit Inputs(const ActivationShape& of)
        : shape(of),
          pre(normal_values<T>(of.num_rows * pre_width(of), 1, 2.0)),
          grad_act(normal_values<T>(of.num_rows * of.d_ff, 2)),
          weights(normal_values<A>(of.num_rows, 3)) {}
    ActivationShape shape;
    std::vector<T> pre, grad_act;
    std::vector<A> weights;
  };
  std::vector<T> forward(const Inputs& at, bool is_on_device, bool has_weights = true) {
    std::vector<T> out = nans<T>(at.shape.num_rows * at.shape.d_ff);
    if (!is_on_device) {
      activation_forward(at.shape, kDType, at.pre.data(), has_weights ? at.weights.data() : nullptr,
                         out.data());
      return out;
    }
    DeviceArray<T> pre(at.pre, this->stream()), result(out, this->stream());
    DeviceArray<A> weights(at.weights, this->stream());
    activation_forward(at.shape, kDType, pre.data(), has_weights ? weights.data() : nullptr,
                       result.data(), this->stream());
    return result.read();
  }
  Outputs empty_outputs(const Inputs& at) {
    return {nans<T>(at.shape.num_rows * pre_width(at.shape)),
            nans<T>(at.shape.num_rows * at.shape.d_ff), nans<A>(at.shape.num_rows)};
  }
  /// Bits of `wanted`: grad_pre, weighted_act, grad_weights.
  Outputs backward(const Inputs& at, int wanted = 7, bool has_weights = true,
                   bool is_in_place = false) {
    const Outputs empty = empty_outputs(at);
    DeviceArray<T> pre(at.pre, this->stream()), grad(at.grad_act, this->stream());
    DeviceArray<T> grad_pre(empty.grad_pre, this->stream());
    DeviceArray<T> weighted(empty.weighted_act, this->stream());
    DeviceArray<A> weights(at.weights, this->stream());
    DeviceArray<A> grad_weights(empty.grad_weights, this->stream());
    activation_backward(at.shape, kDType, pre.data(), has_weights ? weights.data() : nullptr,
                        grad.data(), wanted & 1 ? grad_pre.data() : nullptr,
                        wanted & 2 ? is_in_place ? grad.data() : weighted.data() : nullptr,
                        wanted & 4 ? grad_weights.data() : nullptr, this->stream());
    return {grad_pre.read(), is_in_place ? grad.read() : weighted.read(), grad_weights.read()};
  }
};
using Types = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(DeviceActivation, Types);

TYPED_TEST(DeviceActivation, EqualsTwin) {
  using T = TypeParam;
  for (const auto activation :
       {Activation::kIdentity, Activation::kRelu, Activation::kGelu, Activation::kSilu}) {
    for (const bool gated : {false, true}) {
      for (const int64_t num_rows : {0, 1, 6}) {
        for (const int64_t d_ff : {0, 1, 7, 16, 136, 1040, 1101}) {
          const typename TestFixture::Inputs at({num_rows, d_ff, activation, gated});
          const std::string name = to_text(static_cast<int>(activation)) + " gated " +
                                   to_text(gated) + " d_ff " + to_text(d_ff);
          expect_close(this->forward(at, true), this->forward(at, false), tolerance<T>(), name);
          auto expected = this->empty_outputs(at);
          activation_backward(at.shape, this->kDType, at.pre.data(), at.weights.data(),
                              at.grad_act.data(), expected.grad_pre.data(),
                              expected.weighted_act.data(), expected.grad_weights.data());
          const auto actual = this->backward(at);
          expect_close(actual.grad_pre, expected.grad_pre, tolerance<T>(), name + " grad_pre");
          expect_close(actual.weighted_act, expected.weighted_act, tolerance<T>(), name);
          expect_close(actual.grad_weights, expected.grad_weights, tolerance<Accumulate<T>>() * 10,
                       name + " grad_weights");
        }
      }
    }
  }
}

TYPED_TEST(DeviceActivation, NullOutputs) {
  for (const bool gated : {false, true}) {
    for (const int64_t d_ff : {72, 301, 1040}) {
      typename TestFixture::Inputs at({5, d_ff, Activation::kSilu, gated});
      const auto all = this->backward(at), empty = this->empty_outputs(at);
      EXPECT_TRUE(same_bits(all.grad_weights, this->backward(at).grad_weights));
      for (int wanted = 1; wanted < 7; ++wanted) {
        const auto some = this->backward(at, wanted);
        EXPECT_TRUE(same_bits(some.grad_pre, wanted & 1 ? all.grad_pre : empty.grad_pre));
        EXPECT_TRUE(
            same_bits(some.weighted_act, wanted & 2 ? all.weighted_act : empty.weighted_act));
        EXPECT_TRUE(
            same_bits(some.grad_weights, wanted & 4 ? all.grad_weights : empty.grad_weights));
      }
      const auto in_place = this->backward(at, 7, true, true);
      EXPECT_TRUE(same_bits(in_place.weighted_act, all.weighted_act));
      EXPECT_TRUE(same_bits(in_place.grad_pre, all.grad_pre));
      EXPECT_TRUE(same_bits(in_place.grad_weights, all.grad_weights));

      std::fill(at.weights.begin(), at.weights.end(), Accumulate<TypeParam>{1});
      EXPECT_TRUE(same_bits(this->forward(at, true, false), this->forward(at, true)));
      EXPECT_TRUE(same_bits(this->backward(at, 7, false).grad_pre, this->backward(at).grad_pre));
    }
  }
}

TYPED_TEST(DeviceActivation, ExtremeValues) {
  using T = TypeParam;
  const double inf = std::numeric_limits<double>::infinity();
  for (const auto activation :
       {Activation::kIdentity, Activation::kRelu, Activation::kGelu, Activation::kSilu}) {
    typename TestFixture::Inputs at({1, 8, activation, false});
    const double pre[] = {std::nan(""), inf, -1e30, 1e30, -200.0, 200.0, 0.0, -0.0};
    for (size_t i = 0; i < 8; ++i) at.pre[i] = make<T>(pre[i]);
    at.weights[0] = 1;
    expect_close(this->forward(at, true), this->forward(at, false), tolerance<T>(), "extremes");
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
