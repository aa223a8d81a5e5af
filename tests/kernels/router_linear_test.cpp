// router_linear and its transpose against sums in double.
//   EqualsReference  forward and the three gradients, sizes around tiles and vectors, all types
//   SameBits         any number of threads
//   IsTranspose      <router_linear(x), y> == <x, backward(y)>, in float64
//   InvalidTokens    a NaN in a token that is not valid reaches no gradient of weight or bias
//   Types            types that do not go together are named
//   OnCuda           names LibTorch's product, which does it there
#include "kernels/router_linear.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T, typename A>
struct Case {
  RouterLinearShape shape;
  std::vector<T> tokens;
  std::vector<A> weight, bias, grad_logits;
  std::vector<uint8_t> valid;

  explicit Case(const RouterLinearShape& s) : shape(s) {
    tokens = normal_values<T>(s.num_tokens * s.d_model, 1);
    weight = normal_values<A>(s.num_experts * s.d_model, 2);
    bias = normal_values<A>(s.num_experts, 3);
    grad_logits = normal_values<A>(s.num_tokens * s.num_experts, 4);
    for (int64_t t = 0; t < s.num_tokens; ++t) valid.push_back(t % 3 != 1);
  }
};

template <typename T, typename A>
struct Result {
  std::vector<A> logits, grad_weight, grad_bias;
  std::vector<T> grad_tokens;
};

template <typename T, typename A>
Result<T, A> run(const Case<T, A>& c, bool reference, bool with_valid = true) {
  const auto [num_tokens, num_experts, d_model] = c.shape;
  constexpr DType kDType = DTypeOf<A>::value, kTokens = DTypeOf<T>::value;
  Result<T, A> r{nans<A>(num_tokens * num_experts), nans<A>(num_experts * d_model),
                 nans<A>(num_experts), nans<T>(num_tokens * d_model)};
  const uint8_t* valid = with_valid ? c.valid.data() : nullptr;
  if (reference) {
    router_linear_reference(c.shape, kDType, kTokens, c.tokens.data(), c.weight.data(),
                            c.bias.data(), r.logits.data());
    router_linear_backward_reference(c.shape, kDType, kTokens, c.tokens.data(), c.weight.data(),
                                     valid, c.grad_logits.data(), r.grad_tokens.data(),
                                     r.grad_weight.data(), r.grad_bias.data());
  } else {
    router_linear(c.shape, kDType, kTokens, c.tokens.data(), c.weight.data(), c.bias.data(),
                  r.logits.data());
    router_linear_backward(c.shape, kDType, kTokens, c.tokens.data(), c.weight.data(), valid,
                           c.grad_logits.data(), r.grad_tokens.data(), r.grad_weight.data(),
                           r.grad_bias.data());
  }
  return r;
}

const std::vector<RouterLinearShape> kShapes = {{0, 3, 5},    {1, 1, 1},      {7, 5, 13},
                                                {97, 8, 128}, {515, 17, 33},  {1100, 64, 65},
                                                {6, 100, 16}, {13, 100, 2000}};

template <typename T, typename A>
void expect_reference() {
  for (const RouterLinearShape& shape : kShapes) {
    const Case<T, A> c(shape);
    for (const bool with_valid : {false, true}) {
      const Result<T, A> r = run(c, false, with_valid), e = run(c, true, with_valid);
      const std::string what = std::to_string(shape.num_tokens) + " tokens";
      const double sums = std::is_same_v<A, double> ? 1e-13 : 2e-5;
      expect_close(r.logits, e.logits, sums, "logits of " + what);
      expect_close(r.grad_weight, e.grad_weight, sums, "grad_weight of " + what);
      expect_close(r.grad_bias, e.grad_bias, sums, "grad_bias of " + what);
      expect_close(r.grad_tokens, e.grad_tokens, std::max(sums, tolerance<T>()),
                   "grad_tokens of " + what);
    }
  }
}

TEST(RouterLinear, EqualsReference) {
  expect_reference<float, float>();
  expect_reference<double, double>();
  expect_reference<BFloat16, float>();
}

TEST(RouterLinear, SameBits) {
  const Case<BFloat16, float> c({1100, 20, 70});
  const Result<BFloat16, float> one = run(c, false);
  for (const int count : kThreadCounts) {
    const Threads threads(count);
    const Result<BFloat16, float> r = run(c, false);
    EXPECT_TRUE(same_bits(r.logits, one.logits) && same_bits(r.grad_tokens, one.grad_tokens) &&
                same_bits(r.grad_weight, one.grad_weight) && same_bits(r.grad_bias, one.grad_bias));
  }
}

TEST(RouterLinear, IsTranspose) {
  Case<double, double> c({31, 9, 21});
  std::fill(c.bias.begin(), c.bias.end(), 0.0);
  const Result<double, double> r = run(c, false, false);
  EXPECT_NEAR(dot(r.logits, c.grad_logits), dot(c.tokens, r.grad_tokens), 1e-11);
  EXPECT_NEAR(dot(r.logits, c.grad_logits), dot(c.weight, r.grad_weight), 1e-11);
}

TEST(RouterLinear, InvalidTokens) {
  Case<float, float> c({600, 8, 20});
  const Result<float, float> clean = run(c, false);
  for (int64_t t = 1; t < 600; t += 3) {
    c.tokens[static_cast<size_t>(t * 20 + 7)] = std::numeric_limits<float>::quiet_NaN();
  }
  const Result<float, float> r = run(c, false);
  EXPECT_TRUE(same_bits(r.grad_weight, clean.grad_weight));
  EXPECT_TRUE(same_bits(r.grad_bias, clean.grad_bias));
}

TEST(RouterLinear, Types) {
  const Case<float, float> c({1, 1, 1});
  EXPECT_EQ(config_error([&] {
              router_linear(c.shape, DType::kFloat64, DType::kBFloat16, nullptr, nullptr, nullptr,
                            nullptr);
            }),
            "[router_linear] tokens_dtype=bf16 does not go with logits in fp64");
}

TEST(RouterLinear, OnCuda) {
  const auto error = config_error([] {
    router_linear({1, 1, 1}, DType::kFloat32, DType::kFloat32, nullptr, nullptr, nullptr, nullptr,
                  {Device::kCuda});
  });
  EXPECT_NE(error.find("[router_linear] device=cuda has no kernel"), std::string::npos) << error;
  EXPECT_NE(error.find("LibTorch's matrix product"), std::string::npos) << error;
}

}  // namespace
}  // namespace perseid::kernels::testing
