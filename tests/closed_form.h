#pragma once
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <sstream>
#include <vector>

#include "kernels/random.h"

// Test data with values that tell where they come from, and comparisons. A wrong permutation of
// such data cannot pass by luck. T is the largest number of tokens of a rank, so ranks may have
// fewer.

namespace perseid::testing {

/// Value of token `row` of rank `rank`: unique, exact in bfloat16 while it is at most 1.
inline double token_value(int64_t rank, int64_t row, int64_t T) {
  return static_cast<double>(rank * T + row + 1) / 256;
}

/// Weight of choice `choice` of a token: unique per (rank, token, choice), falls with the choice.
/// Exact in float32 while (rank + 1) * T * K < 2^24.
inline double assignment_weight(int64_t rank, int64_t row, int64_t choice, int64_t T, int64_t K) {
  return static_cast<double>((rank * T + row) * K + (K - choice)) / 256;
}

/// [num_tokens, D] tokens of a rank; every column of a row has the token's value.
inline at::Tensor closed_form_tokens(int64_t rank, int64_t num_tokens, int64_t D, int64_t T,
                                     at::ScalarType dtype = at::kFloat) {
  at::Tensor values = at::empty({num_tokens, 1}, at::kDouble);
  for (int64_t t = 0; t < num_tokens; ++t) {
    values.data_ptr<double>()[t] = token_value(rank, t, T);
  }
  return values.expand({num_tokens, D}).to(dtype).contiguous();
}

/// [num_tokens * K] weights of a rank that gives each token K experts.
inline at::Tensor closed_form_weights(int64_t rank, int64_t num_tokens, int64_t T, int64_t K,
                                      at::ScalarType dtype = at::kFloat) {
  at::Tensor weights = at::empty({num_tokens * K}, at::kDouble);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t k = 0; k < K; ++k) {
      weights.data_ptr<double>()[t * K + k] = assignment_weight(rank, t, k, T, K);
    }
  }
  return weights.to(dtype);
}

/// An output before it is written: what stays NaN was not written.
inline at::Tensor nan_filled(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  return at::full(sizes, std::numeric_limits<double>::quiet_NaN(), dtype);
}

/// Keyed uniform values in [low, high): equal on every platform, in any order of calls.
inline at::Tensor random_tensor(at::IntArrayRef sizes, uint64_t seed, double low = -1,
                                double high = 1, at::ScalarType dtype = at::kDouble) {
  at::Tensor values = at::empty(sizes, at::kDouble);
  const kernels::RandomKey key = kernels::random_key(seed);
  for (int64_t i = 0; i < values.numel(); ++i) {
    values.data_ptr<double>()[i] =
        low + (high - low) * kernels::random_uniform(key, static_cast<uint64_t>(i));
  }
  return values.to(dtype);
}

/// Same type, shape and bits: NaN equals itself, -0 differs from 0.
inline ::testing::AssertionResult same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.defined() != b.defined()) {
    return ::testing::AssertionFailure() << "one of the tensors is undefined";
  }
  if (!a.defined()) return ::testing::AssertionSuccess();
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) {
    return ::testing::AssertionFailure()
           << a.scalar_type() << a.sizes() << " against " << b.scalar_type() << b.sizes();
  }
  const at::Tensor x = a.detach().contiguous();
  const at::Tensor y = b.detach().contiguous();
  const auto size = static_cast<size_t>(x.element_size());
  const auto* p = static_cast<const char*>(x.const_data_ptr());
  const auto* q = static_cast<const char*>(y.const_data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) {
    const size_t offset = static_cast<size_t>(i) * size;
    if (std::memcmp(p + offset, q + offset, size) == 0) continue;
    return ::testing::AssertionFailure()
           << "element " << i << " of " << x.sizes() << ": " << x.reshape(-1)[i].item<double>()
           << " against " << y.reshape(-1)[i].item<double>();
  }
  return ::testing::AssertionSuccess();
}

/// max|a - b| <= tolerance * max|b|; the shapes must be equal, any NaN fails. `b` is the
/// expectation. Where b is zero everywhere a must be zero.
inline ::testing::AssertionResult close_to(const at::Tensor& a, const at::Tensor& b,
                                           double tolerance) {
  if (!a.defined() || !b.defined()) {
    return ::testing::AssertionFailure() << "a tensor is undefined";
  }
  if (a.sizes() != b.sizes()) {
    return ::testing::AssertionFailure() << a.sizes() << " against " << b.sizes();
  }
  if (a.numel() == 0) return ::testing::AssertionSuccess();
  const at::Tensor x = a.detach().to(at::kDouble).reshape(-1);
  const at::Tensor y = b.detach().to(at::kDouble).reshape(-1);
  const at::Tensor error = (x - y).abs();
  const int64_t i = error.argmax().item<int64_t>();  // NaN is the largest
  const double worst = error[i].item<double>();
  const double scale = y.abs().max().item<double>();
  if (worst <= tolerance * scale) return ::testing::AssertionSuccess();
  std::ostringstream text;
  text.precision(12);
  text << "error " << worst << " at element " << i << " of " << b.sizes() << ": "
       << x[i].item<double>() << " against " << y[i].item<double>() << ", allowed " << tolerance
       << " * " << scale;
  return ::testing::AssertionFailure() << text.str();
}

}  // namespace perseid::testing
