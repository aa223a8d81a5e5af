// ragged_offsets, ragged_rows: each reads T*E weights, row by row; tokens are split over threads.
// Short rows are sorted by counting, for each pair, the pairs that come before it: n^2 comparisons
// without a branch, n / lanes of them at a time. The result does not depend on the threads.
#include "kernels/ragged.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/parallel.h"
#include "kernels/ragged_parts.h"

namespace perseid::kernels {
namespace {

/// Longer rows are sorted by comparison.
constexpr int64_t kCountedLengthMax = 128;
/// Fewer weights take less time than waking a thread.
constexpr int64_t kWeightsPerThread = int64_t{1} << 14;

void check(const char* operation, const RaggedShape& shape, const void* table,
           const int32_t* token_offsets) {
  require_count(operation, "num_tokens", shape.num_tokens);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require(shape.num_experts >= 1 && shape.num_experts <= kMax, operation, "num_experts",
          shape.num_experts, "is outside [1, 2147483647]");
  require_buffer(operation, "weights", table, shape.num_tokens * shape.num_experts);
  require_buffer(operation, "token_offsets", token_offsets, shape.num_tokens + 1);
}

int64_t tokens_per_thread(const RaggedShape& shape) {
  return ceil_div(kWeightsPerThread, shape.num_experts);
}

template <typename T>
PERSEID_SIMD_CLONES void count_rows(const T* weights, int64_t num_experts, int64_t begin,
                                    int64_t end, int32_t* lengths) {
  for (int64_t t = begin; t < end; ++t) {
    const T* const row = weights + t * num_experts;
    int32_t length = 0;
#pragma omp simd reduction(+ : length)
    for (int64_t e = 0; e < num_experts; ++e) length += is_kept(row[e]) ? 1 : 0;
    lengths[t] = length;
  }
}

/// Working memory of one thread for a row.
template <typename T>
struct RowScratch {
  explicit RowScratch(int64_t num_experts)
      : keys(static_cast<size_t>(num_experts)),
        experts(static_cast<size_t>(num_experts)),
        places(static_cast<size_t>(num_experts)) {}
  std::vector<SignedKey<T>> keys;
  std::vector<int32_t> experts;  ///< ascending
  std::vector<int32_t> places;   ///< place in the row of each kept expert
};

/// Kept experts of a row and their keys: 0 for a NaN, else above 0.
template <typename T>
PERSEID_INLINE int64_t read_kept(const T* row, int64_t num_experts, RowScratch<T>& scratch) {
  int64_t length = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    scratch.keys[length] = kept_key(row[e]);
    scratch.experts[length] = static_cast<int32_t>(e);
    length += is_kept(row[e]) ? 1 : 0;
  }
  return length;
}

/// A pair comes after those of larger weight and, at equal weight, of smaller id.
template <typename T>
PERSEID_INLINE void count_places(const SignedKey<T>* keys, int64_t length, int32_t* places) {
  for (int64_t i = 0; i < length; ++i) {
    const SignedKey<T> key = keys[i];
    SignedKey<T> place = 0;
#pragma omp simd reduction(+ : place)
    for (int64_t j = 0; j < i; ++j) place += keys[j] >= key ? 1 : 0;
#pragma omp simd reduction(+ : place)
    for (int64_t j = i + 1; j < length; ++j) place += keys[j] > key ? 1 : 0;
    places[i] = static_cast<int32_t>(place);
  }
}

template <typename T>
void sort_places(const SignedKey<T>* keys, int64_t length, int32_t* places) {
  std::vector<int32_t> order(static_cast<size_t>(length));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [keys](int32_t i, int32_t j) {
    return keys[i] > keys[j] || (keys[i] == keys[j] && i < j);
  });
  for (int64_t place = 0; place < length; ++place) {
    places[order[place]] = static_cast<int32_t>(place);
  }
}

template <typename T>
PERSEID_SIMD_CLONES void fill_rows(const T* weights, int64_t num_experts, int64_t begin,
                                   int64_t end, const int32_t* token_offsets,
                                   const RaggedOutput& output, RowScratch<T>& scratch) {
  auto* const values = static_cast<T*>(output.values);
  for (int64_t t = begin; t < end; ++t) {
    const T* const row = weights + t * num_experts;
    const int64_t length = read_kept(row, num_experts, scratch);
    if (length <= kCountedLengthMax) {
      count_places<T>(scratch.keys.data(), length, scratch.places.data());
    } else {
      sort_places<T>(scratch.keys.data(), length, scratch.places.data());
    }
    for (int64_t i = 0; i < length; ++i) {
      const int64_t a = token_offsets[t] + scratch.places[i];
      const int32_t e = scratch.experts[i];
      if (output.expert_idx != nullptr) output.expert_idx[a] = e;
      if (values != nullptr) values[a] = row[e];
      if (output.positions != nullptr) output.positions[a] = t * num_experts + e;
    }
  }
}

}  // namespace

void require_assignments(int64_t num_assignments) {
  require(num_assignments <= std::numeric_limits<int32_t>::max(), "routing", "num_assignments",
          num_assignments, "exceeds 2147483647; split the batch");
}

int64_t lengths_to_offsets(int32_t* token_offsets, int64_t num_tokens) {
  int64_t total = 0;
  token_offsets[0] = 0;
  for (int64_t t = 1; t <= num_tokens; ++t) {
    total += token_offsets[t];
    token_offsets[t] = static_cast<int32_t>(total);
  }
  require_assignments(total);
  return total;
}

int64_t ragged_offsets(const RaggedShape& shape, DType dtype, const void* weights,
                       int32_t* token_offsets, Stream stream) {
  constexpr const char* kOperation = "ragged_offsets";
  check(kOperation, shape, weights, token_offsets);
  if (stream.device == Device::kCuda) {
    return cuda::ragged_offsets(shape, dtype, weights, token_offsets, stream);
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    const auto* const table = static_cast<const decltype(tag)*>(weights);
    parallel_for(0, shape.num_tokens, tokens_per_thread(shape), [&](int64_t begin, int64_t end) {
      count_rows(table, shape.num_experts, begin, end, token_offsets + 1);
    });
  });
  return lengths_to_offsets(token_offsets, shape.num_tokens);
}

void ragged_rows(const RaggedShape& shape, DType dtype, const void* weights,
                 const int32_t* token_offsets, const RaggedOutput& output, Stream stream) {
  constexpr const char* kOperation = "ragged_rows";
  check(kOperation, shape, weights, token_offsets);
  if (stream.device == Device::kCuda) {
    return cuda::ragged_rows(shape, dtype, weights, token_offsets, output, stream);
  }
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const auto* const table = static_cast<const T*>(weights);
    parallel_for(0, shape.num_tokens, tokens_per_thread(shape), [&](int64_t begin, int64_t end) {
      RowScratch<T> scratch(shape.num_experts);
      fill_rows(table, shape.num_experts, begin, end, token_offsets, output, scratch);
    });
  });
}

void ragged_to_dense(const RaggedShape& shape, DType dtype, const int32_t* token_offsets,
                     const int32_t* expert_idx, const void* values, void* table, Stream stream) {
  constexpr const char* kOperation = "ragged_to_dense";
  check(kOperation, shape, table, token_offsets);
  if (stream.device == Device::kCuda) {
    return cuda::ragged_to_dense(shape, dtype, token_offsets, expert_idx, values, table, stream);
  }
  require_buffer(kOperation, "expert_idx", expert_idx, token_offsets[shape.num_tokens]);
  require_buffer(kOperation, "values", values, token_offsets[shape.num_tokens]);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    const auto* const source = static_cast<const T*>(values);
    parallel_for(0, shape.num_tokens, tokens_per_thread(shape), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        T* const row = static_cast<T*>(table) + t * shape.num_experts;
        std::fill_n(row, shape.num_experts, T{0});
        for (int64_t a = token_offsets[t]; a < token_offsets[t + 1]; ++a) {
          row[expert_idx[a]] = source[a];
        }
      }
    });
  });
}

int64_t ragged_offsets_reference(const RaggedShape& shape, DType dtype, const void* weights,
                                 int32_t* token_offsets) {
  check("ragged_offsets", shape, weights, token_offsets);
  dispatch_float_dtype(dtype, "ragged_offsets", [&](auto tag) {
    const auto* const table = static_cast<const decltype(tag)*>(weights);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      token_offsets[t + 1] = 0;
      for (int64_t e = 0; e < shape.num_experts; ++e) {
        const auto weight = table[t * shape.num_experts + e];
        if (weight > 0 || weight != weight) ++token_offsets[t + 1];
      }
    }
  });
  return lengths_to_offsets(token_offsets, shape.num_tokens);
}

void ragged_rows_reference(const RaggedShape& shape, DType dtype, const void* weights,
                           const int32_t* token_offsets, const RaggedOutput& output) {
  check("ragged_rows", shape, weights, token_offsets);
  dispatch_float_dtype(dtype, "ragged_rows", [&](auto tag) {
    using T = decltype(tag);
    const int64_t E = shape.num_experts;
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const T* const row = static_cast<const T*>(weights) + t * E;
      std::vector<int32_t> experts;
      for (int32_t e = 0; e < E; ++e) {
        if (row[e] > 0 || row[e] != row[e]) experts.push_back(e);
      }
      std::stable_sort(experts.begin(), experts.end(), [row](int32_t i, int32_t j) {
        const bool i_is_nan = row[i] != row[i], j_is_nan = row[j] != row[j];
        return i_is_nan || j_is_nan ? !i_is_nan && j_is_nan : row[i] > row[j];
      });
      for (size_t i = 0; i < experts.size(); ++i) {
        const int64_t a = token_offsets[t] + static_cast<int64_t>(i);
        if (output.expert_idx != nullptr) output.expert_idx[a] = experts[i];
        if (output.values != nullptr) static_cast<T*>(output.values)[a] = row[experts[i]];
        if (output.positions != nullptr) output.positions[a] = t * E + experts[i];
      }
    }
  });
}

}  // namespace perseid::kernels
