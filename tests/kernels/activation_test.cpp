// Activations.
//   Golden         f and f' at chosen points
//   Reference      every activation, gated and plain, all dtypes, odd sizes; outputs were NaN
//   before Jacobian       float64 gradients against central differences, 1e-7 InPlace weighted_act
//   may be grad_act; null outputs change nothing else
#include "kernels/activation.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

const std::vector<Activation> kAll = {Activation::kIdentity, Activation::kRelu, Activation::kGelu,
                                      Activation::kSilu};

int64_t pre_width(const ActivationShape& shape) {
  return shape.gated ? 2 * shape.d_ff : shape.d_ff;
}

std::string name_of(const ActivationShape& shape) {
  return "activation " + to_text(static_cast<int>(shape.activation)) +
         (shape.gated ? " gated " : " plain ") + to_text(shape.num_rows) + "x" +
         to_text(shape.d_ff);
}

template <typename T>
struct Gradients {
  std::vector<T> grad_pre;
  std::vector<T> weighted_act;
  std::vector<Accumulate<T>> grad_weights;
};

template <typename T>
struct Case {
  explicit Case(const ActivationShape& of, uint32_t seed = 1)
      : shape(of),
        pre(normal_values<T>(of.num_rows * pre_width(of), seed, 2.0)),
        grad_act(normal_values<T>(of.num_rows * of.d_ff, seed + 1)),
        weights(normal_values<Accumulate<T>>(of.num_rows, seed + 2)) {}

  std::vector<T> forward(bool is_reference = false) const {
    std::vector<T> out = nans<T>(shape.num_rows * shape.d_ff);
    const DType dtype = DTypeOf<T>::value;
    (is_reference
         ? activation_forward_reference(shape, dtype, pre.data(), weights.data(), out.data())
         : activation_forward(shape, dtype, pre.data(), weights.data(), out.data()));
    return out;
  }
  Gradients<T> backward(bool is_reference = false) const {
    Gradients<T> result{nans<T>(shape.num_rows * pre_width(shape)),
                        nans<T>(shape.num_rows * shape.d_ff), nans<Accumulate<T>>(shape.num_rows)};
    (is_reference ? activation_backward_reference : backward_of_stream)(
        shape, DTypeOf<T>::value, pre.data(), weights.data(), grad_act.data(),
        result.grad_pre.data(), result.weighted_act.data(), result.grad_weights.data());
    return result;
  }
  static void backward_of_stream(const ActivationShape& shape, DType dtype, const void* pre,
                                 const void* weights, const void* grad_act, void* grad_pre,
                                 void* weighted_act, void* grad_weights) {
    activation_backward(shape, dtype, pre, weights, grad_act, grad_pre, weighted_act, grad_weights);
  }

  ActivationShape shape;
  std::vector<T> pre, grad_act;
  std::vector<Accumulate<T>> weights;
};

TEST(Activation, GoldenValues) {
  // f(1.5) and f'(1.5), from the definitions to ten digits.
  struct Golden {
    Activation activation;
    double value, slope;
  };
  const double s = 0.8175744761936437, cdf = 0.9331927987311419, density = 0.12951759566589174;
  for (const auto& [activation, value, slope] :
       {Golden{Activation::kIdentity, 1.5, 1.0}, Golden{Activation::kRelu, 1.5, 1.0},
        Golden{Activation::kGelu, 1.5 * cdf, cdf + 1.5 * density},
        Golden{Activation::kSilu, 1.5 * s, s * (1.0 + 1.5 * (1.0 - s))}}) {
    const ActivationShape shape{1, 1, activation, true};
    const std::vector<double> pre = {1.5, 3.0}, grad = {0.25}, weight = {2.0};
    std::vector<double> out = nans<double>(1), grad_pre = nans<double>(2),
                        weighted = nans<double>(1), grad_weight = nans<double>(1);
    activation_forward(shape, DType::kFloat64, pre.data(), weight.data(), out.data());
    EXPECT_NEAR(out[0], 2.0 * value * 3.0, 1e-14);
    activation_backward(shape, DType::kFloat64, pre.data(), weight.data(), grad.data(),
                        grad_pre.data(), weighted.data(), grad_weight.data());
    EXPECT_NEAR(grad_pre[0], 2.0 * 0.25 * slope * 3.0, 1e-14);
    EXPECT_NEAR(grad_pre[1], 2.0 * 0.25 * value, 1e-14);
    EXPECT_NEAR(weighted[0], 2.0 * value * 3.0, 1e-14);
    EXPECT_NEAR(grad_weight[0], 0.25 * value * 3.0, 1e-14);
  }
}

template <typename T>
class ActivationTyped : public ::testing::Test {};
using Types = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(ActivationTyped, Types);

TYPED_TEST(ActivationTyped, EqualsReference) {
  using T = TypeParam;
  for (const Activation activation : kAll) {
    for (const bool gated : {false, true}) {
      for (const int64_t num_rows : {0, 1, 5}) {
        for (const int64_t d_ff : {0, 1, 7, 16, 33, 256, 300}) {
          const Case<T> at(ActivationShape{num_rows, d_ff, activation, gated});
          expect_close(at.forward(), at.forward(true), tolerance<T>(), name_of(at.shape));
          const Gradients<T> actual = at.backward(), expected = at.backward(true);
          expect_close(actual.grad_pre, expected.grad_pre, tolerance<T>(), name_of(at.shape));
          expect_close(actual.weighted_act, expected.weighted_act, tolerance<T>(),
                       name_of(at.shape));
          for (int64_t n = 0; n < num_rows; ++n) {
            // A sum of d_ff products of normal values, which may cancel.
            const double e = expected.grad_weights[n];
            EXPECT_NEAR(
                actual.grad_weights[n], e,
                tolerance<Accumulate<T>>() * (std::abs(e) + std::sqrt(static_cast<double>(d_ff))))
                << name_of(at.shape) << " grad_weights";
          }
        }
      }
    }
  }
}

TYPED_TEST(ActivationTyped, SameBitsForAnyThreadCount) {
  using T = TypeParam;
  const Case<T> at(ActivationShape{1001, 67, Activation::kSilu, true});
  const auto out = at.forward();
  const Gradients<T> grads = at.backward();
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    EXPECT_TRUE(same_bits(at.forward(), out));
    const Gradients<T> again = at.backward();
    EXPECT_TRUE(same_bits(again.grad_pre, grads.grad_pre));
    EXPECT_TRUE(same_bits(again.weighted_act, grads.weighted_act));
    EXPECT_TRUE(same_bits(again.grad_weights, grads.grad_weights));
  }
}

TYPED_TEST(ActivationTyped, InPlaceAndNullOutputs) {
  using T = TypeParam;
  for (const bool gated : {false, true}) {
    const Case<T> at(ActivationShape{9, 301, Activation::kGelu, gated});
    const Gradients<T> expected = at.backward();
    const DType dtype = DTypeOf<T>::value;

    std::vector<T> shared = at.grad_act, grad_pre = nans<T>(9 * pre_width(at.shape));
    auto grad_weights = nans<Accumulate<T>>(9);
    activation_backward(at.shape, dtype, at.pre.data(), at.weights.data(), shared.data(),
                        grad_pre.data(), shared.data(), grad_weights.data());
    EXPECT_TRUE(same_bits(shared, expected.weighted_act));
    EXPECT_TRUE(same_bits(grad_pre, expected.grad_pre));
    EXPECT_TRUE(same_bits(grad_weights, expected.grad_weights));

    std::vector<T> only = nans<T>(9 * pre_width(at.shape));
    activation_backward(at.shape, dtype, at.pre.data(), at.weights.data(), at.grad_act.data(),
                        only.data(), nullptr, nullptr);
    EXPECT_TRUE(same_bits(only, expected.grad_pre));
    auto only_weights = nans<Accumulate<T>>(9);
    activation_backward(at.shape, dtype, at.pre.data(), at.weights.data(), at.grad_act.data(),
                        nullptr, nullptr, only_weights.data());
    EXPECT_TRUE(same_bits(only_weights, expected.grad_weights));
    std::vector<T> only_act = nans<T>(9 * 301);
    activation_backward(at.shape, dtype, at.pre.data(), at.weights.data(), at.grad_act.data(),
                        nullptr, only_act.data(), nullptr);
    EXPECT_TRUE(same_bits(only_act, expected.weighted_act));
  }
}

TYPED_TEST(ActivationTyped, NullWeightsAreOnes) {
  using T = TypeParam;
  Case<T> at(ActivationShape{3, 35, Activation::kSilu, true});
  std::fill(at.weights.begin(), at.weights.end(), Accumulate<T>{1});
  std::vector<T> out = nans<T>(3 * 35), grad_pre = nans<T>(3 * 70), weighted = nans<T>(3 * 35);
  activation_forward(at.shape, DTypeOf<T>::value, at.pre.data(), nullptr, out.data());
  EXPECT_TRUE(same_bits(out, at.forward()));
  activation_backward(at.shape, DTypeOf<T>::value, at.pre.data(), nullptr, at.grad_act.data(),
                      grad_pre.data(), weighted.data(), nullptr);
  EXPECT_TRUE(same_bits(grad_pre, at.backward().grad_pre));
  EXPECT_TRUE(same_bits(weighted, out));
}

TEST(Activation, BackwardIsTheDerivative) {
  for (const Activation activation : kAll) {
    for (const bool gated : {false, true}) {
      Case<double> at(ActivationShape{2, 9, activation, gated}, 11);
      for (double& x : at.pre) x += x >= 0 ? 0.01 : -0.01;  // away from the kink of relu
      const auto loss = [&] { return dot(at.grad_act, at.forward()); };
      const auto expect_slope = [&](double& x, double grad) {
        const double h = 1e-5, centre = x;
        x = centre + h;
        const double above = loss();
        x = centre - h;
        const double below = loss();
        x = centre;
        EXPECT_NEAR(grad, (above - below) / (2 * h), 1e-7 * (1e-3 + std::abs(grad)))
            << name_of(at.shape);
      };
      for (const bool is_reference : {false, true}) {
        const Gradients<double> grads = at.backward(is_reference);
        for (size_t i = 0; i < at.pre.size(); ++i) expect_slope(at.pre[i], grads.grad_pre[i]);
        for (size_t r = 0; r < 2; ++r) expect_slope(at.weights[r], grads.grad_weights[r]);
        EXPECT_LE(std::abs(dot(grads.weighted_act, at.grad_act) - loss()), 1e-12);
      }
    }
  }
}

TEST(Activation, ExtremeValues) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> pre = {nan, inf, -1e30f, 1e30f, -200.0f, 200.0f, 0.0f, -0.0f};
  for (const Activation activation : kAll) {
    const ActivationShape shape{1, 8, activation, false};
    std::vector<float> out = nans<float>(8);
    activation_forward(shape, DType::kFloat32, pre.data(), nullptr, out.data());
    EXPECT_TRUE(std::isnan(out[0]));  // relu(NaN) is NaN: a broken value stays visible
    EXPECT_EQ(out[1], inf);
    EXPECT_EQ(out[3], 1e30f);
    EXPECT_EQ(out[5], 200.0f);
    EXPECT_EQ(out[6], 0.0f);
    EXPECT_EQ(out[7], 0.0f);
    if (activation == Activation::kIdentity) continue;
    EXPECT_EQ(out[2], 0.0f);
    EXPECT_EQ(out[4], 0.0f);
  }
}

TEST(Activation, WrongArguments) {
  ActivationShape shape{-1, 4, Activation::kSilu, true};
  EXPECT_EQ(
      config_error([&] { activation_forward(shape, DType::kFloat32, nullptr, nullptr, nullptr); }),
      "[activation_forward] num_rows=-1 is negative; choose 0 or more");
  shape = {1, 4, static_cast<Activation>(7), true};
  EXPECT_EQ(config_error([&] {
              activation_backward(shape, DType::kFloat32, nullptr, nullptr, nullptr, nullptr,
                                  nullptr, nullptr);
            }),
            "[activation_backward] activation=7 is unknown; choose 0 to 3");
}

}  // namespace
}  // namespace perseid::kernels::testing
