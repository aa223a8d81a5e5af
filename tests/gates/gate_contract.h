#pragma once
#include <ATen/Parallel.h>

#include <array>
#include <functional>
#include <memory>
#include <utility>

#include "kernels/parallel.h"
#include "tests/gates/gate_test.h"
#include "tests/gradcheck.h"

// What every gate promises, checked for one gate: tokens of width kWidth, E = 8.

namespace perseid::testing {

inline constexpr int64_t kWidth = 6;
using MakeGate = std::function<std::shared_ptr<gates::Gate>()>;

inline GateInput training_input(const Tensor& tokens, int64_t first_token = 0) {
  GateInput input = input_of(tokens);
  input.training = true;
  input.step = 3;
  input.first_token = first_token;
  return input;
}

/// Finished losses of an output that is the whole batch, in order of the kinds.
inline std::vector<Tensor> losses_of(const GateOutput& output) {
  std::vector<Tensor> values;
  for (const auto& loss : output.losses) values.push_back(loss.value);
  if (output.balance.score_sum.defined()) values.push_back(aux_loss(output).value);
  for (const auto& loss : output.global_losses) {
    values.push_back(gates::finish_global_loss(loss, loss.local_sum.detach().to(at::kDouble),
                                               output.stats.num_tokens, 1)
                         .value);
  }
  return values;
}

/// Local sums of all losses that add up over batches, with tokens_global given.
inline std::vector<Tensor> sums_of(const GateOutput& output) {
  std::vector<Tensor> values;
  for (const auto& loss : output.losses) values.push_back(loss.value);
  if (output.balance.score_sum.defined()) values.push_back(output.balance.score_sum);
  for (const auto& loss : output.global_losses) values.push_back(loss.local_sum);
  return values;
}

inline void expect_no_tokens(const MakeGate& make) {
  for (const bool is_masked : {false, true}) {
    const auto gate = make();
    const int64_t T = is_masked ? 5 : 0;
    GateInput input = training_input(at::full({T, kWidth}, NAN));
    if (is_masked) input.valid = at::zeros({T}, at::kBool);
    const GateOutput output = gate->forward(input);
    EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
    EXPECT_EQ(output.routing.num_assignments(), 0);
    EXPECT_EQ(output.routing.num_tokens, T);
    EXPECT_EQ(output.stats.num_tokens, 0);
    EXPECT_EQ(output.stats.tokens_without_expert, 0);
    EXPECT_EQ(output.stats.non_finite_tokens, 0);
    Tensor total = output.routing.weights.sum();
    for (const Tensor& loss : losses_of(output)) {
      EXPECT_EQ(loss.item<double>(), 0);
      total = total + loss;
    }
    total.backward();
    for (const Tensor& parameter : gate->parameters()) {
      if (!parameter.grad().defined()) continue;  // no path at all is as good as 0
      EXPECT_TRUE(same_bits(parameter.grad(), at::zeros_like(parameter)));
    }
  }
}

/// Rows that are not valid may hold NaN and change nothing.
inline void expect_masked_tokens_change_nothing(const MakeGate& make) {
  const Tensor valid = at::ones({37}, at::kBool);
  valid.slice(0, 30).fill_(false);
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2);
  Tensor padded = tokens.clone();
  padded.slice(0, 30).fill_(NAN);
  padded.set_requires_grad(true);
  const auto run = [&](const Tensor& given, bool is_masked) {
    const auto gate = make();
    gate->to(at::kDouble);
    GateInput input = training_input(given);
    if (is_masked) input.valid = valid;
    const GateOutput output = gate->forward(input);
    EXPECT_NO_THROW(gates::validate(output.routing, 8, "test"));
    EXPECT_EQ(output.stats.num_tokens, 30);
    EXPECT_EQ(output.stats.non_finite_tokens, 0);
    std::vector<Tensor> values = losses_of(output);
    values.push_back(gates::dense_weights(output.routing, 8).slice(0, 0, 30));
    Tensor total = values.back().square().sum();
    for (size_t i = 0; i + 1 < values.size(); ++i) total = total + values[i];
    total.backward();
    for (const Tensor& parameter : gate->parameters()) values.push_back(parameter.grad());
    values.push_back(output.stats.tokens_per_expert);
    return values;
  };
  const auto masked = run(padded, true), plain = run(tokens.slice(0, 0, 30), false);
  ASSERT_EQ(masked.size(), plain.size());
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_TRUE(close_to(masked[i], plain[i], 1e-12)) << i;
  EXPECT_TRUE(same_bits(padded.grad().slice(0, 30), at::zeros({7, kWidth}, at::kDouble)));
}

/// Random choices belong to the global token: two batches are their concatenation.
inline void expect_batches_add(const MakeGate& make, int64_t num_tokens = 37) {
  const auto gate = make();
  gate->to(at::kDouble);
  const Tensor tokens = random_tensor({num_tokens, kWidth}, 1, -2, 2);
  const auto run = [&](int64_t first, int64_t count) {
    GateInput input = training_input(tokens.narrow(0, first, count), first);
    input.tokens_global = num_tokens;
    return gate->forward(input);
  };
  const GateOutput a = run(0, 20), b = run(20, num_tokens - 20), whole = run(0, num_tokens);
  EXPECT_TRUE(
      close_to(at::cat({gates::dense_weights(a.routing, 8), gates::dense_weights(b.routing, 8)}),
               gates::dense_weights(whole.routing, 8), 1e-14));
  const auto sums_a = sums_of(a), sums_b = sums_of(b), sums = sums_of(whole);
  for (size_t i = 0; i < sums.size(); ++i) {
    EXPECT_TRUE(close_to(sums_a[i] + sums_b[i], sums[i], 1e-13)) << i;
  }
}

/// Evaluation is deterministic and free of noise; no forward changes a buffer or parameter.
inline void expect_pure(const MakeGate& make) {
  const auto gate = make();
  std::vector<Tensor> state;
  for (const auto& tensors : {gate->buffers(), gate->parameters()}) {
    for (const Tensor& tensor : tensors) state.push_back(tensor.detach().clone());
  }
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2, at::kFloat);
  for (const bool training : {false, true}) {
    GateInput input = training_input(tokens);
    input.training = training;
    const GateOutput first = gate->forward(input);
    const GateOutput again = gate->forward(input);
    EXPECT_TRUE(same_bits(first.routing.weights, again.routing.weights));
    EXPECT_TRUE(same_bits(first.routing.expert_idx, again.routing.expert_idx));
    if (training) continue;
    input.step = 9;
    EXPECT_TRUE(same_bits(gate->forward(input).routing.weights, first.routing.weights));
  }
  size_t i = 0;
  for (const auto& tensors : {gate->buffers(), gate->parameters()}) {
    for (const Tensor& tensor : tensors) EXPECT_TRUE(same_bits(tensor.detach(), state[i++]));
  }
}

inline void expect_float32_arithmetic(const MakeGate& make) {
  const Tensor tokens = random_tensor({37, kWidth}, 1, -2, 2, at::kBFloat16);
  const auto gate = make();
  const GateOutput output = gate->forward(training_input(tokens));
  EXPECT_EQ(output.routing.weights.scalar_type(), at::kFloat);
  EXPECT_TRUE(same_bits(output.routing.weights,
                        gate->forward(training_input(tokens.to(at::kFloat))).routing.weights));
  gate->to(at::kBFloat16);
  EXPECT_EQ(gate->forward(training_input(tokens)).routing.weights.scalar_type(), at::kFloat);
}

/// Rows sorted by weight, then id; statistics equal those counted.
inline void expect_valid_routing(const GateOutput& output) {
  gates::validate(output.routing, 8, "test");
  const Tensor offsets = gates::explicit_offsets(output.routing);
  const std::vector<int64_t> offset = ids_of(offsets), expert = ids_of(output.routing.expert_idx);
  const Tensor weights = output.routing.weights.detach().to(at::kDouble).contiguous();
  EXPECT_TRUE(weights.ge(0).all().item<bool>() && weights.isfinite().all().item<bool>());
  const double* weight = weights.const_data_ptr<double>();
  for (size_t t = 0; t + 1 < offset.size(); ++t) {
    for (int64_t a = offset[t] + 1; a < offset[t + 1]; ++a) {
      const auto i = static_cast<size_t>(a);
      EXPECT_TRUE(weight[i - 1] > weight[i] ||
                  (weight[i - 1] == weight[i] && expert[i - 1] < expert[i]));
    }
  }
  const auto counted = gates::count_assignments(output.routing, 8, output.stats.num_tokens);
  EXPECT_EQ(output.stats.num_assignments, counted.num_assignments);
  EXPECT_TRUE(same_bits(output.stats.tokens_per_expert, counted.tokens_per_expert));
  EXPECT_EQ(output.stats.tokens_without_expert, counted.tokens_without_expert);
}

/// Bits of weights, losses and gradients on 1, 2 and 3 threads.
inline void expect_same_bits_for_any_thread_count(const MakeGate& make) {
  const auto run = [&](int threads) {
    at::set_num_threads(threads);
    const auto gate = make();
    const Tensor tokens =
        random_tensor({2047, kWidth}, 1, -2, 2, at::kFloat).set_requires_grad(true);
    const GateOutput output = gate->forward(training_input(tokens));
    std::vector<Tensor> values = losses_of(output);
    Tensor total = output.routing.weights.square().sum(at::kDouble);
    for (const Tensor& loss : values) total = total + loss;
    total.backward();
    values.push_back(output.routing.weights);
    values.push_back(output.routing.expert_idx);
    values.push_back(tokens.grad());
    for (const Tensor& parameter : gate->parameters()) values.push_back(parameter.grad());
    return values;
  };
  const int threads_before = at::get_num_threads();
  kernels::set_parallel_for(
      [](int64_t begin, int64_t end, int64_t grain,
         const std::function<void(int64_t, int64_t)>& body) {
        at::parallel_for(begin, end, grain, body);
      },
      [] { return at::get_num_threads(); });
  const auto one = run(1);
  for (const int threads : {2, 3}) {
    const auto many = run(threads);
    for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(same_bits(many[i], one[i])) << i;
  }
  kernels::set_parallel_for({}, {});
  at::set_num_threads(threads_before);
}

/// All but the sum of batches.
inline void expect_contract_of_one_batch(const MakeGate& make) {
  expect_no_tokens(make);
  expect_masked_tokens_change_nothing(make);
  expect_pure(make);
  expect_float32_arithmetic(make);
  for (const bool training : {false, true}) {
    GateInput input = training_input(random_tensor({37, kWidth}, 4, -2, 2, at::kFloat));
    input.training = training;
    expect_valid_routing(make()->forward(input));
  }
  expect_same_bits_for_any_thread_count(make);
}

inline void expect_gate_contract(const MakeGate& make) {
  expect_contract_of_one_batch(make);
  expect_batches_add(make);
}

/// Of a gate that looks at groups of tokens. @param make  a gate of this group_size
inline void expect_group_gate_contract(
    const std::function<std::shared_ptr<gates::Gate>(int64_t)>& make) {
  expect_contract_of_one_batch([&] { return make(0); });
  for (const int64_t group_size : {1, 4, 20}) {
    expect_batches_add([&] { return make(group_size); }, 40);
  }
}

}  // namespace perseid::testing
