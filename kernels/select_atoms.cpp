// select_atoms: keys of 64 bits, the score's above the tie's, are unique, so the k-th of them is a
// limit that exactly k reach. Large cells: histograms of 13 bits a pass from the top, of the scores
// and only where these are equal of the ties, until few keys share the prefix; one more pass marks
// what is above it and gathers what shares it, which nth_element parts. 2 passes for scores that
// differ or are missing, 5 for equal ones; each reads the scores and the candidates' bits.
#include "kernels/select_atoms.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <mutex>
#include <type_traits>
#include <vector>

#include "kernels/atom_key.h"
#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"
#include "kernels/mask_bits.h"
#include "kernels/parallel.h"

namespace perseid::kernels {
namespace {

constexpr int kDigitBits = 13;  // of a magnitude: its exponent and 5 bits below it
constexpr int64_t kDigits = int64_t{1} << kDigitBits;
constexpr int kKeyBits = 32;          // of a score, and of a tie
constexpr int64_t kSmallCell = 4096;  // atoms that nth_element handles faster than histograms
constexpr int64_t kAtomsPerBlock = int64_t{1} << 16;  // a multiple of 64: no shared words

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

constexpr uint32_t kInfinity = 0x7F800000u;  // bits of a float; those of NaN are above
constexpr uint32_t kSign = 0x80000000u;

/// Scores of all atoms.
struct AllScores {
  const float* scores;
  PERSEID_INLINE uint32_t operator()(int64_t atom) const {
    return std::bit_cast<uint32_t>(scores[atom]);
  }
};
/// Scores of the candidates alone, in their order.
struct ListedScores {
  const float* scores;
  const uint64_t* candidates;
  const int64_t* first_of_word;  ///< [words] candidates before each word
  PERSEID_INLINE uint32_t operator()(int64_t atom) const {
    const uint64_t before = candidates[atom / 64] & ((uint64_t{1} << (atom % 64)) - 1);
    return std::bit_cast<uint32_t>(scores[first_of_word[atom / 64] + std::popcount(before)]);
  }
};
/// All are equal.
struct NoScores {
  PERSEID_INLINE uint32_t operator()(int64_t) const { return 0; }
};

/// Keys of atoms; in every order the largest ones are selected.
template <typename Scores, AtomOrder kOrder>
struct Keys {
  static constexpr bool kHasScores = !std::is_same_v<Scores, NoScores>;
  Scores scores;
  RandomKey key;

  PERSEID_INLINE uint32_t of_bits(uint32_t bits) const { return score_key(kOrder, bits); }
  PERSEID_INLINE uint32_t score(int64_t atom) const {
    if constexpr (!kHasScores) return 0;
    return of_bits(scores(atom));
  }
  PERSEID_INLINE uint32_t tie(int64_t atom) const {
    return tie_bits(key, static_cast<uint32_t>(atom));
  }
};

/// A candidate whose place is settled last.
struct Entry {
  uint64_t key;
  uint32_t atom;
};
bool is_before(const Entry& a, const Entry& b) { return a.key > b.key; }

void add(AtomCounts& sum, const AtomCounts& more) {
  sum.num_selected += more.num_selected;
  sum.num_candidates += more.num_candidates;
  sum.num_nan += more.num_nan;
  sum.num_infinite += more.num_infinite;
}

template <typename K>
PERSEID_INLINE void count_odd(const K& keys, int64_t atom, AtomCounts& counts) {
  const uint32_t magnitude = keys.scores(atom) & 0x7FFFFFFFu;
  counts.num_nan += magnitude > kInfinity ? 1 : 0;
  counts.num_infinite += magnitude == kInfinity ? 1 : 0;
}

/// body(begin, end) over ranges that start at whole words.
void for_blocks(int64_t num_atoms, const std::function<void(int64_t, int64_t)>& body) {
  parallel_for(0, ceil_div(num_atoms, kAtomsPerBlock), 1, [&](int64_t first, int64_t last) {
    body(first * kAtomsPerBlock, std::min(last * kAtomsPerBlock, num_atoms));
  });
}

/// What is known of the limit: the top bits of its key of 32 bits.
struct Prefix {
  uint32_t bits = 0;
  int shift = kKeyBits;  ///< bits below them
  int64_t num_at = 0;    ///< keys that share them
  int64_t k = 0;         ///< how many of these are to be selected

  PERSEID_INLINE uint64_t of(uint32_t key) const { return uint64_t{key} >> shift; }
};

/// Ties of 64 atoms: all at once they cost a fraction of one by one.
PERSEID_INLINE void fill_ties(RandomKey key, int64_t first, uint32_t* ties) {
#pragma omp simd
  for (int i = 0; i < 64; ++i) ties[i] = tie_bits(key, static_cast<uint32_t>(first + i));
}

/// Adds to a histogram the next digit of the keys that share the prefix.
/// @param limit_score  kTies: keys are the ties of this score's atoms; else they are the scores
template <bool kTies, typename K>
PERSEID_SIMD_CLONES void count_digits(const K& keys, const uint64_t* candidates, int64_t begin,
                                      int64_t end, const Prefix& prefix, uint32_t limit_score,
                                      int next_shift, uint32_t* histogram) {
  const auto mask = static_cast<uint32_t>((uint64_t{1} << (prefix.shift - next_shift)) - 1);
  const auto count = [&](uint32_t key) {
    if (prefix.of(key) == prefix.bits) ++histogram[(key >> next_shift) & mask];
  };
  if constexpr (kTies && !K::kHasScores) {
    uint32_t ties[64];
    for (int64_t word = begin / 64; word * 64 < end; ++word) {
      uint64_t left = word_of_range(candidates, word, begin, end);
      if (left != 0) fill_ties(keys.key, word * 64, ties);
      for (; left != 0; left &= left - 1) count(ties[std::countr_zero(left)]);
    }
  } else {
    for_each_set(candidates, begin, end, [&](int64_t atom) {
      const uint32_t score = keys.score(atom);
      if (!kTies) count(score);
      if (kTies && score == limit_score) count(keys.tie(atom));
    });
  }
}

/// Lengthens the prefix until few keys share it, or to its end.
/// @return whether some score may be NaN or infinite
template <bool kTies, typename K>
bool refine(const K& keys, const uint64_t* candidates, int64_t num_atoms, int64_t few,
            uint32_t limit_score, Prefix& prefix) {
  std::mutex mutex;
  bool may_be_odd = true;
  while (prefix.num_at > few && prefix.shift > 0) {
    const int next_shift = std::max(0, prefix.shift - kDigitBits);
    std::vector<int64_t> histogram(kDigits, 0);
    for_blocks(num_atoms, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> mine(kDigits, 0);
      count_digits<kTies>(keys, candidates, begin, end, prefix, limit_score, next_shift,
                          mine.data());
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t digit = 0; digit < mine.size(); ++digit) histogram[digit] += mine[digit];
    });
    if (prefix.shift == kKeyBits) {
      may_be_odd = false;
      for (const uint32_t key : {0u, keys.of_bits(kInfinity), keys.of_bits(kSign | kInfinity)}) {
        may_be_odd = may_be_odd || histogram[key >> next_shift] > 0;
      }
    }
    const int num_bits = prefix.shift - next_shift;
    size_t digit = (size_t{1} << num_bits) - 1;
    while (histogram[digit] < prefix.k) prefix.k -= histogram[digit--];
    prefix.num_at = histogram[digit];
    prefix.bits = static_cast<uint32_t>((uint64_t{prefix.bits} << num_bits) | digit);
    prefix.shift = next_shift;
  }
  return may_be_odd;
}

/// Marks keys above the prefixes and gathers those that share both.
template <typename K>
PERSEID_SIMD_CLONES void mark_above(const K& keys, const uint64_t* candidates, int64_t begin,
                                    int64_t end, const Prefix& score, const Prefix& tie,
                                    uint64_t* selected, std::vector<Entry>& at_limit) {
  uint32_t ties[64];
  for (int64_t word = begin / 64; word * 64 < end; ++word) {
    uint64_t above = 0, left = word_of_range(candidates, word, begin, end);
    if (!K::kHasScores && left != 0) fill_ties(keys.key, word * 64, ties);
    for (; left != 0; left &= left - 1) {
      const int bit = std::countr_zero(left);
      const int64_t atom = word * 64 + bit;
      const uint32_t key = keys.score(atom);
      above |= uint64_t{score.of(key) > score.bits} << bit;
      if (score.of(key) != score.bits) continue;
      const uint32_t tie_key = K::kHasScores ? keys.tie(atom) : ties[bit];
      above |= uint64_t{tie.of(tie_key) > tie.bits} << bit;
      if (tie.of(tie_key) != tie.bits) continue;
      at_limit.push_back({(uint64_t{key} << 32) | tie_key, static_cast<uint32_t>(atom)});
    }
    selected[word] = above;
  }
}

/// Of all candidates: how many there are, and the odd ones among their scores.
template <typename K>
AtomCounts counts_of(const K& keys, const uint64_t* candidates, int64_t num_atoms, bool has_odd) {
  AtomCounts counts;
  counts.num_candidates = count_set(candidates, 0, num_atoms);
  if constexpr (K::kHasScores) {
    if (!has_odd) return counts;
    std::mutex mutex;
    for_blocks(num_atoms, [&](int64_t begin, int64_t end) {
      AtomCounts mine;
      for_each_set(candidates, begin, end, [&](int64_t atom) { count_odd(keys, atom, mine); });
      const std::lock_guard<std::mutex> lock(mutex);
      add(counts, mine);
    });
  }
  return counts;
}

template <typename K>
AtomCounts select_in_one(const K& keys, const uint64_t* candidates, int64_t num_atoms, int64_t k,
                         uint64_t* selected) {
  const int64_t num_candidates = count_set(candidates, 0, num_atoms);
  if (k == 0 || k >= num_candidates) {
    AtomCounts counts = counts_of(keys, candidates, num_atoms, true);
    counts.num_selected = std::min(k, num_candidates);
    const int64_t num_words = num_mask_words(num_atoms);
    if (k == 0) {
      std::fill(selected, selected + num_words, uint64_t{0});
    } else {
      std::copy(candidates, candidates + num_words, selected);
    }
    return counts;
  }
  const int64_t few = std::max(kSmallCell, num_atoms / 64);
  Prefix score{0, kKeyBits, num_candidates, k};
  bool may_be_odd = false;
  if constexpr (K::kHasScores) {
    may_be_odd = refine<false>(keys, candidates, num_atoms, few, 0, score);
  } else {
    score.shift = 0;
  }
  AtomCounts counts = counts_of(keys, candidates, num_atoms, may_be_odd);
  counts.num_selected = k;
  Prefix tie{0, kKeyBits, score.num_at, score.k};
  if (score.shift == 0) refine<true>(keys, candidates, num_atoms, few, score.bits, tie);
  std::vector<Entry> at_limit;
  at_limit.reserve(static_cast<size_t>(tie.num_at));
  std::mutex mutex;
  for_blocks(num_atoms, [&](int64_t begin, int64_t end) {
    std::vector<Entry> mine;
    mark_above(keys, candidates, begin, end, score, tie, selected, mine);
    const std::lock_guard<std::mutex> lock(mutex);
    at_limit.insert(at_limit.end(), mine.begin(), mine.end());
  });
  // The threads' order of arrival does not matter: the k largest of a set are one set.
  const auto last = at_limit.begin() + tie.k;
  if (last != at_limit.end()) std::nth_element(at_limit.begin(), last, at_limit.end(), is_before);
  std::for_each(at_limit.begin(), last, [&](const Entry& entry) {
    selected[entry.atom / 64] |= uint64_t{1} << (entry.atom % 64);
  });
  return counts;
}

/// Cells [first, last), whose words no other thread touches.
template <typename K>
AtomCounts select_in_cells(const K& keys, const AtomCells& cells, const uint64_t* candidates,
                           const int64_t* k, int64_t first, int64_t last, uint64_t* selected) {
  const int64_t size = cells.atoms_per_cell;
  AtomCounts counts;
  std::vector<Entry> of_cell;
  std::fill(selected + first * size / 64, selected + num_mask_words(last * size), uint64_t{0});
  for (int64_t c = first; c < last; ++c) {
    const int64_t begin = c * size, end = begin + size;
    AtomCounts mine;
    mine.num_candidates = count_set(candidates, begin, end);
    mine.num_selected = std::min(k[c], mine.num_candidates);
    of_cell.clear();
    const bool is_partial = mine.num_selected > 0 && mine.num_selected < mine.num_candidates;
    if (is_partial || K::kHasScores) {
      for_each_set(candidates, begin, end, [&](int64_t atom) {
        if constexpr (K::kHasScores) count_odd(keys, atom, mine);
        if (!is_partial) return;
        of_cell.push_back(
            {(uint64_t{keys.score(atom)} << 32) | keys.tie(atom), static_cast<uint32_t>(atom)});
      });
    }
    add(counts, mine);
    if (mine.num_selected == 0) continue;
    const auto mark = [&](int64_t atom) { selected[atom / 64] |= uint64_t{1} << (atom % 64); };
    if (!is_partial) {
      for_each_set(candidates, begin, end, mark);
      continue;
    }
    const auto end_of_selected = of_cell.begin() + mine.num_selected;
    std::nth_element(of_cell.begin(), end_of_selected, of_cell.end(), is_before);
    std::for_each(of_cell.begin(), end_of_selected,
                  [&](const Entry& entry) { mark(int64_t{entry.atom}); });
  }
  return counts;
}

template <typename K>
AtomCounts select_by(const K& keys, const AtomCells& cells, const uint64_t* candidates,
                     const int64_t* k, uint64_t* selected) {
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

template <typename Scores>
AtomCounts select_in_order(const Scores& scores, AtomOrder order, RandomKey key,
                           const AtomCells& cells, const uint64_t* candidates, const int64_t* k,
                           uint64_t* selected) {
  const auto run = [&](const auto& keys) {
    return select_by(keys, cells, candidates, k, selected);
  };
  switch (order) {
    case AtomOrder::kLargest:
      return run(Keys<Scores, AtomOrder::kLargest>{scores, key});
    case AtomOrder::kSmallest:
      return run(Keys<Scores, AtomOrder::kSmallest>{scores, key});
    case AtomOrder::kLargestMagnitude:
      return run(Keys<Scores, AtomOrder::kLargestMagnitude>{scores, key});
    case AtomOrder::kSmallestMagnitude:
      return run(Keys<Scores, AtomOrder::kSmallestMagnitude>{scores, key});
  }
  return {};
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
  if (scores == nullptr) {
    return select_by(Keys<NoScores, AtomOrder::kLargest>{{}, key}, cells, candidates, k, selected);
  }
  return select_in_order(AllScores{scores}, order, key, cells, candidates, k, selected);
}

AtomCounts select_listed_atoms(const AtomCells& cells, AtomOrder order, const float* scores,
                               const uint64_t* candidates, const int64_t* k, RandomKey key,
                               uint64_t* selected, Stream stream) {
  check(cells, candidates, k, selected);
  require_device(stream, "select_listed_atoms", "give it CPU memory");
  check_k(cells, k);
  if (cells.num_atoms() == 0) return {};
  std::vector<int64_t> first_of_word;
  int64_t count = 0;
  for (int64_t word = 0; word < num_mask_words(cells.num_atoms()); ++word) {
    first_of_word.push_back(count);
    count += std::popcount(candidates[word]);
  }
  require_buffer("select_listed_atoms", "scores", scores, count);
  return select_in_order(ListedScores{scores, candidates, first_of_word.data()}, order, key, cells,
                         candidates, k, selected);
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
    const bool has_sign = order == AtomOrder::kLargest || order == AtomOrder::kSmallest;
    const bool is_largest = order == AtomOrder::kLargest || order == AtomOrder::kLargestMagnitude;
    const auto value = [&](int64_t a) { return has_sign ? scores[a] : std::abs(scores[a]); };
    std::sort(atoms.begin(), atoms.end(), [&](int64_t a, int64_t b) {
      if (scores != nullptr) {
        const bool a_is_nan = std::isnan(scores[a]), b_is_nan = std::isnan(scores[b]);
        if (a_is_nan != b_is_nan) return b_is_nan;
        if (!a_is_nan && value(a) != value(b)) {
          return is_largest ? value(a) > value(b) : value(a) < value(b);
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
