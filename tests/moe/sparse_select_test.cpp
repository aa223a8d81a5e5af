// One selection over the units of all ranks.
//   Select      is select_atoms on all atoms of one process: ties that span ranks, replicas, no
//               scores, NaN, k of 0, all and more
//   SharedKeys  units whose atoms have ties in common, as beyond 2^32 atoms: exactly k all the same
//   Update      against a plain sort of all atoms: what goes first, the best that stay, limits,
//               idle units, all criteria; at 1, 2, 3 ranks
#include "moe/sparse_select.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <tuple>

#include "tests/moe/sparse_fixture.h"
#include "tests/moe/sparse_ranks_fixture.h"

namespace perseid::testing {
namespace {

using kernels::AtomOrder;
using kernels::random_key;
using kernels::RandomKey;

/// One unit of a selection, as every rank could know it.
struct Atoms {
  int64_t rows = 0, cols = 0;
  int64_t first_atom = 0;
  std::vector<float> scores;
  std::vector<float> other;  ///< for growth
  PackedMask mask;
  PackedMask ever_active;
  int64_t lowest = 0, highest = -1;
  bool is_skipped = false;
};

/// Few different scores, so that many are equal.
std::vector<float> coarse_scores(int64_t count, uint64_t seed, double scale = 2) {
  const at::Tensor values = (normal({count}, seed) * scale).round().abs().to(at::kFloat);
  return {values.const_data_ptr<float>(), values.const_data_ptr<float>() + count};
}

std::vector<Atoms> some_units(uint64_t seed, double scale = 2) {
  const std::vector<std::pair<int64_t, int64_t>> shapes = {{7, 11}, {1, 3},  {20, 40},
                                                           {9, 9},  {64, 1}, {30, 13}};
  std::vector<Atoms> units;
  int64_t first = 0;
  for (const auto& [rows, cols] : shapes) {
    Atoms unit;
    unit.rows = rows;
    unit.cols = cols;
    unit.first_atom = first;
    const uint64_t own = 100 * seed + static_cast<uint64_t>(first);
    unit.scores = coarse_scores(rows * cols, own, scale);
    unit.other = coarse_scores(rows * cols, own + 1, scale);
    const AtomLayout layout = make_layout(Structure::unstructured(), rows, cols, "w");
    unit.mask = random_mask(layout, rows * cols * 2 / 3, random_key(own + 2));
    unit.ever_active = unit.mask | random_mask(layout, rows * cols / 2, random_key(own + 3));
    first += rows * cols;
    units.push_back(std::move(unit));
  }
  return units;
}

/// Whether a rank holds a unit; unit 2 is held by all ranks, the others by one each, two by a pair.
std::vector<int> holders_of(size_t u, int num_ranks) {
  std::vector<int> ranks;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const bool is_held =
        u == 2 || static_cast<int>(u) % num_ranks == rank || (u == 3 && rank + 1 == num_ranks);
    if (is_held) ranks.push_back(rank);
  }
  return ranks;
}

/// The marked atoms by unit, the same on all holders.
std::vector<PackedMask> selected_by(int num_ranks, const std::vector<Atoms>& units, AtomOrder order,
                                    int64_t k, bool has_scores, int64_t* num_selected) {
  std::vector<PackedMask> result(units.size());
  std::mutex mutex;
  comm::run_local(num_ranks, [&](const comm::Group& world) {
    std::vector<SelectPart> parts;
    std::vector<size_t> places;
    for (size_t u = 0; u < units.size(); ++u) {
      const std::vector<int> holders = holders_of(u, num_ranks);
      if (std::find(holders.begin(), holders.end(), world.rank()) == holders.end()) continue;
      places.push_back(u);
      parts.push_back({static_cast<int64_t>(u), units[u].first_atom, holders[0] == world.rank(),
                       has_scores ? units[u].scores.data() : nullptr, &units[u].mask});
    }
    const PartSelection selection = select_over_ranks(parts, order, k, random_key(77),
                                                      static_cast<int64_t>(units.size()), world);
    const std::lock_guard lock(mutex);
    *num_selected = selection.num_selected;
    for (size_t i = 0; i < parts.size(); ++i) {
      PackedMask& mine = result[places[i]];
      if (mine.num_places() > 0) {
        EXPECT_EQ(mine, selection.masks[i]);
      }
      mine = selection.masks[i];
    }
  });
  return result;
}

TEST(SparseSelect, Select) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    std::vector<Atoms> units = some_units(seed, seed == 0 ? 0 : 0.5 * static_cast<double>(seed));
    if (seed == 5) {
      units[0].scores[3] = units[2].scores[7] = std::numeric_limits<float>::quiet_NaN();
      units[4].scores[2] = -0.0f;
    }
    // One after another, for select_atoms.
    int64_t num_atoms = 0;
    std::vector<float> scores;
    for (const Atoms& unit : units) {
      num_atoms += unit.rows * unit.cols;
      scores.insert(scores.end(), unit.scores.begin(), unit.scores.end());
    }
    PackedMask candidates(1, num_atoms);
    int64_t num_candidates = 0;
    for (const Atoms& unit : units) {
      for (int64_t a = 0; a < unit.mask.num_places(); ++a) {
        candidates.set(unit.first_atom + a, unit.mask.test(a));
      }
      num_candidates += unit.mask.count();
    }
    for (const AtomOrder order : {AtomOrder::kLargest, AtomOrder::kSmallest}) {
      for (const bool has_scores : {true, false}) {
        for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{137}, num_candidates / 2,
                                num_candidates - 1, num_candidates, num_candidates + 5}) {
          PackedMask wanted(1, num_atoms);
          kernels::select_atoms_reference({1, num_atoms}, order,
                                          has_scores ? scores.data() : nullptr, candidates.data(),
                                          &k, random_key(77), wanted.data());
          for (const int num_ranks : {1, 2, 4}) {
            int64_t num_selected = -1;
            const auto masks = selected_by(num_ranks, units, order, k, has_scores, &num_selected);
            EXPECT_EQ(num_selected, std::min(k, num_candidates));
            PackedMask all(1, num_atoms);
            for (size_t u = 0; u < units.size(); ++u) {
              for (int64_t a = 0; a < masks[u].num_places(); ++a) {
                all.set(units[u].first_atom + a, masks[u].test(a));
              }
            }
            ASSERT_EQ(all, wanted) << seed << " k=" << k << " P=" << num_ranks;
          }
        }
      }
    }
  }
}

TEST(SparseSelect, SharedKeys) {
  std::vector<Atoms> units = some_units(3, 0.3);
  // All six as if each began 2^32 atoms after the one before.
  for (size_t u = 0; u < units.size(); ++u) {
    units[u].first_atom = static_cast<int64_t>(u) << 32;
  }
  int64_t num_candidates = 0;
  for (const Atoms& unit : units) num_candidates += unit.mask.count();
  for (int64_t k = 1; k < num_candidates; k += 13) {
    std::vector<PackedMask> one;
    for (const int num_ranks : {1, 2, 4}) {
      int64_t num_selected = 0, count = 0;
      const auto masks =
          selected_by(num_ranks, units, AtomOrder::kLargest, k, k % 2 == 1, &num_selected);
      for (const PackedMask& mask : masks) count += mask.count();
      ASSERT_EQ(count, k);
      ASSERT_EQ(num_selected, k);
      if (num_ranks == 1) one = masks;
      ASSERT_EQ(masks, one);
    }
  }
}

/// Larger is better: score, then tie.
struct Ranked {
  float score;
  uint32_t tie;
  size_t unit;
  int64_t atom;
};

/// The update by sorting all atoms.
class PlainUpdate {
 public:
  PlainUpdate(const std::vector<Atoms>& units, const UpdateRule& rule, const UpdateOfAll& update)
      : units_(units), rule_(rule) {
    int64_t total = 0, changing = 0;
    std::vector<PackedMask> droppable;
    for (const Atoms& unit : units) {
      masks.push_back(unit.mask);
      total += unit.mask.count();
      if (!unit.is_skipped) changing += unit.mask.count();
      PackedMask may_go = unit.mask;
      const auto best = ranked({&unit - units.data()}, {unit.mask}, Source::kDrop,
                               AtomOrder::kLargest, update.drop_key);
      for (int64_t i = 0; i < std::min<int64_t>(unit.lowest, std::ssize(best)); ++i) {
        may_go.set(best[static_cast<size_t>(i)].atom, false);
      }
      droppable.push_back(may_go);
    }
    std::vector<PackedMask> dropped = empty();
    const auto drop = [&](int64_t count, bool skips) {
      auto list = ranked(all(), droppable, Source::kDrop, AtomOrder::kSmallest, update.drop_key);
      for (const Ranked& atom : list) {
        if (count <= 0) return;
        if (skips && units[atom.unit].is_skipped) continue;
        masks[atom.unit].set(atom.atom, false);
        droppable[atom.unit].set(atom.atom, false);
        dropped[atom.unit].set(atom.atom, true);
        --count;
      }
    };
    drop(total - update.target, false);
    if (rule.grow != GrowCriterion::kNone) {
      drop(static_cast<int64_t>(std::floor(update.fraction * static_cast<double>(changing))), true);
    }
    for (const PackedMask& mask : masks) need_ -= mask.count();
    need_ += update.target;
    std::vector<PackedMask> inactive, eligible;
    for (size_t u = 0; u < units.size(); ++u) {
      inactive.push_back(without(PackedMask::full(units[u].rows, units[u].cols), units[u].mask));
      PackedMask mine = rule.exclude_just_dropped ? inactive[u] : inactive[u] | dropped[u];
      if (units[u].is_skipped) mine = PackedMask(units[u].rows, units[u].cols);
      eligible.push_back(mine);
    }
    const auto chance =
        static_cast<int64_t>(std::floor(rule.random_share * static_cast<double>(need_)));
    const int64_t by_score = need_ - chance;
    if (rule.grow == GrowCriterion::kGrad) {
      std::vector<PackedMask> some = eligible;
      for (size_t u = 0; u < units.size(); ++u) {
        for (int64_t a = 0; a < some[u].num_places(); ++a) {
          if (units[u].other[static_cast<size_t>(a)] == 0) some[u].set(a, false);
        }
      }
      grow(by_score, some, Source::kGrow, AtomOrder::kLargest, update.grow_key);
    } else if (rule.grow == GrowCriterion::kUnfired) {
      std::vector<PackedMask> some = eligible;
      for (size_t u = 0; u < units.size(); ++u) some[u] = without(some[u], units[u].ever_active);
      const int64_t grown =
          grow(by_score, some, Source::kNone, AtomOrder::kLargest, update.grow_key);
      grow(by_score - grown, eligible, Source::kNone, AtomOrder::kLargest, update.grow_key);
    }
    if (rule.grow != GrowCriterion::kNone) {
      grow(rule.grow == GrowCriterion::kRandom ? need_ : chance, eligible, Source::kNone,
           AtomOrder::kLargest, update.random_key);
    }
    grow(need_, dropped, Source::kDrop, AtomOrder::kLargest, update.drop_key);
    grow(need_, eligible, Source::kNone, AtomOrder::kLargest, update.random_key);
    grow(need_, inactive, Source::kNone, AtomOrder::kLargest, update.random_key);
    EXPECT_EQ(need_, 0);
  }

  std::vector<PackedMask> masks;

 private:
  enum class Source { kDrop, kGrow, kNone };

  std::vector<std::ptrdiff_t> all() const {
    std::vector<std::ptrdiff_t> places(units_.size());
    std::iota(places.begin(), places.end(), 0);
    return places;
  }
  std::vector<PackedMask> empty() const {
    std::vector<PackedMask> result;
    for (const Atoms& unit : units_) result.emplace_back(unit.rows, unit.cols);
    return result;
  }
  std::vector<Ranked> ranked(const std::vector<std::ptrdiff_t>& places,
                             const std::vector<PackedMask>& candidates, Source source,
                             AtomOrder order, RandomKey key) const {
    std::vector<Ranked> list;
    for (size_t i = 0; i < places.size(); ++i) {
      const auto u = static_cast<size_t>(places[i]);
      for (int64_t a = 0; a < candidates[i].num_places(); ++a) {
        if (!candidates[i].test(a)) continue;
        const auto place = static_cast<size_t>(a);
        float score = source == Source::kDrop   ? units_[u].scores[place]
                      : source == Source::kGrow ? units_[u].other[place]
                                                : 0;
        if (order == AtomOrder::kSmallest) score = -score;
        const auto index = static_cast<uint32_t>(units_[u].first_atom + a);
        list.push_back({score, kernels::tie_bits(key, index), u, a});
      }
    }
    std::sort(list.begin(), list.end(), [](const Ranked& a, const Ranked& b) {
      return std::tuple(a.score, a.tie) > std::tuple(b.score, b.tie);
    });
    return list;
  }
  int64_t grow(int64_t count, const std::vector<PackedMask>& candidates, Source source,
               AtomOrder order, RandomKey key) {
    int64_t grown = 0;
    for (const Ranked& atom : ranked(all(), candidates, source, order, key)) {
      if (grown >= count || need_ <= 0) break;
      const Atoms& unit = units_[atom.unit];
      PackedMask& mask = masks[atom.unit];
      if (mask.test(atom.atom) || (unit.highest >= 0 && mask.count() >= unit.highest)) continue;
      mask.set(atom.atom, true);
      ++grown;
      --need_;
    }
    return grown;
  }

  const std::vector<Atoms>& units_;
  const UpdateRule& rule_;
  int64_t need_ = 0;
};

TEST(SparseSelect, Update) {
  int64_t num_cases = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    std::vector<Atoms> units = some_units(seed, 0.4 + 0.2 * static_cast<double>(seed % 7));
    int64_t total = 0;
    for (size_t u = 0; u < units.size(); ++u) {
      Atoms& unit = units[u];
      unit.lowest = std::min(unit.mask.count(), unit.rows);
      if (seed % 3 == 1) unit.highest = unit.mask.count() + static_cast<int64_t>(u);
      unit.is_skipped = seed % 4 == 3 && u == 2;
      total += unit.mask.count();
    }
    if (seed % 5 == 4) {  // no gradient anywhere but in one atom
      for (Atoms& unit : units) std::fill(unit.other.begin(), unit.other.end(), 0.0f);
      units[0].other[5] = 1;
    }
    for (const GrowCriterion grow : {GrowCriterion::kRandom, GrowCriterion::kGrad,
                                     GrowCriterion::kUnfired, GrowCriterion::kNone}) {
      UpdateRule rule;
      rule.grow = grow;
      rule.exclude_just_dropped = seed % 2 == 0;
      rule.random_share = seed % 3 == 2 ? 0.3 : 0;
      UpdateOfAll update;
      update.fraction = static_cast<double>(seed % 6) / 5;
      update.target = seed % 7 == 0 ? total : total - static_cast<int64_t>(seed) * 10;
      update.drop_key = random_key(seed).with(1);
      update.grow_key = random_key(seed).with(2);
      update.random_key = random_key(seed).with(3);
      const PlainUpdate plain(units, rule, update);
      ++num_cases;
      for (const int num_ranks : {1, 2, 3}) {
        comm::run_local(num_ranks, [&](const comm::Group& world) {
          std::vector<UpdatePart> parts;
          std::vector<size_t> places;
          for (size_t u = 0; u < units.size(); ++u) {
            const std::vector<int> holders = holders_of(u, num_ranks);
            if (std::find(holders.begin(), holders.end(), world.rank()) == holders.end()) continue;
            places.push_back(u);
            UpdatePart part;
            part.place = static_cast<int64_t>(u);
            part.first_atom = units[u].first_atom;
            part.is_counted = holders[0] == world.rank();
            part.is_skipped = units[u].is_skipped;
            part.lowest = units[u].lowest;
            part.highest = units[u].highest;
            part.input.active = &units[u].mask;
            part.input.drop_scores = units[u].scores.data();
            part.input.grow_scores = units[u].other.data();
            part.input.ever_active = &units[u].ever_active;
            parts.push_back(part);
          }
          const auto changes =
              update_over_ranks(parts, rule, update, static_cast<int64_t>(units.size()), world);
          for (size_t i = 0; i < changes.size(); ++i) {
            const Atoms& unit = units[places[i]];
            EXPECT_EQ(changes[i].mask, plain.masks[places[i]])
                << "seed " << seed << " unit " << places[i] << " P=" << num_ranks << " grow "
                << static_cast<int>(grow);
            EXPECT_EQ(without(unit.mask, changes[i].dropped) | changes[i].grown, changes[i].mask);
            EXPECT_EQ(changes[i].num_grown, changes[i].grown.count());
            EXPECT_GE(changes[i].mask.count(), unit.lowest);
          }
        });
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
  EXPECT_EQ(num_cases, 160);
}

}  // namespace
}  // namespace perseid::testing
