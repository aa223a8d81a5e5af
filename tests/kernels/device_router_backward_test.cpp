// route_backward on a device against route_backward_reference; the result held NaN before.
//   Terms       each gradient alone and all of them, each score function, normalised or not, masked
//   Sizes       E = 1 .. 1500, K = 1 .. E, T = 0, 1, 37
//   OneNormalizedChoice  has gradient 0, not one near it
//   NotNumbers  rows with NaN and infinities
//   NoExpert    choices of -1 and out of range give nothing
#include "tests/kernels/device_router_fixture.h"

namespace perseid::kernels::testing {
namespace {

constexpr unsigned kWeights = 1, kScoreSum = 2, kLse = 4, kShares = 8, kAll = 15;

template <typename T>
RouterGradients<T> gradients(const RouterCase<T>& at, unsigned terms) {
  const int64_t num_experts = at.shape.num_experts, num_tokens = at.shape.num_tokens;
  RouterGradients<T> grads;
  if ((terms & kWeights) != 0) {
    grads.expert_idx = at.route(true).expert_idx;
    grads.weights = normal_values<T>(num_tokens * at.shape.top_k, 21);
  }
  if ((terms & kScoreSum) != 0) grads.score_sum = normal_values<T>(num_experts, 22);
  if ((terms & kLse) != 0) grads.lse_square_sum = {T(0.7)};
  if ((terms & kShares) != 0) grads.score_shares = normal_values<T>(num_tokens * num_experts, 23);
  return grads;
}

class DeviceRouterBackward : public DeviceTest {
 protected:
  template <typename T>
  void compare(const RouterCase<T>& at, const RouterGradients<T>& grads) {
    const double relative = std::is_same_v<T, float> ? 4e-6 : 1e-12;
    const auto actual = backward_on_device(at, grads, stream());
    const auto expected = at.backward(grads.on_host(), true);
    ASSERT_EQ(actual.size(), expected.size());
    // Row by row, as rows may differ in size; the 1 behind each is the measure of what cancels.
    for (int64_t t = 0; t < at.shape.num_tokens; ++t) {
      const auto row = [&](const std::vector<T>& values) {
        const auto begin = values.begin() + t * at.shape.num_experts;
        std::vector<T> result(begin, begin + at.shape.num_experts);
        result.push_back(1);
        return result;
      };
      expect_close(row(actual), row(expected), relative, at.name() + " t=" + to_text(t));
    }
  }
  template <typename T>
  void compare_terms(RouterCase<T> at) {
    for (const auto score : kScoreFunctions) {
      for (const bool normalize : {true, false}) {
        at.options = {score, normalize, 2.5};
        for (const unsigned terms : {kWeights, kScoreSum, kLse, kShares, kAll, 0u}) {
          compare(at, gradients(at, terms));
        }
      }
    }
  }
};

template <typename T>
RouterCase<T> normal_case(int64_t num_tokens, int64_t num_experts, int64_t top_k) {
  RouterCase<T> at;
  at.shape = {num_tokens, num_experts, top_k};
  at.logits = normal_values<T>(num_tokens * num_experts, static_cast<uint32_t>(num_experts), 2.0);
  return at;
}

TEST_F(DeviceRouterBackward, Terms) {
  auto at = normal_case<float>(7, 40, 5);
  compare_terms(at);
  at.valid = {1, 0, 1, 1, 0, 1, 1};
  compare_terms(at);
  compare_terms(normal_case<double>(5, 70, 33));
}

TEST_F(DeviceRouterBackward, Sizes) {
  for (const int64_t num_experts : {1, 2, 5, 8, 16, 17, 64, 100, 256, 1000, 1024, 1500}) {
    for (const int64_t top_k : {int64_t{1}, int64_t{2}, int64_t{8}, int64_t{20}, num_experts}) {
      if (top_k > num_experts) continue;
      for (const int64_t num_tokens : {0, 1, 9}) {
        const auto at = normal_case<float>(num_tokens, num_experts, top_k);
        compare(at, gradients(at, kAll));
      }
    }
  }
  const auto at = normal_case<float>(37, 64, 8);
  compare(at, gradients(at, kAll));
}

TEST_F(DeviceRouterBackward, OneNormalizedChoiceHasNoGradient) {
  const auto expect_zeros = [&](auto at) {
    for (const auto score : kScoreFunctions) {
      at.options = {score, true, 2.5};
      for (const auto grad : backward_on_device(at, gradients(at, kWeights), stream())) {
        ASSERT_EQ(grad, 0) << at.name();
      }
    }
  };
  expect_zeros(normal_case<float>(37, 9, 1));
  expect_zeros(normal_case<double>(37, 9, 1));
}

TEST_F(DeviceRouterBackward, NotNumbers) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const std::vector<std::vector<double>> rows = {
      {nan, 1, 2, 0},          {1, 2, 0, nan},           {inf, 1, 2, 3},
      {inf, inf, 1, 0},        {-inf, 1, 2, 0},          {-inf, -inf, 1, 0.5},
      {-inf, -inf, -inf, 1},   {-inf, -inf, -inf, -inf}, {nan, -inf, inf, 1},
      {nan, nan, nan, nan},    {nan, -inf, -inf, -inf},  {inf, inf, inf, inf},
      {-200, -201, -250, -199}};
  const auto compare_rows = [&]<typename T>() {
    RouterCase<T> at;
    at.shape = {static_cast<int64_t>(rows.size()), 4, 2};
    for (const auto& row : rows) at.logits.insert(at.logits.end(), row.begin(), row.end());
    compare_terms(at);
    at.shape.top_k = 4;
    compare_terms(at);
  };
  compare_rows.template operator()<float>();
  compare_rows.template operator()<double>();
}

TEST_F(DeviceRouterBackward, NoExpert) {
  for (const bool normalize : {true, false}) {
    auto at = normal_case<float>(3, 10, 3);
    at.options.normalize = normalize;
    RouterGradients<float> grads = gradients(at, kWeights);
    grads.expert_idx = {-1, 2, 10, -1, -1, -1, 0, 1, 2};
    compare(at, grads);
  }
}

}  // namespace
}  // namespace perseid::kernels::testing
