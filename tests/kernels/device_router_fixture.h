#pragma once
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/router_fixture.h"

namespace perseid::kernels::testing {

/// Inputs of a case in device memory.
template <typename T>
class DeviceRouterInput {
 public:
  DeviceRouterInput(const RouterCase<T>& at, const Stream& stream)
      : has_bias_(!at.bias.empty()),
        has_valid_(!at.valid.empty()),
        logits_(at.logits, stream),
        bias_(at.bias, stream),
        valid_(at.valid, stream) {}
  RouterInput get() {
    return {logits_.data(), has_bias_ ? bias_.data() : nullptr,
            has_valid_ ? valid_.data() : nullptr};
  }

 private:
  bool has_bias_, has_valid_;
  DeviceArray<T> logits_;
  DeviceArray<float> bias_;
  DeviceArray<uint8_t> valid_;
};

/// An empty `used` means all outputs; else used[i] says whether output i is asked for. The others
/// keep what they held: -9 or NaN.
template <typename T>
Routed<T> route_on_device(const RouterCase<T>& at, const Stream& stream,
                          const std::vector<bool>& used = {}) {
  const RouterShape& shape = at.shape;
  const int64_t choices = shape.num_tokens * shape.top_k;
  DeviceRouterInput<T> input(at, stream);
  DeviceArray<int32_t> expert_idx(std::vector<int32_t>(static_cast<size_t>(choices), -9), stream);
  DeviceArray<T> weights(nans<T>(choices), stream);
  DeviceArray<T> score_sum(nans<T>(shape.num_experts), stream);
  DeviceArray<T> lse_square_sum(nans<T>(1), stream);
  DeviceArray<int64_t> tokens_per_expert(
      std::vector<int64_t>(static_cast<size_t>(shape.num_experts), -9), stream);
  DeviceArray<int64_t> non_finite_tokens(std::vector<int64_t>{-9}, stream);
  DeviceArray<T> score_shares(nans<T>(shape.num_tokens * shape.num_experts), stream);
  DeviceArray<double> entropy_sum(nans<double>(1), stream);
  const auto is_used = [&](size_t i) { return used.empty() || used[i]; };
  RouterOutput output;
  if (is_used(0)) output.expert_idx = expert_idx.data();
  if (is_used(1)) output.weights = weights.data();
  if (is_used(2)) output.score_sum = score_sum.data();
  if (is_used(3)) output.lse_square_sum = lse_square_sum.data();
  if (is_used(4)) output.tokens_per_expert = tokens_per_expert.data();
  if (is_used(5)) output.non_finite_tokens = non_finite_tokens.data();
  if (is_used(6)) output.score_shares = score_shares.data();
  if (is_used(7)) output.entropy_sum = entropy_sum.data();
  route(shape, at.options, DTypeOf<T>::value, input.get(), output, stream);
  return {expert_idx.read(),     weights.read(),           score_sum.read(),
          lse_square_sum.read(), tokens_per_expert.read(), non_finite_tokens.read(),
          score_shares.read(),   entropy_sum.read()};
}

/// Gradients as values; empty: none.
template <typename T>
struct RouterGradients {
  std::vector<int32_t> expert_idx;
  std::vector<T> weights, score_sum, lse_square_sum, score_shares;

  RouterGradInput on_host() const {
    const auto data = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
    return {data(expert_idx), data(weights), data(score_sum), data(lse_square_sum),
            data(score_shares)};
  }
};

template <typename T>
std::vector<T> backward_on_device(const RouterCase<T>& at, const RouterGradients<T>& grads,
                                  const Stream& stream) {
  DeviceRouterInput<T> input(at, stream);
  DeviceArray<int32_t> expert_idx(grads.expert_idx, stream);
  DeviceArray<T> weights(grads.weights, stream), score_sum(grads.score_sum, stream);
  DeviceArray<T> lse(grads.lse_square_sum, stream), shares(grads.score_shares, stream);
  DeviceArray<T> result(nans<T>(at.shape.num_tokens * at.shape.num_experts), stream);
  const auto pick = [](const auto& values, auto& array) -> decltype(array.data()) {
    return values.empty() ? nullptr : array.data();
  };
  route_backward(at.shape, at.options, DTypeOf<T>::value, input.get(),
                 {pick(grads.expert_idx, expert_idx), pick(grads.weights, weights),
                  pick(grads.score_sum, score_sum), pick(grads.lse_square_sum, lse),
                  pick(grads.score_shares, shares)},
                 result.data(), stream);
  return result.read();
}

}  // namespace perseid::kernels::testing
