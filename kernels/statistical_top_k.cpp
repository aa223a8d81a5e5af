// statistical_top_k, statistical_top_k_backward: four passes over the E scores of a token, in
// cache. Reads T*E and writes T*E elements, the backward reads T*3E. Everything is relative to the
// largest score of the token, so equal scores have a std of exactly 0.
#include "kernels/statistical_top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"
#include "kernels/statistical_top_k_checks.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kTokensPerBlock = 64;
/// Fewer scores take less time than waking a thread.
constexpr int64_t kScoresPerThread = int64_t{1} << 14;

template <typename T>
struct Job {
  StatisticalTopKShape shape;
  StatisticalTopKOptions options;
  const T* scores;
  const uint8_t* valid;
  T quantile;
  T count;     ///< E
  T freedoms;  ///< nu

  bool is_valid(int64_t t) const { return valid == nullptr || valid[t] != 0; }
};

template <typename T>
Job<T> make_job(const StatisticalTopKShape& shape, const StatisticalTopKOptions& options,
                const void* scores, const uint8_t* valid) {
  const auto E = static_cast<double>(shape.num_experts);
  const double quantile = normal_upper_quantile(static_cast<double>(shape.top_k) / E);
  return {shape,
          options,
          static_cast<const T*>(scores),
          valid,
          static_cast<T>(quantile),
          static_cast<T>(E),
          static_cast<T>(options.unbiased ? E - 1 : E)};
}

/// Of the scores of one token.
template <typename T>
struct Statistics {
  T max;
  T mean;  ///< of z - max
  T std;
  T threshold;  ///< theta - max; no score is above it if it is not below 0
  bool is_finite;
};

template <typename T>
PERSEID_INLINE Statistics<T> read_scores(const Job<T>& job, const T* z) {
  constexpr T kMax = std::numeric_limits<T>::max();
  const int64_t E = job.shape.num_experts;
  T max = -kMax;
  int32_t non_finite = 0;
#pragma omp simd reduction(max : max) reduction(+ : non_finite)
  for (int64_t j = 0; j < E; ++j) {
    max = z[j] > max ? z[j] : max;
    non_finite += std::abs(z[j]) <= kMax ? 0 : 1;
  }
  if (non_finite > 0) return {max, 0, 0, 0, false};
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < E; ++j) sum += z[j] - max;
  const T mean = sum / job.count;
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < E; ++j) {
    const T difference = (z[j] - max) - mean;
    squares += difference * difference;
  }
  const T std = std::sqrt(squares / job.freedoms);
  return {max, mean, std, mean + job.quantile * std, true};
}

/// Zeros all but the `cap` largest weights, equal ones by smaller id.
template <typename T>
void keep_largest(T* weights, int64_t num_experts, int64_t cap, std::vector<int32_t>& order) {
  order.clear();
  for (int32_t j = 0; j < num_experts; ++j) {
    if (weights[j] > T{0}) order.push_back(j);
  }
  std::nth_element(order.begin(), order.begin() + cap, order.end(), [&](int32_t a, int32_t b) {
    return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
  });
  for (auto j = order.begin() + cap; j != order.end(); ++j) weights[*j] = T{0};
}

/// Returns the number of tokens that are not finite.
template <typename T>
PERSEID_SIMD_CLONES int64_t forward_block(const Job<T>& job, int64_t begin, int64_t end, T* weights,
                                          std::vector<int32_t>& order) {
  const int64_t E = job.shape.num_experts;
  int64_t non_finite = 0;
  for (int64_t t = begin; t < end; ++t) {
    const T* const z = job.scores + t * E;
    T* const g = weights + t * E;
    if (!job.is_valid(t)) {
      std::fill_n(g, E, T{0});
      continue;
    }
    const Statistics<T> of = read_scores(job, z);
    if (!of.is_finite) {
      ++non_finite;
      std::fill_n(g, E, T{0});
      std::fill_n(g, job.shape.top_k, std::numeric_limits<T>::quiet_NaN());
      continue;
    }
    int32_t num_positive = 0;
#pragma omp simd reduction(+ : num_positive)
    for (int64_t j = 0; j < E; ++j) {
      const T above = (z[j] - of.max) - of.threshold;
      g[j] = above > T{0} ? above : T{0};
      num_positive += above > T{0} ? 1 : 0;
    }
    if (num_positive == 0 && job.options.min_experts == 1) {
      g[std::find(z, z + E, of.max) - z] = std::max(-of.mean, std::numeric_limits<T>::min());
    }
    if (job.options.cap > 0 && num_positive > job.options.cap) {
      keep_largest(g, E, job.options.cap, order);
    }
  }
  return non_finite;
}

template <typename T>
PERSEID_SIMD_CLONES void backward_block(const Job<T>& job, int64_t begin, int64_t end,
                                        const T* weights, const T* grad_weights, T* grad_scores) {
  const int64_t E = job.shape.num_experts;
  for (int64_t t = begin; t < end; ++t) {
    const T* const z = job.scores + t * E;
    const T* const g = weights + t * E;
    const T* const rho = grad_weights + t * E;
    T* const grad = grad_scores + t * E;
    if (!job.is_valid(t)) {
      std::fill_n(grad, E, T{0});
      continue;
    }
    const Statistics<T> of = read_scores(job, z);
    if (!of.is_finite) {
      std::fill_n(grad, E, std::numeric_limits<T>::quiet_NaN());
      continue;
    }
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < E; ++j) {
      grad[j] = g[j] > T{0} ? rho[j] : T{0};
      sum += grad[j];
    }
    if (job.options.detach_threshold) continue;
    const bool has_std = of.threshold < T{0} && of.std > T{0};
    const T of_mean = sum / job.count;
    const T of_std = has_std ? sum * job.quantile / (job.freedoms * of.std) : T{0};
#pragma omp simd
    for (int64_t j = 0; j < E; ++j) grad[j] -= of_mean + of_std * ((z[j] - of.max) - of.mean);
  }
}

int64_t blocks_per_thread(const StatisticalTopKShape& shape) {
  return ceil_div(kScoresPerThread, kTokensPerBlock * shape.num_experts);
}

}  // namespace

double normal_upper_quantile(double share) {
  // Bisection in the upper tail, which keeps its relative accuracy, down to neighbouring numbers.
  const double tail = std::min(share, 1 - share);
  double low = 0, high = 40;
  for (double middle = 20; low < middle && middle < high; middle = low + (high - low) / 2) {
    (0.5 * std::erfc(middle * 0.70710678118654752440) > tail ? low : high) = middle;
  }
  return share > 0.5 ? -low : low;
}

void statistical_top_k(const StatisticalTopKShape& shape, const StatisticalTopKOptions& options,
                       DType dtype, const void* scores, const uint8_t* valid, void* weights,
                       int64_t* non_finite_tokens, Stream stream) {
  check_statistical_top_k(shape, options, scores, weights);
  if (stream.device == Device::kCuda) {
    return cuda::statistical_top_k(shape, options, dtype, scores, valid, weights, non_finite_tokens,
                                   stream);
  }
  const int64_t num_blocks = ceil_div(shape.num_tokens, kTokensPerBlock);
  std::vector<int64_t> non_finite(static_cast<size_t>(num_blocks));
  dispatch_float_dtype(dtype, "statistical_top_k", [&](auto tag) {
    using T = decltype(tag);
    const Job<T> job = make_job<T>(shape, options, scores, valid);
    parallel_for(0, num_blocks, blocks_per_thread(shape), [&](int64_t first, int64_t last) {
      std::vector<int32_t> order;
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * kTokensPerBlock;
        non_finite[static_cast<size_t>(block)] =
            forward_block(job, begin, std::min(begin + kTokensPerBlock, shape.num_tokens),
                          static_cast<T*>(weights), order);
      }
    });
  });
  if (non_finite_tokens == nullptr) return;
  *non_finite_tokens = 0;
  for (const int64_t count : non_finite) *non_finite_tokens += count;
}

void statistical_top_k_backward(const StatisticalTopKShape& shape,
                                const StatisticalTopKOptions& options, DType dtype,
                                const void* scores, const uint8_t* valid, const void* weights,
                                const void* grad_weights, void* grad_scores, Stream stream) {
  check_statistical_top_k_backward(shape, options, scores, weights, grad_weights, grad_scores);
  if (stream.device == Device::kCuda) {
    return cuda::statistical_top_k_backward(shape, options, dtype, scores, valid, weights,
                                            grad_weights, grad_scores, stream);
  }
  dispatch_float_dtype(dtype, "statistical_top_k_backward", [&](auto tag) {
    using T = decltype(tag);
    const Job<T> job = make_job<T>(shape, options, scores, valid);
    const int64_t grain = blocks_per_thread(shape) * kTokensPerBlock;
    parallel_for(0, shape.num_tokens, grain, [&](int64_t begin, int64_t end) {
      backward_block(job, begin, end, static_cast<const T*>(weights),
                     static_cast<const T*>(grad_weights), static_cast<T*>(grad_scores));
    });
  });
}

}  // namespace perseid::kernels
