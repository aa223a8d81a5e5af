// All three are sums of small dense products C += A B of one tile of rows or of one block, by 6
// rows of C and one vector of its columns in registers; elements of A are broadcast, rows of B are
// read as vectors.
//   product            C rows of y [rows, block_rows],     A rows of x,        B the block, turned
//   transposed product C rows of grad_x [rows, block_cols], A rows of delta,   B the block
//   outer product      C the block,                         A columns of delta, B rows of x
// A task is a tile of rows and a block row or block column, whose blocks it takes in order, or for
// the outer product a block row. Reads the rows once for each block of theirs, out of the cache
// where they fit.
#include "kernels/block_product.h"

#include <algorithm>
#include <vector>

#include "kernels/checks.h"
#include "kernels/parallel.h"
#include "kernels/simd.h"
#include "kernels/vector64.h"

namespace perseid::kernels {
namespace {

constexpr int kTileRows = 6;
constexpr int64_t kRowsPerTask = 192;
constexpr const char* kOnCuda = "use LibTorch's dense products there, or give it CPU memory";

int64_t block_rows_of(const BlockWeights& weights) {
  return ceil_div(weights.out, weights.block_rows);
}
int64_t num_blocks_of(const BlockWeights& weights) {
  return weights.block_offsets[weights.num_experts * block_rows_of(weights)];
}
int64_t block_size(const BlockWeights& weights) { return weights.block_rows * weights.block_cols; }

void check(const char* operation, const BlockWeights& weights, bool needs_values,
           const int64_t* row_offsets, const void* of_out, const void* of_in) {
  require_count(operation, "num_experts", weights.num_experts);
  require_count(operation, "out", weights.out);
  require_count(operation, "in", weights.in);
  require(weights.block_rows >= 1, operation, "block_rows", weights.block_rows, "is below 1");
  require(weights.block_cols >= 1, operation, "block_cols", weights.block_cols, "is below 1");
  require_buffer(operation, "block_offsets", weights.block_offsets, 1);
  require_buffer(operation, "row_offsets", row_offsets, 1);
  const int64_t num_rows = row_offsets[weights.num_experts];
  require_buffer(operation, "block_columns", weights.block_columns, num_blocks_of(weights));
  if (needs_values) require_buffer(operation, "values", weights.values, num_blocks_of(weights));
  require_buffer(operation, "rows of out", of_out, num_rows * weights.out);
  require_buffer(operation, "rows of in", of_in, num_rows * weights.in);
}

// ---- C += A B -----------------------------------------------------------------------------------
template <typename T>
struct Operand {
  T* data;
  int64_t row, col;  ///< steps
};

template <int kRows, typename T>
PERSEID_INLINE void add_tile(const Operand<const T>& a, const T* b, int64_t b_row, int64_t depth,
                             T* c, int64_t c_row) {
  typename Vector64<T>::Type sums[kRows];
  for (int i = 0; i < kRows; ++i) load_vector(c + i * c_row, sums[i]);
  for (int64_t k = 0; k < depth; ++k) {
    typename Vector64<T>::Type row;
    load_vector(b + k * b_row, row);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) sums[i] += a.data[i * a.row + k * a.col] * row;
  }
  for (int i = 0; i < kRows; ++i) store_vector(sums[i], c + i * c_row);
}

/// C [rows, cols] += A [rows, depth] B [depth, cols]; rows of B and C are contiguous.
template <typename T>
PERSEID_INLINE void add_product(const Operand<const T>& a, const T* b, int64_t b_row, int64_t rows,
                                int64_t depth, int64_t cols, T* c, int64_t c_row) {
  constexpr int64_t kLanes = Vector64<T>::kLanes;
  const int64_t whole = cols / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
      add_tile<kTileRows>({a.data + i * a.row, a.row, a.col}, b + j, b_row, depth,
                          c + i * c_row + j, c_row);
    }
    for (; i < rows; ++i) {
      add_tile<1>({a.data + i * a.row, a.row, a.col}, b + j, b_row, depth, c + i * c_row + j,
                  c_row);
    }
  }
  if (whole == cols) return;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k) {
      const T scale = a.data[i * a.row + k * a.col];
      for (int64_t j = whole; j < cols; ++j) c[i * c_row + j] += scale * b[k * b_row + j];
    }
  }
}

// ---- tasks --------------------------------------------------------------------------------------
/// A range of rows of one expert.
struct RowTile {
  int64_t expert, begin, end;
};
std::vector<RowTile> row_tiles(const BlockWeights& weights, const int64_t* row_offsets) {
  std::vector<RowTile> tiles;
  for (int64_t e = 0; e < weights.num_experts; ++e) {
    for (int64_t r = row_offsets[e]; r < row_offsets[e + 1]; r += kRowsPerTask) {
      tiles.push_back({e, r, std::min(r + kRowsPerTask, row_offsets[e + 1])});
    }
  }
  return tiles;
}

/// Blocks of each expert by block column: the transposed list.
struct BlocksByColumn {
  std::vector<int64_t> offsets;  ///< [num_experts * block columns + 1]
  std::vector<int64_t> blocks;
  std::vector<int64_t> block_row;  ///< [num_blocks] of each block, by its number
};
BlocksByColumn by_column(const BlockWeights& weights) {
  const int64_t columns = ceil_div(weights.in, weights.block_cols);
  const int64_t rows = block_rows_of(weights);
  BlocksByColumn result;
  result.offsets.assign(static_cast<size_t>(weights.num_experts * columns + 1), 0);
  result.blocks.resize(static_cast<size_t>(num_blocks_of(weights)));
  result.block_row.resize(result.blocks.size());
  const auto list = [&](int64_t line, int64_t block) {
    return static_cast<size_t>(line / rows * columns + weights.block_columns[block]);
  };
  for (const bool is_counting : {true, false}) {
    for (int64_t line = 0; line < weights.num_experts * rows; ++line) {
      for (int64_t b = weights.block_offsets[line]; b < weights.block_offsets[line + 1]; ++b) {
        if (is_counting) {
          ++result.offsets[list(line, b) + 1];
          result.block_row[static_cast<size_t>(b)] = line % rows;
        } else {
          result.blocks[static_cast<size_t>(result.offsets[list(line, b)]++)] = b;
        }
      }
    }
    if (is_counting) {
      for (size_t i = 1; i < result.offsets.size(); ++i) {
        result.offsets[i] += result.offsets[i - 1];
      }
    }
  }
  // Each offset has moved to the end of its list: that is the begin of the next.
  result.offsets.insert(result.offsets.begin(), 0);
  result.offsets.pop_back();
  return result;
}

template <typename T>
PERSEID_SIMD_CLONES void forward_task(const BlockWeights& weights, const RowTile& tile,
                                      int64_t block_row, const T* x, T* y, T* turned) {
  const T* const values = static_cast<const T*>(weights.values);
  const int64_t bh = weights.block_rows, bw = weights.block_cols;
  const int64_t line = tile.expert * block_rows_of(weights) + block_row;
  const int64_t first = block_row * bh, height = std::min(bh, weights.out - first);
  T* const target = y + tile.begin * weights.out + first;
  const int64_t rows = tile.end - tile.begin;
  for (int64_t r = 0; r < rows; ++r) std::fill_n(target + r * weights.out, height, T{0});
  for (int64_t b = weights.block_offsets[line]; b < weights.block_offsets[line + 1]; ++b) {
    const int64_t column = int64_t{weights.block_columns[b]} * bw;
    const int64_t width = std::min(bw, weights.in - column);
    const T* const block = values + b * bh * bw;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) turned[j * bh + i] = block[i * bw + j];
    }
    add_product<T>({x + tile.begin * weights.in + column, weights.in, 1}, turned, bh, rows, width,
                   height, target, weights.out);
  }
}

template <typename T>
PERSEID_SIMD_CLONES void transposed_task(const BlockWeights& weights, const BlocksByColumn& lists,
                                         const RowTile& tile, int64_t block_column, const T* delta,
                                         T* grad_x) {
  const T* const values = static_cast<const T*>(weights.values);
  const int64_t bh = weights.block_rows, bw = weights.block_cols;
  const int64_t columns = ceil_div(weights.in, bw);
  const int64_t first = block_column * bw, width = std::min(bw, weights.in - first);
  T* const target = grad_x + tile.begin * weights.in + first;
  const int64_t rows = tile.end - tile.begin;
  for (int64_t r = 0; r < rows; ++r) std::fill_n(target + r * weights.in, width, T{0});
  const auto list = static_cast<size_t>(tile.expert * columns + block_column);
  for (int64_t i = lists.offsets[list]; i < lists.offsets[list + 1]; ++i) {
    const int64_t b = lists.blocks[static_cast<size_t>(i)];
    const int64_t row = lists.block_row[static_cast<size_t>(b)] * bh;
    add_product<T>({delta + tile.begin * weights.out + row, weights.out, 1}, values + b * bh * bw,
                   bw, rows, std::min(bh, weights.out - row), width, target, weights.in);
  }
}

template <typename T>
PERSEID_INLINE void copy_columns(const T* from, int64_t width, int64_t rows, int64_t cols, T* to,
                                 int64_t to_width) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * width, cols, to + r * to_width);
}

/// All blocks of a block row. Columns of delta and x are copied together first: their rows are far
/// apart, often by a power of two, which the cache does not like.
template <typename T>
PERSEID_SIMD_CLONES void outer_task(const BlockWeights& weights, int64_t line, int64_t begin,
                                    int64_t end, const T* delta, const T* x, T* grad_values,
                                    T* delta_columns, T* x_columns) {
  const int64_t bh = weights.block_rows, bw = weights.block_cols;
  const int64_t row = line % block_rows_of(weights) * bh;
  const int64_t height = std::min(bh, weights.out - row);
  const int64_t first = weights.block_offsets[line], last = weights.block_offsets[line + 1];
  std::fill(grad_values + first * bh * bw, grad_values + last * bh * bw, T{0});
  for (int64_t r = begin; first != last && r < end; r += kRowsPerTask) {
    const int64_t count = std::min(kRowsPerTask, end - r);
    copy_columns(delta + r * weights.out + row, weights.out, count, height, delta_columns, bh);
    for (int64_t b = first; b < last; ++b) {
      const int64_t column = int64_t{weights.block_columns[b]} * bw;
      const int64_t width = std::min(bw, weights.in - column);
      copy_columns(x + r * weights.in + column, weights.in, count, width, x_columns, bw);
      add_product<T>({delta_columns, 1, bh}, x_columns, bw, height, count, width,
                     grad_values + b * bh * bw, bw);
    }
  }
}

/// body(e, i, j, value index) for each element of each block.
template <typename Body>
void for_each_element(const BlockWeights& weights, Body&& body) {
  const int64_t rows = block_rows_of(weights);
  for (int64_t line = 0; line < weights.num_experts * rows; ++line) {
    for (int64_t b = weights.block_offsets[line]; b < weights.block_offsets[line + 1]; ++b) {
      for (int64_t k = 0; k < block_size(weights); ++k) {
        const int64_t i = line % rows * weights.block_rows + k / weights.block_cols;
        const int64_t j =
            int64_t{weights.block_columns[b]} * weights.block_cols + k % weights.block_cols;
        if (i < weights.out && j < weights.in) {
          body(line / rows, i, j, b * block_size(weights) + k);
        }
      }
    }
  }
}

/// target[r, to] += value * source[r, from] in double for the rows of each element's expert.
template <typename T, typename To, typename From>
void sum_rows(const BlockWeights& weights, const T* source, int64_t source_width,
              const int64_t* row_offsets, int64_t target_width, To&& to, From&& from, T* target) {
  std::vector<double> sums(static_cast<size_t>(row_offsets[weights.num_experts] * target_width), 0);
  for_each_element(weights, [&](int64_t e, int64_t i, int64_t j, int64_t k) {
    for (int64_t r = row_offsets[e]; r < row_offsets[e + 1]; ++r) {
      sums[static_cast<size_t>(r * target_width + to(i, j))] +=
          double{static_cast<const T*>(weights.values)[k]} *
          double{source[r * source_width + from(i, j)]};
    }
  });
  for (size_t k = 0; k < sums.size(); ++k) target[k] = static_cast<T>(sums[k]);
}

}  // namespace

void block_product(const BlockWeights& weights, const void* x, const int64_t* row_offsets,
                   DType dtype, void* y, Stream stream) {
  constexpr const char* kOperation = "block_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, weights, true, row_offsets, y, x);
  const std::vector<RowTile> tiles = row_tiles(weights, row_offsets);
  const int64_t lines = block_rows_of(weights);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    parallel_tasks(static_cast<int64_t>(tiles.size()) * lines, [&](int64_t task) {
      std::vector<T> turned(static_cast<size_t>(block_size(weights)));
      forward_task(weights, tiles[static_cast<size_t>(task / lines)], task % lines,
                   static_cast<const T*>(x), static_cast<T*>(y), turned.data());
    });
  });
}

void block_transposed_product(const BlockWeights& weights, const void* delta,
                              const int64_t* row_offsets, DType dtype, void* grad_x,
                              Stream stream) {
  constexpr const char* kOperation = "block_transposed_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, weights, true, row_offsets, delta, grad_x);
  const std::vector<RowTile> tiles = row_tiles(weights, row_offsets);
  const BlocksByColumn lists = by_column(weights);
  const int64_t columns = ceil_div(weights.in, weights.block_cols);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    parallel_tasks(static_cast<int64_t>(tiles.size()) * columns, [&](int64_t task) {
      transposed_task(weights, lists, tiles[static_cast<size_t>(task / columns)], task % columns,
                      static_cast<const T*>(delta), static_cast<T*>(grad_x));
    });
  });
}

void block_outer_product(const BlockWeights& weights, const void* delta, const void* x,
                         const int64_t* row_offsets, DType dtype, void* grad_values,
                         Stream stream) {
  constexpr const char* kOperation = "block_outer_product";
  require_device(stream, kOperation, kOnCuda);
  check(kOperation, weights, false, row_offsets, delta, x);
  require_buffer(kOperation, "grad_values", grad_values, num_blocks_of(weights));
  const int64_t rows = block_rows_of(weights);
  dispatch_float_dtype(dtype, kOperation, [&](auto tag) {
    using T = decltype(tag);
    parallel_tasks(weights.num_experts * rows, [&](int64_t line) {
      const int64_t e = line / rows;
      std::vector<T> delta_columns(static_cast<size_t>(kRowsPerTask * weights.block_rows));
      std::vector<T> x_columns(static_cast<size_t>(kRowsPerTask * weights.block_cols));
      outer_task(weights, line, row_offsets[e], row_offsets[e + 1], static_cast<const T*>(delta),
                 static_cast<const T*>(x), static_cast<T*>(grad_values), delta_columns.data(),
                 x_columns.data());
    });
  });
}

void block_product_reference(const BlockWeights& weights, const void* x, const int64_t* row_offsets,
                             DType dtype, void* y) {
  check("block_product", weights, true, row_offsets, y, x);
  dispatch_float_dtype(dtype, "block_product", [&](auto tag) {
    using T = decltype(tag);
    sum_rows(
        weights, static_cast<const T*>(x), weights.in, row_offsets, weights.out,
        [](int64_t i, int64_t) { return i; }, [](int64_t, int64_t j) { return j; },
        static_cast<T*>(y));
  });
}

void block_transposed_product_reference(const BlockWeights& weights, const void* delta,
                                        const int64_t* row_offsets, DType dtype, void* grad_x) {
  check("block_transposed_product", weights, true, row_offsets, delta, grad_x);
  dispatch_float_dtype(dtype, "block_transposed_product", [&](auto tag) {
    using T = decltype(tag);
    sum_rows(
        weights, static_cast<const T*>(delta), weights.out, row_offsets, weights.in,
        [](int64_t, int64_t j) { return j; }, [](int64_t i, int64_t) { return i; },
        static_cast<T*>(grad_x));
  });
}

void block_outer_product_reference(const BlockWeights& weights, const void* delta, const void* x,
                                   const int64_t* row_offsets, DType dtype, void* grad_values) {
  check("block_outer_product", weights, false, row_offsets, delta, x);
  dispatch_float_dtype(dtype, "block_outer_product", [&](auto tag) {
    using T = decltype(tag);
    std::fill_n(static_cast<T*>(grad_values), num_blocks_of(weights) * block_size(weights), T{0});
    for_each_element(weights, [&](int64_t e, int64_t i, int64_t j, int64_t k) {
      double sum = 0;
      for (int64_t r = row_offsets[e]; r < row_offsets[e + 1]; ++r) {
        sum += double{static_cast<const T*>(delta)[r * weights.out + i]} *
               double{static_cast<const T*>(x)[r * weights.in + j]};
      }
      static_cast<T*>(grad_values)[k] = static_cast<T>(sum);
    });
  });
}

}  // namespace perseid::kernels
