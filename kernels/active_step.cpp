// A block of positions is gathered into the first-level cache, where its entries lie side by side
// as their states do, and scattered afterwards: memory sees the mask, active entries and their
// states once. Products and sums are fused where LibTorch's vector code fuses them and nowhere
// else (this file is compiled without contraction). On CPUs with fused instructions that gives the
// bits of LibTorch's momentum and second moments, and of SGD's weights; Adam's differ by the
// rounding of a root, which LibTorch takes from MKL.
#include "kernels/active_step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/checks.h"
#include "kernels/mask_bits.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"

namespace perseid::kernels {
namespace {

constexpr int64_t kBlocksPerThread = 8;
constexpr int64_t kMaxAge = 65535;
constexpr const char* kOnCuda = "use an optimizer of LibTorch there, or give it CPU memory";

void check(const char* operation, const ActiveEntries& entries, const StepWeights& weights) {
  require_count(operation, "num_positions", entries.num_positions);
  require_buffer(operation, "is_active", entries.is_active, entries.num_positions);
  require_buffer(operation, "block_starts", entries.block_starts, 1);
  require_buffer(operation, "weight", weights.weight, entries.num_positions);
  require_buffer(operation, "grad", weights.grad, entries.num_positions);
}

int64_t num_active(const ActiveEntries& entries) {
  return entries.block_starts[num_active_blocks(entries.num_positions)];
}

/// The active entries of one block.
template <typename A>
struct Block {
  int64_t count = 0;
  int64_t first_state = 0;
  uint32_t offsets[kActiveBlock];  // from the block's first position
  A weight[kActiveBlock];
  A grad[kActiveBlock];
};

template <typename T, typename A>
PERSEID_INLINE void gather(const ActiveEntries& entries, int64_t index, const T* weight,
                           const T* grad, const A* master, Block<A>& block) {
  const int64_t begin = index * kActiveBlock;
  const int64_t end = std::min(begin + kActiveBlock, entries.num_positions);
  block.first_state = entries.block_starts[index];
  int64_t count = 0;
  for_each_set(entries.is_active, begin, end, [&](int64_t position) {
    block.offsets[count++] = static_cast<uint32_t>(position - begin);
  });
  block.count = count;
  for (int64_t i = 0; i < count; ++i) block.grad[i] = load(grad + begin + block.offsets[i]);
  if (master != nullptr) {
    std::copy_n(master + block.first_state, count, block.weight);
  } else {
    for (int64_t i = 0; i < count; ++i) block.weight[i] = load(weight + begin + block.offsets[i]);
  }
}

template <typename T, typename A>
PERSEID_INLINE void scatter(int64_t index, const Block<A>& block, T* weight, A* master) {
  T* const target = weight + index * kActiveBlock;
  if (master != nullptr) std::copy_n(block.weight, block.count, master + block.first_state);
  for (int64_t i = 0; i < block.count; ++i) store(target + block.offsets[i], block.weight[i]);
}

/// The gradient of weight_decay / 2 * weight^2 is added.
template <typename A>
PERSEID_INLINE void add_decay(Block<A>& block, double weight_decay) {
  const A decay = static_cast<A>(weight_decay);
#pragma omp simd
  for (int64_t i = 0; i < block.count; ++i) {
    block.grad[i] = std::fma(block.weight[i], decay, block.grad[i]);
  }
}

template <typename T, typename A>
PERSEID_SIMD_CLONES void sgd_blocks(const ActiveEntries& entries, const SgdStep& step, T* weight,
                                    const T* grad, A* master, A* buffer, int64_t first,
                                    int64_t last) {
  Block<A> block;
  const A momentum = static_cast<A>(step.momentum);
  const A undamped = static_cast<A>(1 - step.dampening);
  const A scale = static_cast<A>(-1 * step.lr);
  for (int64_t index = first; index < last; ++index) {
    gather(entries, index, weight, grad, master, block);
    if (step.weight_decay != 0) add_decay(block, step.weight_decay);
    A* const average = buffer == nullptr ? nullptr : buffer + block.first_state;
    if (average != nullptr && step.is_first) {
      std::copy_n(block.grad, block.count, average);
    } else if (average != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < block.count; ++i) {
        average[i] = std::fma(block.grad[i], undamped, average[i] * momentum);
      }
    }
    if (average != nullptr && step.nesterov) {
#pragma omp simd
      for (int64_t i = 0; i < block.count; ++i) {
        block.grad[i] = std::fma(average[i], momentum, block.grad[i]);
      }
    } else if (average != nullptr) {
      std::copy_n(average, block.count, block.grad);
    }
#pragma omp simd
    for (int64_t i = 0; i < block.count; ++i) {
      block.weight[i] = std::fma(block.grad[i], scale, block.weight[i]);
    }
    scatter(index, block, weight, master);
  }
}

void extend_table(double beta, int64_t last, std::vector<double>& table) {
  for (auto n = static_cast<int64_t>(table.size()); n <= last; ++n) {
    if (!table.empty() && table.back() == 1) break;
    table.push_back(1 - std::pow(beta, n));
  }
}

template <typename T, typename A>
PERSEID_SIMD_CLONES void adam_blocks(const ActiveEntries& entries, const AdamStep& step, T* weight,
                                     const T* grad, A* master, const AdamStates& states,
                                     int64_t first, int64_t last) {
  Block<A> block;
  A denominator[kActiveBlock];
  const A beta1 = static_cast<A>(step.beta1), rest1 = static_cast<A>(1 - step.beta1);
  const A beta2 = static_cast<A>(step.beta2), rest2 = static_cast<A>(1 - step.beta2);
  const A kept = static_cast<A>(1 - step.lr * step.weight_decay);
  const A eps = static_cast<A>(step.eps);
  const A root = static_cast<A>(std::sqrt(1 - std::pow(step.beta2, step.step)));
  const A scale = static_cast<A>(-(step.lr / (1 - std::pow(step.beta1, step.step))));
  const BiasCorrections* const by_age = states.by_age;
  const int64_t last_first = by_age ? static_cast<int64_t>(by_age->first.size()) - 1 : 0;
  const int64_t last_second = by_age ? static_cast<int64_t>(by_age->second.size()) - 1 : 0;
  for (int64_t index = first; index < last; ++index) {
    gather(entries, index, weight, grad, master, block);
    const int64_t count = block.count;
    if (step.weight_decay != 0 && step.is_decoupled) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) block.weight[i] *= kept;
    } else if (step.weight_decay != 0) {
      add_decay(block, step.weight_decay);
    }
    A* const m = static_cast<A*>(states.momentum) + block.first_state;
    A* const v = static_cast<A*>(states.second_moment) + block.first_state;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const A g = block.grad[i];
      m[i] = std::fma(g, rest1, m[i] * beta1);
      v[i] = std::fma(rest2 * g, g, v[i] * beta2);
      denominator[i] = v[i];
    }
    if (states.max_second_moment != nullptr) {
      A* const largest = static_cast<A*>(states.max_second_moment) + block.first_state;
      for (int64_t i = 0; i < count; ++i) {
        largest[i] = std::max(v[i], largest[i]);
        denominator[i] = largest[i];
      }
    }
    if (states.age == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A d = std::sqrt(denominator[i]) / root + eps;
        block.weight[i] += scale * m[i] / d;
      }
    } else {
      uint16_t* const age = states.age + block.first_state;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t own = std::min<int64_t>(int64_t{age[i]} + 1, kMaxAge);
        age[i] = static_cast<uint16_t>(own);
        const auto n1 = static_cast<size_t>(std::min(own, last_first));
        const auto n2 = static_cast<size_t>(std::min(own, last_second));
        const A own_root = static_cast<A>(std::sqrt(by_age->second[n2]));
        const A own_scale = static_cast<A>(-(step.lr / by_age->first[n1]));
        const A d = std::sqrt(denominator[i]) / own_root + eps;
        block.weight[i] += own_scale * m[i] / d;
      }
    }
    scatter(index, block, weight, master);
  }
}

/// body(position, s) for active entry number s.
template <typename Body>
void for_each_entry(const ActiveEntries& entries, Body&& body) {
  int64_t s = 0;
  for (int64_t p = 0; p < entries.num_positions; ++p) {
    if ((entries.is_active[p / 64] >> (p % 64) & 1) != 0) body(p, s++);
  }
}

template <typename Body>
void for_each_range(const ActiveEntries& entries, Body&& body) {
  parallel_for(0, num_active_blocks(entries.num_positions), kBlocksPerThread, body);
}

}  // namespace

void count_active_blocks(const uint64_t* is_active, int64_t num_positions, int64_t* block_starts) {
  constexpr const char* kOperation = "count_active_blocks";
  require_count(kOperation, "num_positions", num_positions);
  require_buffer(kOperation, "is_active", is_active, num_positions);
  require_buffer(kOperation, "block_starts", block_starts, 1);
  block_starts[0] = 0;
  for (int64_t b = 0; b < num_active_blocks(num_positions); ++b) {
    const int64_t begin = b * kActiveBlock;
    block_starts[b + 1] =
        block_starts[b] +
        count_set(is_active, begin, std::min(begin + kActiveBlock, num_positions));
  }
}

void BiasCorrections::extend(const AdamStep& step) {
  if (step.beta1 != beta1_ || step.beta2 != beta2_) *this = {};
  beta1_ = step.beta1;
  beta2_ = step.beta2;
  const int64_t last = std::min(step.step, kMaxAge);
  extend_table(step.beta1, last, first);
  extend_table(step.beta2, last, second);
}

void sgd_active_step(const ActiveEntries& entries, const SgdStep& step, const StepWeights& weights,
                     void* buffer, Stream stream) {
  constexpr const char* kOperation = "sgd_active_step";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, entries, weights);
  if (step.momentum != 0) require_buffer(kOperation, "buffer", buffer, num_active(entries));
  dispatch_dtype(weights.dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    A* const average = step.momentum != 0 ? static_cast<A*>(buffer) : nullptr;
    for_each_range(entries, [&](int64_t first, int64_t last) {
      sgd_blocks(entries, step, static_cast<T*>(weights.weight),
                 static_cast<const T*>(weights.grad), static_cast<A*>(weights.master), average,
                 first, last);
    });
  });
}

void adam_active_step(const ActiveEntries& entries, const AdamStep& step,
                      const StepWeights& weights, const AdamStates& states, Stream stream) {
  constexpr const char* kOperation = "adam_active_step";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, entries, weights);
  require(step.step >= 1, kOperation, "step", step.step, "is below 1");
  require_buffer(kOperation, "momentum", states.momentum, num_active(entries));
  require_buffer(kOperation, "second_moment", states.second_moment, num_active(entries));
  require(states.age == nullptr || states.by_age != nullptr, kOperation, "by_age", "null",
          "is missing; age needs it");
  dispatch_dtype(weights.dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    for_each_range(entries, [&](int64_t first, int64_t last) {
      adam_blocks(entries, step, static_cast<T*>(weights.weight),
                  static_cast<const T*>(weights.grad), static_cast<A*>(weights.master), states,
                  first, last);
    });
  });
}

void sgd_active_step_reference(const ActiveEntries& entries, const SgdStep& step,
                               const StepWeights& weights, void* buffer) {
  check("sgd_active_step", entries, weights);
  dispatch_dtype(weights.dtype, "sgd_active_step", [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    T* const weight = static_cast<T*>(weights.weight);
    A* const master = static_cast<A*>(weights.master);
    A* const average = static_cast<A*>(buffer);
    for_each_entry(entries, [&](int64_t p, int64_t s) {
      const double w = master != nullptr ? double{master[s]} : double{load(weight + p)};
      double g = double{load(static_cast<const T*>(weights.grad) + p)} + step.weight_decay * w;
      if (step.momentum != 0) {
        const double b =
            step.is_first ? g : step.momentum * double{average[s]} + (1 - step.dampening) * g;
        average[s] = static_cast<A>(b);
        g = step.nesterov ? g + step.momentum * b : b;
      }
      const A updated = static_cast<A>(w - step.lr * g);
      if (master != nullptr) master[s] = updated;
      store(weight + p, updated);
    });
  });
}

void adam_active_step_reference(const ActiveEntries& entries, const AdamStep& step,
                                const StepWeights& weights, const AdamStates& states) {
  check("adam_active_step", entries, weights);
  dispatch_dtype(weights.dtype, "adam_active_step", [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    T* const weight = static_cast<T*>(weights.weight);
    A* const master = static_cast<A*>(weights.master);
    A* const m = static_cast<A*>(states.momentum);
    A* const v = static_cast<A*>(states.second_moment);
    A* const largest = static_cast<A*>(states.max_second_moment);
    for_each_entry(entries, [&](int64_t p, int64_t s) {
      double w = master != nullptr ? double{master[s]} : double{load(weight + p)};
      double g = double{load(static_cast<const T*>(weights.grad) + p)};
      if (step.is_decoupled) {
        w -= step.lr * step.weight_decay * w;
      } else {
        g += step.weight_decay * w;
      }
      m[s] = static_cast<A>(step.beta1 * double{m[s]} + (1 - step.beta1) * g);
      v[s] = static_cast<A>(step.beta2 * double{v[s]} + (1 - step.beta2) * g * g);
      if (largest != nullptr) largest[s] = std::max(v[s], largest[s]);
      int64_t n = step.step;
      if (states.age != nullptr) {
        n = std::min<int64_t>(int64_t{states.age[s]} + 1, kMaxAge);
        states.age[s] = static_cast<uint16_t>(n);
      }
      const double mean = double{m[s]} / (1 - std::pow(step.beta1, n));
      const double square =
          double{(largest != nullptr ? largest : v)[s]} / (1 - std::pow(step.beta2, n));
      const A updated = static_cast<A>(w - step.lr * mean / (std::sqrt(square) + step.eps));
      if (master != nullptr) master[s] = updated;
      store(weight + p, updated);
    });
  });
}

}  // namespace perseid::kernels
