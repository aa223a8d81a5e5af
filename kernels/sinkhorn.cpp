// sinkhorn: an iteration walks over blocks of tokens twice, first for log d0 of each token and the
// largest logits[t, e] + log d0[t] of each expert, then for the sums over tokens. Reads T*E logits
// in each walk. Deterministic for any thread count: maxima do not depend on the order, sums are
// formed by block and added in the order of the blocks.
#include "kernels/sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/math.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kTokensPerBlock = 256;

void check(const SinkhornShape& shape, const SinkhornOptions& options, const void* logits,
           const double* log_d1) {
  constexpr const char* kOperation = "sinkhorn";
  require_count(kOperation, "num_tokens", shape.num_tokens);
  require(shape.num_experts >= 1, kOperation, "num_experts", shape.num_experts, "is below 1");
  require(options.max_iterations >= 1, kOperation, "max_iterations", options.max_iterations,
          "is below 1; 50 is usual");
  require(options.tolerance >= 0, kOperation, "tolerance", options.tolerance,
          "is not a number from 0 on; 1e-4 is usual");
  require_buffer(kOperation, "logits", logits, shape.num_tokens * shape.num_experts);
  require_buffer(kOperation, "log_d1", log_d1, shape.num_experts);
}

/// Mean |next - log_d1|; log_d1 becomes next.
double replace(const std::vector<double>& next, double* log_d1) {
  double change = 0;
  for (size_t e = 0; e < next.size(); ++e) {
    change += std::abs(next[e] - log_d1[e]);
    log_d1[e] = next[e];
  }
  return change / static_cast<double>(next.size());
}

// One token. Its logits are taken relative to the largest, which d0 makes up for: those that matter
// then keep their digits when they are summed with logarithms of other sizes.
template <typename T>
struct Row {
  const T* logits;
  T largest_logit;
  PERSEID_INLINE T operator[](int64_t e) const { return logits[e] - largest_logit; }
};

/// log of the sum over experts of e^(logit + log_d1). @param terms  [E] scratch
template <typename T>
PERSEID_SIMD_CLONES double log_row_sum(Row<T> row, const T* log_d1, int64_t E, T* terms) {
  T largest = row[0] + log_d1[0];
#pragma omp simd reduction(max : largest)
  for (int64_t e = 0; e < E; ++e) {
    terms[e] = row[e] + log_d1[e];
    largest = terms[e] > largest ? terms[e] : largest;
  }
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) terms[e] = exp_of(terms[e] - largest);
  double sum = 0;  // in order, so that its bits are those of any machine width
  for (int64_t e = 0; e < E; ++e) sum += static_cast<double>(terms[e]);
  return static_cast<double>(largest) + std::log(sum);
}

template <typename T>
PERSEID_SIMD_CLONES void raise_to(Row<T> row, T log_d0, int64_t E, T* largest) {
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) {
    const T value = row[e] + log_d0;
    largest[e] = value > largest[e] ? value : largest[e];
  }
}

template <typename T>
PERSEID_SIMD_CLONES void add_exp(Row<T> row, T log_d0, const T* largest, int64_t E, double* sums) {
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) {
    sums[e] += static_cast<double>(exp_of(row[e] + log_d0 - largest[e]));
  }
}

template <typename T>
class Balancer {
 public:
  Balancer(const SinkhornShape& shape, const T* logits)
      : shape_(shape),
        num_blocks_(ceil_div(shape.num_tokens, kTokensPerBlock)),
        logits_(logits),
        largest_logit_(static_cast<size_t>(shape.num_tokens)),
        log_d0_(largest_logit_.size()),
        largest_(static_cast<size_t>(num_blocks_ * shape.num_experts)),
        sums_(largest_.size()) {
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const T* const row = logits + t * shape.num_experts;
      largest_logit_[t] = *std::max_element(row, row + shape.num_experts);
    }
  }

  /// log d1 after one iteration from `log_d1`.
  std::vector<double> next(const double* log_d1) {
    const int64_t E = shape_.num_experts;
    const std::vector<T> narrow(log_d1, log_d1 + E);
    for_each_block([&](int64_t block) { rows(block, narrow.data()); });
    for (int64_t block = 1; block < num_blocks_; ++block) {
      for (int64_t e = 0; e < E; ++e) {
        largest_[e] = std::max(largest_[e], largest_[block * E + e]);
      }
    }
    for_each_block([&](int64_t block) { columns(block); });
    std::vector<double> result(static_cast<size_t>(E));
    for (int64_t e = 0; e < E; ++e) {
      double sum = 0;
      for (int64_t block = 0; block < num_blocks_; ++block) sum += sums_[block * E + e];
      result[e] =
          -std::log(static_cast<double>(E)) - static_cast<double>(largest_[e]) - std::log(sum);
    }
    return result;
  }

 private:
  template <typename Body>
  void for_each_block(const Body& body) {
    parallel_for(0, num_blocks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) body(block);
    });
  }
  Row<T> row_of(int64_t t) const { return {logits_ + t * shape_.num_experts, largest_logit_[t]}; }
  int64_t end_of(int64_t block) const {
    return std::min((block + 1) * kTokensPerBlock, shape_.num_tokens);
  }

  /// log d0 of the block's tokens and the largest terms of each expert.
  void rows(int64_t block, const T* log_d1) {
    const int64_t E = shape_.num_experts;
    const double log_tokens = std::log(static_cast<double>(shape_.num_tokens));
    T* const largest = largest_.data() + block * E;
    std::fill_n(largest, E, -std::numeric_limits<T>::infinity());
    std::vector<T> terms(static_cast<size_t>(E));
    for (int64_t t = block * kTokensPerBlock; t < end_of(block); ++t) {
      log_d0_[t] = static_cast<T>(-log_tokens - log_row_sum(row_of(t), log_d1, E, terms.data()));
      raise_to(row_of(t), log_d0_[t], E, largest);
    }
  }

  void columns(int64_t block) {
    const int64_t E = shape_.num_experts;
    double* const sums = sums_.data() + block * E;
    std::fill_n(sums, E, 0.0);
    for (int64_t t = block * kTokensPerBlock; t < end_of(block); ++t) {
      add_exp(row_of(t), log_d0_[t], largest_.data(), E, sums);
    }
  }

  SinkhornShape shape_;
  int64_t num_blocks_;
  const T* logits_;
  std::vector<T> largest_logit_, log_d0_;  // of each token
  std::vector<T> largest_;    // by block and expert; the first block's become those of all tokens
  std::vector<double> sums_;  // by block and expert
};

}  // namespace

int64_t sinkhorn(const SinkhornShape& shape, const SinkhornOptions& options, DType dtype,
                 const void* logits, double* log_d1, Stream stream) {
  check(shape, options, logits, log_d1);
  if (stream.device == Device::kCuda) {
    return cuda::sinkhorn(shape, options, dtype, logits, log_d1, stream);
  }
  std::fill_n(log_d1, shape.num_experts, 0.0);
  if (shape.num_tokens == 0) return 0;
  return dispatch_float_dtype(dtype, "sinkhorn", [&](auto tag) {
    using T = decltype(tag);
    Balancer<T> balancer(shape, static_cast<const T*>(logits));
    int64_t iteration = 0;
    double change = std::numeric_limits<double>::infinity();
    for (; iteration < options.max_iterations && change > options.tolerance; ++iteration) {
      change = replace(balancer.next(log_d1), log_d1);
    }
    return iteration;
  });
}

int64_t sinkhorn_reference(const SinkhornShape& shape, const SinkhornOptions& options, DType dtype,
                           const void* logits, double* log_d1) {
  check(shape, options, logits, log_d1);
  std::fill_n(log_d1, shape.num_experts, 0.0);
  const int64_t num_tokens = shape.num_tokens, E = shape.num_experts;
  if (num_tokens == 0) return 0;
  return dispatch_float_dtype(dtype, "sinkhorn", [&](auto tag) {
    using T = decltype(tag);
    const T* const z = static_cast<const T*>(logits);
    std::vector<double> log_d0(static_cast<size_t>(num_tokens));
    /// log of the sum of e^term(i), i < count.
    const auto log_sum_exp = [](int64_t count, const auto& term) {
      double largest = term(0), sum = 0;
      for (int64_t i = 1; i < count; ++i) largest = std::max<double>(largest, term(i));
      for (int64_t i = 0; i < count; ++i) sum += std::exp(term(i) - largest);
      return largest + std::log(sum);
    };
    int64_t iteration = 0;
    double change = std::numeric_limits<double>::infinity();
    for (; iteration < options.max_iterations && change > options.tolerance; ++iteration) {
      for (int64_t t = 0; t < num_tokens; ++t) {
        log_d0[t] = -std::log(static_cast<double>(num_tokens)) -
                    log_sum_exp(E, [&](int64_t e) { return double{z[t * E + e]} + log_d1[e]; });
      }
      std::vector<double> next(static_cast<size_t>(E));
      for (int64_t e = 0; e < E; ++e) {
        next[e] = -std::log(static_cast<double>(E)) - log_sum_exp(num_tokens, [&](int64_t t) {
          return double{z[t * E + e]} + log_d0[t];
        });
      }
      change = replace(next, log_d1);
    }
    return iteration;
  });
}

}  // namespace perseid::kernels
