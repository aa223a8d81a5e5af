#include "moe/sparse_update.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/error.h"

namespace perseid {
namespace {

using kernels::AtomCells;
using kernels::AtomOrder;
using kernels::RandomKey;

constexpr const char* kUpdateMask = "update_mask";

/// Selections of one unit, and the non-finite scores that they saw.
class Selector {
 public:
  explicit Selector(const AtomLayout& layout) : layout_(layout) {}

  PackedMask in_cells(AtomOrder order, const float* scores, const PackedMask& candidates,
                      const std::vector<int64_t>& k, RandomKey key) {
    return select(layout_.cells, order, scores, candidates, k, key);
  }
  PackedMask in_unit(AtomOrder order, const float* scores, const PackedMask& candidates, int64_t k,
                     RandomKey key) {
    return select({1, layout_.num_atoms()}, order, scores, candidates, {k}, key);
  }
  /// @param scores  of the candidates alone
  PackedMask listed_in_cells(AtomOrder order, const float* scores, const PackedMask& candidates,
                             const std::vector<int64_t>& k, RandomKey key) {
    PackedMask result(layout_.rows, layout_.cols);
    count(kernels::select_listed_atoms(layout_.cells, order, scores, candidates.data(), k.data(),
                                       key, result.data()));
    return result;
  }
  std::vector<int64_t> counts(const PackedMask& mask) const {
    std::vector<int64_t> result(static_cast<size_t>(layout_.cells.num_cells));
    kernels::count_atoms(layout_.cells, mask.data(), result.data());
    return result;
  }
  int64_t num_non_finite() const { return num_non_finite_; }

 private:
  PackedMask select(const AtomCells& cells, AtomOrder order, const float* scores,
                    const PackedMask& candidates, const std::vector<int64_t>& k, RandomKey key) {
    PackedMask result(layout_.rows, layout_.cols);
    count(kernels::select_atoms(cells, order, scores, candidates.data(), k.data(), key,
                                result.data()));
    return result;
  }
  void count(const kernels::AtomCounts& counts) {
    num_non_finite_ += counts.num_nan + counts.num_infinite;
  }

  const AtomLayout& layout_;
  int64_t num_non_finite_ = 0;
};

/// body(atom) for the atoms of a mask, ascending, until it returns false.
template <typename Body>
bool for_each_atom(const PackedMask& mask, Body&& body) {
  for (size_t w = 0; w < mask.words().size(); ++w) {
    for (uint64_t left = mask.words()[w]; left != 0; left &= left - 1) {
      if (!body(static_cast<int64_t>(w) * 64 + std::countr_zero(left))) return false;
    }
  }
  return true;
}

/// The atoms of `candidates` with accept(atom), which is asked in ascending order.
template <typename Accept>
PackedMask filtered(const PackedMask& candidates, Accept accept) {
  PackedMask result(candidates.rows(), candidates.cols());
  uint64_t* const words = result.data();
  for_each_atom(candidates, [&](int64_t atom) {
    words[atom / 64] |= uint64_t{accept(atom)} << (atom % 64);
    return true;
  });
  return result;
}

/// Whether all of these scores are 0. NaN is not.
bool is_all_zero(const PackedMask& atoms, const float* scores) {
  return for_each_atom(atoms, [&](int64_t atom) { return scores[atom] == 0.0f; });
}

/// a - b, but at least 0.
std::vector<int64_t> lacking(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  std::vector<int64_t> result(a.size());
  for (size_t i = 0; i < a.size(); ++i) result[i] = std::max<int64_t>(0, a[i] - b[i]);
  return result;
}
bool is_any(const std::vector<int64_t>& counts) {
  return std::any_of(counts.begin(), counts.end(), [](int64_t count) { return count > 0; });
}

void check(const AtomLayout& layout, const UpdateRule& rule, const UpdateInput& input) {
  require(input.active != nullptr, kUpdateMask, "active", "null", "is missing; pass the mask");
  require(input.active->rows() == layout.rows && input.active->cols() == layout.cols, kUpdateMask,
          "active", to_text(input.active->rows()) + "x" + to_text(input.active->cols()),
          "is not the layout's " + to_text(layout.rows) + "x" + to_text(layout.cols) + " atoms");
  require(input.fraction >= 0 && input.fraction <= 1, kUpdateMask, "fraction", input.fraction,
          "is outside [0, 1]");
  validate(rule);
  require(input.drop_scores != nullptr || layout.num_atoms() == 0, kUpdateMask, "drop_scores",
          "null", "is missing; pass the scores");
  require(input.num_grow < 0 || rule.drop != DropCriterion::kSetSigned, kUpdateMask, "num_grow",
          input.num_grow, "is given, but set_signed goes by the fraction of each sign");
  require(rule.drop != DropCriterion::kSetSigned || layout.is_elementwise(), kUpdateMask, "drop",
          "set_signed", "needs atoms of one position, which have a sign; choose magnitude");
  const bool is_sampled = rule.grow == GrowCriterion::kSampledGrad;
  require(!is_sampled || input.candidates != nullptr, kUpdateMask, "candidates", "null",
          "is missing; sampled_grad needs them");
  const bool has_none = is_sampled && input.candidates->count() == 0;
  require(!grows_by_score(rule.grow) || input.grow_scores != nullptr || has_none, kUpdateMask,
          "grow_scores", "null", "is missing; growing by scores needs them");
  require(!is_sampled || (*input.candidates & *input.active).count() == 0, kUpdateMask,
          "candidates", "given", "have active atoms among them");
  require(rule.grow != GrowCriterion::kUnfired || input.ever_active != nullptr, kUpdateMask,
          "ever_active", "null", "is missing; unfired needs it");
  if (input.cell_targets == nullptr) return;
  require(static_cast<int64_t>(input.cell_targets->size()) == layout.cells.num_cells, kUpdateMask,
          "cell_targets", input.cell_targets->size(),
          "are not one for each of " + to_text(layout.cells.num_cells) + " cells");
  for (const int64_t count : *input.cell_targets) {
    require(count >= 0 && count <= layout.cells.atoms_per_cell, kUpdateMask, "cell_targets", count,
            "is outside [0, " + to_text(layout.cells.atoms_per_cell) + "], the atoms of a cell");
  }
}

/// What grows by score: of each cell the best that have a gradient, up to k.
/// @param result  has_no_gradient is set
PackedMask grown_by_score(const UpdateRule& rule, const UpdateInput& input,
                          const PackedMask& eligible, const std::vector<int64_t>& k,
                          Selector& selector, MaskUpdate& result) {
  const float* const scores = input.grow_scores;
  constexpr AtomOrder kOrder = AtomOrder::kLargestMagnitude;
  // Scores of 0 come last, so that they are taken out afterwards. NaN is not 0: it is counted.
  if (rule.grow != GrowCriterion::kSampledGrad) {
    result.has_no_gradient = eligible.count() > 0 && is_all_zero(eligible, scores);
    if (result.has_no_gradient) return PackedMask(eligible.rows(), eligible.cols());
    const PackedMask best = selector.in_cells(kOrder, scores, eligible, k, input.grow_key);
    return filtered(best, [&](int64_t atom) { return scores[atom] != 0.0f; });
  }
  const PackedMask& candidates = *input.candidates;
  const int64_t count = candidates.count();
  result.has_no_gradient =
      count > 0 && std::all_of(scores, scores + count, [](float score) { return score == 0.0f; });
  if (result.has_no_gradient || count == 0) return PackedMask(eligible.rows(), eligible.cols());
  const PackedMask best = selector.listed_in_cells(kOrder, scores, candidates, k, input.grow_key);
  const float* next = scores;
  return best & filtered(candidates, [&](int64_t) { return *next++ != 0.0f; });
}

}  // namespace

bool grows_by_score(GrowCriterion grow) {
  return grow != GrowCriterion::kRandom && grow != GrowCriterion::kUnfired &&
         grow != GrowCriterion::kNone;
}
bool drops_by_gradient(DropCriterion drop) {
  return drop == DropCriterion::kMest || drop == DropCriterion::kTaylor;
}

void validate(const UpdateRule& rule) {
  require(rule.random_share >= 0 && rule.random_share <= 1, kUpdateMask, "random_share",
          rule.random_share, "is outside [0, 1]");
  require(std::isfinite(rule.mest_lambda) && rule.mest_lambda >= 0, kUpdateMask, "mest_lambda",
          rule.mest_lambda, "is not a finite number of 0 or more");
  require(rule.momentum_decay >= 0 && rule.momentum_decay < 1, kUpdateMask, "momentum_decay",
          rule.momentum_decay, "is outside [0, 1)");
  require(std::isfinite(rule.candidates_per_grown) && rule.candidates_per_grown >= 1, kUpdateMask,
          "candidates_per_grown", rule.candidates_per_grown, "is not a finite number of 1 or more");
  require(rule.grow != GrowCriterion::kSampledGrad || rule.exclude_just_dropped, kUpdateMask,
          "exclude_just_dropped", "false",
          "cannot be kept by sampled_grad, whose candidates are inactive before the update");
}

int64_t share_of(double fraction, int64_t count) {
  return static_cast<int64_t>(std::floor(fraction * static_cast<double>(count)));
}

MaskUpdate update_mask(const AtomLayout& layout, const UpdateRule& rule, const UpdateInput& input) {
  check(layout, rule, input);
  const PackedMask& active = *input.active;
  const int64_t num_active = active.count();
  const int64_t target = input.target < 0 ? num_active : input.target;
  require(target <= layout.num_atoms(), kUpdateMask, "target", target,
          "exceeds num_atoms=" + to_text(layout.num_atoms()));
  require(input.cell_targets != nullptr || target % layout.cells.num_cells == 0, kUpdateMask,
          "target", target, "is not a multiple of num_cells=" + to_text(layout.cells.num_cells));
  std::vector<int64_t> target_of(static_cast<size_t>(layout.cells.num_cells),
                                 target / layout.cells.num_cells);
  if (input.cell_targets != nullptr) target_of = *input.cell_targets;
  const PackedMask barred =
      input.barred != nullptr ? *input.barred : PackedMask(layout.rows, layout.cols);

  const MaskUpdate unchanged{active, PackedMask(layout.rows, layout.cols),
                             PackedMask(layout.rows, layout.cols)};
  Selector selector(layout);
  const bool grows = rule.grow != GrowCriterion::kNone;

  // Who goes. Weights of both signs are ranked by distance from 0.
  const float* const drop_scores = input.drop_scores;
  constexpr AtomOrder kWorst = AtomOrder::kSmallestMagnitude;
  PackedMask dropped(layout.rows, layout.cols);
  if (rule.drop == DropCriterion::kTaylor && num_active > 0 && is_all_zero(active, drop_scores)) {
    MaskUpdate result = unchanged;
    result.has_no_gradient = true;
    return result;
  }
  if (rule.drop == DropCriterion::kSetSigned) {
    const PackedMask negative = filtered(active, [&](int64_t a) { return drop_scores[a] < 0; });
    const PackedMask others = without(active, negative);
    if (grows) {
      dropped = selector.in_unit(kWorst, drop_scores, negative,
                                 share_of(input.fraction, negative.count()), input.drop_key) |
                selector.in_unit(kWorst, drop_scores, others,
                                 share_of(input.fraction, others.count()), input.drop_key);
    }
    if (grows && num_active > target) {
      dropped = dropped | selector.in_unit(kWorst, drop_scores, without(active, dropped),
                                           num_active - target, input.drop_key);
    }
  } else if (grows) {
    const int64_t num_grow =
        input.num_grow >= 0 ? input.num_grow : share_of(input.fraction, num_active);
    const int64_t num_drop = num_grow + num_active - target;
    dropped = selector.in_unit(kWorst, drop_scores, active, std::max<int64_t>(0, num_drop),
                               input.drop_key);
  }
  dropped = dropped | (active & barred);
  // Cells that have more than their target without growing lose the rest, too.
  PackedMask kept = without(active, dropped);
  if (const auto too_many = lacking(selector.counts(kept), target_of); is_any(too_many)) {
    const PackedMask worst = selector.in_cells(kWorst, drop_scores, kept, too_many, input.drop_key);
    kept = without(kept, worst);
  }

  // Who comes.
  PackedMask eligible = without(PackedMask::full(layout.rows, layout.cols), active);
  if (!rule.exclude_just_dropped) eligible = eligible | dropped;
  eligible = without(eligible, barred);
  const std::vector<int64_t> need = lacking(target_of, selector.counts(kept));
  MaskUpdate result = unchanged;
  PackedMask grown(layout.rows, layout.cols);
  if (grows && rule.grow != GrowCriterion::kRandom && is_any(need)) {
    std::vector<int64_t> by_score = need;
    for (int64_t& count : by_score) count -= share_of(rule.random_share, count);
    if (grows_by_score(rule.grow)) {
      grown = grown_by_score(rule, input, eligible, by_score, selector, result);
      if (result.has_no_gradient) return result;
    } else {
      grown = selector.in_cells(AtomOrder::kLargest, nullptr, without(eligible, *input.ever_active),
                                by_score, input.grow_key);
      const auto rest = lacking(by_score, selector.counts(grown));
      grown = grown | selector.in_cells(AtomOrder::kLargest, nullptr, without(eligible, grown),
                                        rest, input.grow_key);
    }
  }
  result.num_non_finite = selector.num_non_finite();
  if (result.num_non_finite > 0) return result;

  // What is left of the need: by chance, where that is the rule; then dropped atoms that stay; and
  // if the target rose, any.
  const auto fill = [&](AtomOrder order, const float* scores, const PackedMask& candidates,
                        const std::vector<int64_t>& wanted, RandomKey key) {
    if (!is_any(wanted)) return;
    grown = grown | selector.in_cells(order, scores, without(candidates, grown), wanted, key);
  };
  if (rule.grow == GrowCriterion::kRandom) {
    fill(AtomOrder::kLargest, nullptr, eligible, need, input.random_key);
  } else if (grows && rule.random_share > 0) {
    std::vector<int64_t> by_chance = need;
    for (int64_t& count : by_chance) count = share_of(rule.random_share, count);
    fill(AtomOrder::kLargest, nullptr, eligible, by_chance, input.random_key);
  }
  const PackedMask may_stay = without(active, kept);
  for (const PackedMask& stays : {without(may_stay, barred), may_stay}) {
    fill(AtomOrder::kLargestMagnitude, drop_scores, stays, lacking(need, selector.counts(grown)),
         input.drop_key);
  }
  fill(AtomOrder::kLargest, nullptr, eligible, lacking(need, selector.counts(grown)),
       input.random_key);

  result.mask = kept | grown;
  PERSEID_INVARIANT(selector.counts(result.mask) == target_of);
  result.dropped = without(active, result.mask);
  result.grown = without(result.mask, active);
  result.num_dropped = result.dropped.count();
  result.num_grown = result.grown.count();
  return result;
}

}  // namespace perseid
