// gemm_bf16: tiles of 6 rows by 64 columns, 24 accumulators of 16 floats. b is packed into panels
// of 64 columns whose words hold the pair (k, k+1) of a column, the operand of vdpbf16ps; the pair
// of a is broadcast from where it lies. A transposed a is packed into words of pairs, too.
#include "kernels/gemm_bf16.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/error.h"

#if defined(__GNUC__) && defined(__x86_64__)
// GCC 12 takes the unset vectors inside its own intrinsics for ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <cpuid.h>
#include <immintrin.h>

#define PERSEID_BF16_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")))

namespace perseid::kernels {
namespace {

constexpr int64_t kPanel = 64;  // columns of a panel
constexpr int64_t kTileRows = 6;
constexpr int64_t kBlockPairs = 1024;  // pairs of k before sums are put aside: a panel stays in L2
constexpr int64_t kRowsAhead = 6;      // of a gathered operand that are asked for
constexpr int64_t kBlockRows = 192;    // rows of a that stay in L2 while panels pass

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- packing
// ------------------------------------------------------------------------------------- A word is
// the pair of elements (k, k+1) of one column; a missing second one is 0.

const BFloat16* row_at(const GemmOperand& x, int64_t row) {
  return x.data + (x.row_of ? x.row_of[row] : row) * x.stride;
}

/// Asks for columns [left, right) of `count` rows from `first` on of a gathered operand of
/// `num_rows`, whose order the hardware cannot foresee.
void prefetch_rows(const GemmOperand& x, int64_t first, int64_t count, int64_t num_rows,
                   int64_t left, int64_t right) {
  if (x.row_of == nullptr) return;
  for (int64_t row = first; row < std::min(num_rows, first + count); ++row) {
    const BFloat16* const start = row_at(x, row);
    for (int64_t i = left; i < right; i += 32) __builtin_prefetch(start + i);  // 32: a cache line
  }
}

/// words[c] = (first[c], second[c]) for `count` columns from rows in memory; second may be null.
PERSEID_BF16_TARGET inline void interleave(const BFloat16* first, const BFloat16* second,
                                           int64_t count, uint32_t* words) {
  // Element 2i of a result is element i of the first row (0..31), 2i+1 that of the second (32..63).
  alignas(64) static constexpr auto kOrder = [] {
    std::array<uint16_t, 64> order{};
    for (uint16_t i = 0; i < 32; ++i) {
      order[2 * i] = i;
      order[2 * i + 1] = static_cast<uint16_t>(32 + i);
    }
    return order;
  }();
  const __m512i low_half = _mm512_load_si512(kOrder.data());
  const __m512i high_half = _mm512_load_si512(kOrder.data() + 32);
  int64_t c = 0;
  if (second) {
    for (; c + 32 <= count; c += 32) {
      const __m512i x = _mm512_loadu_si512(first + c), y = _mm512_loadu_si512(second + c);
      _mm512_storeu_si512(words + c, _mm512_permutex2var_epi16(x, low_half, y));
      _mm512_storeu_si512(words + c + 16, _mm512_permutex2var_epi16(x, high_half, y));
    }
  }
  for (; c < count; c += 16) {
    const auto mask = static_cast<__mmask16>(count - c >= 16 ? 0xFFFF : (1u << (count - c)) - 1);
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + c));
    const __m512i y = second ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second + c))
                             : _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(words + c, mask, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
  }
}

/// A 16 x 16 transpose of words.
PERSEID_BF16_TARGET inline void transpose_words(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xDD);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xDD);
  }
}

/// Panels of b that is not transposed: panel p holds, pair by pair, the words of columns 64p...
PERSEID_BF16_TARGET void pack_rows(const GemmOperand& b, int64_t n, int64_t k, uint32_t* words) {
  const int64_t pairs = ceil_div(k, 2);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    prefetch_rows(b, 2 * pair + kRowsAhead, 2, k, 0, n);
    const BFloat16* first = row_at(b, 2 * pair);
    const BFloat16* second = 2 * pair + 1 < k ? row_at(b, 2 * pair + 1) : nullptr;
    for (int64_t column = 0; column < n; column += kPanel) {
      interleave(first + column, second ? second + column : nullptr, std::min(kPanel, n - column),
                 words + column * pairs + pair * kPanel);
    }
  }
}

/// The same of b that lies transposed, [N, K]: words are there already, but column by column.
PERSEID_BF16_TARGET void pack_columns(const GemmOperand& b, int64_t n, int64_t k, uint32_t* words) {
  const int64_t pairs = ceil_div(k, 2);
  for (int64_t column = 0; column < n; column += 16) {
    uint32_t* const panel = words + column / kPanel * kPanel * pairs + column % kPanel;
    const int64_t columns = std::min<int64_t>(16, n - column);
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      const int64_t elements = std::min<int64_t>(32, k - 2 * pair);
      const auto mask = static_cast<__mmask32>(elements == 32 ? ~0u : (1u << elements) - 1);
      __m512i r[16];
      for (int64_t c = 0; c < 16; ++c) {
        r[c] = c < columns ? _mm512_maskz_loadu_epi16(mask, row_at(b, column + c) + 2 * pair)
                           : _mm512_setzero_si512();
      }
      transpose_words(r);
      const int64_t count = std::min<int64_t>(16, pairs - pair);
      for (int64_t i = 0; i < count; ++i) {
        _mm512_storeu_si512(panel + (pair + i) * kPanel, r[i]);
      }
    }
  }
}

/// Room for a block of rows of a transposed a.
int64_t packed_a_words(int64_t m, int64_t pairs) {
  return ceil_div(std::min(m, kBlockRows) * pairs, 16) * 16;
}

/// Rows [top, bottom) of a that lies transposed, [K, M]: pair by pair, the words of these rows.
PERSEID_BF16_TARGET void pack_a(const GemmOperand& a, int64_t top, int64_t bottom, int64_t k,
                                uint32_t* words) {
  const int64_t rows = bottom - top;
  for (int64_t p = 0; 2 * p < k; ++p) {
    prefetch_rows(a, 2 * p + kRowsAhead, 2, k, top, bottom);
    interleave(row_at(a, 2 * p) + top, 2 * p + 1 < k ? row_at(a, 2 * p + 1) + top : nullptr, rows,
               words + p * rows);
  }
}

// ---- product
// -------------------------------------------------------------------------------------

/// Where the pairs of a lie: pair p of row i is the word at rows[i] + p * step.
struct PairRows {
  const char* rows[kTileRows];
  int64_t step;  ///< bytes
};

PERSEID_BF16_TARGET __attribute__((always_inline)) inline __m512bh broadcast(const char* word) {
  int32_t bits;
  std::memcpy(&bits, word, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}
PERSEID_BF16_TARGET __attribute__((always_inline)) inline __m512bh broadcast_one(
    const char* element) {
  uint16_t bits;
  std::memcpy(&bits, element, sizeof(bits));
  return (__m512bh)_mm512_set1_epi32(bits);
}

/// Sums of a tile over `pairs` pairs, and over one element of `a` more if `odd`. Sums start from
/// `partial` unless `first`, and go back there unless `last`, which rounds them into c.
template <int kRows, int kVectors>
PERSEID_BF16_TARGET void tile(const PairRows& a, const uint32_t* b, int64_t pairs, bool odd,
                              float* partial, bool first, bool last, BFloat16* c, int64_t c_stride,
                              __mmask16 last_mask) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(partial + i * kPanel + v * 16);
    }
  }
  int64_t at = 0;
  for (int64_t p = 0; p < pairs; ++p, at += a.step, b += kPanel) {
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(b + v * 16);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512bh pair = broadcast(a.rows[i] + at);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], pair, columns[v]);
      }
    }
  }
  if (odd) {
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512bh pair = broadcast_one(a.rows[i] + at);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], pair, (__m512bh)_mm512_loadu_si512(b + v * 16));
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (last) {
        const auto rounded = (__m256i)_mm512_cvtneps_pbh(sums[i][v]);
        const __mmask16 mask = v + 1 < kVectors ? __mmask16{0xFFFF} : last_mask;
        _mm256_mask_storeu_epi16(c + i * c_stride + v * 16, mask, rounded);
      } else {
        _mm512_storeu_ps(partial + i * kPanel + v * 16, sums[i][v]);
      }
    }
  }
}

using TileFunction = decltype(&tile<1, 1>);
template <int kRows>
constexpr TileFunction tiles_of(int vectors) {
  constexpr TileFunction all[] = {tile<kRows, 1>, tile<kRows, 2>, tile<kRows, 3>, tile<kRows, 4>};
  return all[vectors - 1];
}
TileFunction tile_function(int64_t rows, int64_t vectors) {
  constexpr decltype(&tiles_of<1>) all[] = {tiles_of<1>, tiles_of<2>, tiles_of<3>,
                                            tiles_of<4>, tiles_of<5>, tiles_of<6>};
  return all[rows - 1](static_cast<int>(vectors));
}

}  // namespace

bool has_gemm_bf16() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22));
    return !amx && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
  }();
  return has;
}

int64_t gemm_bf16_workspace(int64_t m, int64_t n, int64_t k, bool a_transposed) {
  const int64_t pairs = ceil_div(k, 2);
  const int64_t b_words = ceil_div(n, kPanel) * kPanel * pairs;
  const int64_t a_words = a_transposed ? packed_a_words(m, pairs) : 0;
  const int64_t partial = pairs > kBlockPairs ? kBlockRows * kPanel : 0;
  return 2 * (b_words + a_words + partial);
}

void gemm_bf16(int64_t m, int64_t n, int64_t k, const GemmOperand& a, const GemmOperand& b,
               BFloat16* c, int64_t c_stride, BFloat16* workspace) {
  const int64_t pairs = ceil_div(k, 2);
  auto* const b_words = reinterpret_cast<uint32_t*>(workspace);
  uint32_t* const a_words = b_words + ceil_div(n, kPanel) * kPanel * pairs;
  auto* const partial =
      reinterpret_cast<float*>(a_words + (a.transposed ? packed_a_words(m, pairs) : 0));
  if (b.transposed) {
    pack_columns(b, n, k, b_words);
  } else {
    pack_rows(b, n, k, b_words);
  }
  const bool odd = !a.transposed && k % 2 == 1;  // packed pairs are padded
  const int64_t whole_pairs = odd ? pairs - 1 : pairs;

  for (int64_t top = 0; top < m; top += kBlockRows) {
    const int64_t bottom = std::min(m, top + kBlockRows);
    if (a.transposed) pack_a(a, top, bottom, k, a_words);
    PairRows from{};
    from.step = (a.transposed ? bottom - top : int64_t{1}) * int64_t{sizeof(uint32_t)};
    const auto row_start = [&](int64_t row) {
      return a.transposed ? reinterpret_cast<const char*>(a_words + row - top)
                          : reinterpret_cast<const char*>(row_at(a, row));
    };
    for (int64_t column = 0; column < n; column += kPanel) {
      const int64_t columns = std::min(kPanel, n - column);
      const int64_t vectors = ceil_div(columns, 16);
      const auto mask = static_cast<__mmask16>((1u << (columns - 16 * (vectors - 1))) - 1);
      const uint32_t* const panel = b_words + column * pairs;
      int64_t begin = 0;
      do {  // once also for k = 0, which writes zeros
        const int64_t end = std::min(whole_pairs, begin + kBlockPairs);
        const bool last = end == whole_pairs;
        const TileFunction whole_tile = tile_function(kTileRows, vectors);
        for (int64_t row = top; row < bottom; row += kTileRows) {
          const int64_t rows = std::min(kTileRows, bottom - row);
          if (!a.transposed && column == 0 && begin == 0) {
            prefetch_rows(a, row + rows, kTileRows, bottom, 0, k);
          }
          for (int64_t i = 0; i < rows; ++i) {
            from.rows[i] = row_start(row + i) + begin * from.step;
          }
          const TileFunction run = rows == kTileRows ? whole_tile : tile_function(rows, vectors);
          run(from, panel + begin * kPanel, end - begin, last && odd,
              partial + (row - top) * kPanel, begin == 0, last, c + row * c_stride + column,
              c_stride, mask);
        }
        begin = end;
      } while (begin < whole_pairs);
    }
  }
}

}  // namespace perseid::kernels

#else

namespace perseid::kernels {
bool has_gemm_bf16() { return false; }
int64_t gemm_bf16_workspace(int64_t, int64_t, int64_t, bool) { return 0; }
void gemm_bf16(int64_t, int64_t, int64_t, const GemmOperand&, const GemmOperand&, BFloat16*,
               int64_t, BFloat16*) {
  throw InternalError({"gemm_bf16", "cpu", "without AVX512-BF16", "ask has_gemm_bf16 first"});
}
}  // namespace perseid::kernels

#endif

namespace perseid::kernels {

void gemm_bf16_reference(int64_t m, int64_t n, int64_t k, const GemmOperand& a,
                         const GemmOperand& b, BFloat16* c, int64_t c_stride) {
  const auto element = [](const GemmOperand& x, int64_t row, int64_t column) {
    if (x.transposed) std::swap(row, column);
    const int64_t at = x.row_of ? x.row_of[row] : row;
    return static_cast<double>(to_float(x.data[at * x.stride + column]));
  };
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += element(a, i, l) * element(b, l, j);
      c[i * c_stride + j] = to_bfloat16(static_cast<float>(sum));
    }
  }
}

}  // namespace perseid::kernels
