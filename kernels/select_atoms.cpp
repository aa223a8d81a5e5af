// select_atoms: keys of 64 bits, the score's above the tie's, are unique, so the k-th of them is a
// limit that exactly k reach. Large cells: radix select, 11 bits a pass from the top, until few
// keys share the prefix; these are gathered and nth_element ends it. 2 passes for scores that
// differ, 4 for equal ones; then one that gathers and one that marks. Each pass reads the scores
// and the candidates' bits.
#include "kernels/select_atoms.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <vector>

#include "kernels/atom_key.h"
#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/mask_bits.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

constexpr int kDigitBits = 11;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;
constexpr int64_t kSmallCell = 4096;  // atoms that nth_element handles faster than histograms
constexpr int64_t kAtomsPerBlock = int64_t{1} << 16;  // a multiple of 64: no shared words
constexpr int kKeyBits = 64;

void check(const AtomCells& cells, const uint64_t* candidates, const int64_t* k,
           const uint64_t* selected) {
  constexpr const char* kOperation = "select_atoms";
  require_count(kOperation, "num_cells", cells.num_cells);
  require_count(kOperation, "atoms_per_cell", cells.atoms_per_cell);
  constexpr int64_t kLimit = int64_t{1} << 32;
  const bool fits = cells.num_cells == 0 || cells.atoms_per_cell <= (kLimit - 1) / cells.num_cells;
  if (!fits) {
    throw ConfigError(ErrorDetail{kOperation, "atoms",
                                  to_text(cells.num_cells) + "*" + to_text(cells.atoms_per_cell),
                                  "are not below 2^32, the number of ties; choose larger atoms"});
  }
  require_buffer(kOperation, "candidates", candidates, cells.num_atoms());
  require_buffer(kOperation, "k", k, cells.num_cells);
  require_buffer(kOperation, "selected", selected, cells.num_atoms());
}

void check_k(const AtomCells& cells, const int64_t* k) {
  for (int64_t c = 0; c < cells.num_cells; ++c) require_count("select_atoms", "k", k[c]);
}

bool is_set(const uint64_t* bits, int64_t atom) { return (bits[atom / 64] >> (atom % 64)) & 1; }

/// Keys of atoms; the largest ones are selected in either order.
struct Keys {
  const float* scores;
  AtomOrder order;
  RandomKey key;

  PERSEID_INLINE uint64_t operator()(int64_t atom) const {
    return atom_key(order, scores, key, atom, static_cast<uint32_t>(atom));
  }
};

void count_scores(const float* scores, const uint64_t* candidates, int64_t begin, int64_t end,
                  AtomCounts& counts) {
  counts.num_candidates += count_set(candidates, begin, end);
  if (scores == nullptr) return;
  for_each_set(candidates, begin, end, [&](int64_t atom) {
    counts.num_nan += std::isnan(scores[atom]) ? 1 : 0;
    counts.num_infinite += std::isinf(scores[atom]) ? 1 : 0;
  });
}

void add(AtomCounts& sum, const AtomCounts& more) {
  sum.num_selected += more.num_selected;
  sum.num_candidates += more.num_candidates;
  sum.num_nan += more.num_nan;
  sum.num_infinite += more.num_infinite;
}

/// body(begin, end) over ranges that start at whole words.
void for_blocks(int64_t num_atoms, const std::function<void(int64_t, int64_t)>& body) {
  parallel_for(0, ceil_div(num_atoms, kAtomsPerBlock), 1, [&](int64_t first, int64_t last) {
    body(first * kAtomsPerBlock, std::min(last * kAtomsPerBlock, num_atoms));
  });
}

/// The k-th largest key of the candidates in [0, num_atoms), 0 < k < their number.
uint64_t limit_of(const Keys& keys, const uint64_t* candidates, int64_t num_atoms,
                  int64_t num_candidates, int64_t k) {
  const int64_t few = std::max(kSmallCell, num_atoms / 16);
  uint64_t prefix = 0;
  int shift = kKeyBits;
  int64_t num_at_limit = num_candidates;
  const auto is_at_limit = [&](uint64_t key) {
    return shift == kKeyBits || key >> shift == prefix;
  };
  std::mutex mutex;
  while (num_at_limit > few && shift > 0) {
    const int next_shift = std::max(0, shift - kDigitBits);
    const uint64_t digit_mask = (uint64_t{1} << (shift - next_shift)) - 1;
    std::vector<int64_t> histogram(kDigits, 0);
    for_blocks(num_atoms, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> mine(kDigits, 0);
      for_each_set(candidates, begin, end, [&](int64_t atom) {
        const uint64_t key = keys(atom);
        if (is_at_limit(key)) ++mine[static_cast<size_t>((key >> next_shift) & digit_mask)];
      });
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t digit = 0; digit < mine.size(); ++digit) histogram[digit] += mine[digit];
    });
    size_t digit = static_cast<size_t>(digit_mask);
    while (histogram[digit] < k) k -= histogram[digit--];
    num_at_limit = histogram[digit];
    prefix = shift == kKeyBits ? digit : (prefix << (shift - next_shift)) | digit;
    shift = next_shift;
  }
  std::vector<uint64_t> at_limit;
  at_limit.reserve(static_cast<size_t>(num_at_limit));
  for_blocks(num_atoms, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> mine;
    for_each_set(candidates, begin, end, [&](int64_t atom) {
      const uint64_t key = keys(atom);
      if (is_at_limit(key)) mine.push_back(key);
    });
    const std::lock_guard<std::mutex> lock(mutex);
    at_limit.insert(at_limit.end(), mine.begin(), mine.end());
  });
  // The threads' order of arrival does not matter: the k-th key of a set is one number.
  std::nth_element(at_limit.begin(), at_limit.begin() + (k - 1), at_limit.end(),
                   std::greater<uint64_t>());
  return at_limit[static_cast<size_t>(k - 1)];
}

AtomCounts select_in_one(const Keys& keys, const uint64_t* candidates, int64_t num_atoms, int64_t k,
                         uint64_t* selected) {
  AtomCounts counts;
  std::mutex mutex;
  for_blocks(num_atoms, [&](int64_t begin, int64_t end) {
    AtomCounts mine;
    count_scores(keys.scores, candidates, begin, end, mine);
    const std::lock_guard<std::mutex> lock(mutex);
    add(counts, mine);
  });
  counts.num_selected = std::min(k, counts.num_candidates);
  const bool takes_all = counts.num_selected == counts.num_candidates;
  const uint64_t limit =
      counts.num_selected == 0 || takes_all
          ? 0
          : limit_of(keys, candidates, num_atoms, counts.num_candidates, counts.num_selected);
  for_blocks(num_atoms, [&](int64_t begin, int64_t end) {
    std::fill(selected + begin / 64, selected + num_mask_words(end), uint64_t{0});
    if (counts.num_selected == 0) return;
    for_each_set(candidates, begin, end, [&](int64_t atom) {
      if (keys(atom) >= limit) selected[atom / 64] |= uint64_t{1} << (atom % 64);
    });
  });
  return counts;
}

/// Cells [first, last), whose words no other thread touches.
AtomCounts select_in_cells(const Keys& keys, const AtomCells& cells, const uint64_t* candidates,
                           const int64_t* k, int64_t first, int64_t last, uint64_t* selected) {
  const int64_t size = cells.atoms_per_cell;
  AtomCounts counts;
  std::vector<uint64_t> of_cell;
  std::fill(selected + first * size / 64, selected + num_mask_words(last * size), uint64_t{0});
  for (int64_t c = first; c < last; ++c) {
    const int64_t begin = c * size, end = begin + size;
    AtomCounts mine;
    count_scores(keys.scores, candidates, begin, end, mine);
    mine.num_selected = std::min(k[c], mine.num_candidates);
    add(counts, mine);
    if (mine.num_selected == 0) continue;
    of_cell.clear();
    for_each_set(candidates, begin, end, [&](int64_t atom) { of_cell.push_back(keys(atom)); });
    const auto at_limit = of_cell.begin() + (mine.num_selected - 1);
    std::nth_element(of_cell.begin(), at_limit, of_cell.end(), std::greater<uint64_t>());
    const uint64_t limit = *at_limit;
    for_each_set(candidates, begin, end, [&](int64_t atom) {
      if (keys(atom) >= limit) selected[atom / 64] |= uint64_t{1} << (atom % 64);
    });
  }
  return counts;
}

}  // namespace

AtomCounts select_atoms(const AtomCells& cells, AtomOrder order, const float* scores,
                        const uint64_t* candidates, const int64_t* k, RandomKey key,
                        uint64_t* selected, Stream stream) {
  check(cells, candidates, k, selected);
  if (stream.device == Device::kCuda) {
    return cuda::select_atoms(cells, order, scores, candidates, k, key, selected, stream);
  }
  check_k(cells, k);
  if (cells.num_atoms() == 0) return {};
  const Keys keys{scores, order, key};
  if (cells.num_cells == 1 && cells.atoms_per_cell > kSmallCell) {
    return select_in_one(keys, candidates, cells.atoms_per_cell, k[0], selected);
  }
  AtomCounts counts;
  std::mutex mutex;
  // 64 cells end at a whole word, whatever their size.
  const int64_t grain = std::max<int64_t>(1, kAtomsPerBlock / (64 * cells.atoms_per_cell));
  parallel_for(0, ceil_div(cells.num_cells, 64), grain, [&](int64_t first, int64_t last) {
    const AtomCounts mine = select_in_cells(keys, cells, candidates, k, first * 64,
                                            std::min(last * 64, cells.num_cells), selected);
    const std::lock_guard<std::mutex> lock(mutex);
    add(counts, mine);
  });
  return counts;
}

AtomCounts select_atoms_reference(const AtomCells& cells, AtomOrder order, const float* scores,
                                  const uint64_t* candidates, const int64_t* k, RandomKey key,
                                  uint64_t* selected) {
  check(cells, candidates, k, selected);
  check_k(cells, k);
  AtomCounts counts;
  std::fill(selected, selected + num_mask_words(cells.num_atoms()), uint64_t{0});
  for (int64_t c = 0; c < cells.num_cells; ++c) {
    std::vector<int64_t> atoms;
    for (int64_t a = c * cells.atoms_per_cell; a < (c + 1) * cells.atoms_per_cell; ++a) {
      if (!is_set(candidates, a)) continue;
      atoms.push_back(a);
      if (scores == nullptr) continue;
      counts.num_nan += std::isnan(scores[a]) ? 1 : 0;
      counts.num_infinite += std::isinf(scores[a]) ? 1 : 0;
    }
    counts.num_candidates += static_cast<int64_t>(atoms.size());
    std::sort(atoms.begin(), atoms.end(), [&](int64_t a, int64_t b) {
      if (scores != nullptr) {
        const bool a_is_nan = std::isnan(scores[a]), b_is_nan = std::isnan(scores[b]);
        if (a_is_nan != b_is_nan) return b_is_nan;
        if (!a_is_nan && scores[a] != scores[b]) {
          return order == AtomOrder::kLargest ? scores[a] > scores[b] : scores[a] < scores[b];
        }
      }
      return tie_bits(key, static_cast<uint32_t>(a)) > tie_bits(key, static_cast<uint32_t>(b));
    });
    const int64_t num_selected = std::min(k[c], static_cast<int64_t>(atoms.size()));
    counts.num_selected += num_selected;
    for (int64_t i = 0; i < num_selected; ++i) {
      const int64_t a = atoms[static_cast<size_t>(i)];
      selected[a / 64] |= uint64_t{1} << (a % 64);
    }
  }
  return counts;
}

void count_atoms(const AtomCells& cells, const uint64_t* bits, int64_t* counts, Stream stream) {
  constexpr const char* kOperation = "count_atoms";
  require_count(kOperation, "num_cells", cells.num_cells);
  require_count(kOperation, "atoms_per_cell", cells.atoms_per_cell);
  require_buffer(kOperation, "bits", bits, cells.num_atoms());
  require_buffer(kOperation, "counts", counts, cells.num_cells);
  require_device(stream, kOperation, "give it CPU memory");
  const int64_t grain =
      std::max<int64_t>(1, kAtomsPerBlock / std::max<int64_t>(1, cells.atoms_per_cell));
  parallel_for(0, cells.num_cells, grain, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      counts[c] = count_set(bits, c * cells.atoms_per_cell, (c + 1) * cells.atoms_per_cell);
    }
  });
}

}  // namespace perseid::kernels
