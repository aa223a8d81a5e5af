#include "moe/sparse_select.h"

#include <algorithm>
#include <utility>

#include "comm/collectives.h"
#include "kernels/error.h"
#include "kernels/select_parts.h"

namespace perseid {
namespace {

using kernels::AtomOrder;
using kernels::AtomPart;
using kernels::KeyRange;
using kernels::RandomKey;

constexpr const char* kUpdateOverRanks = "update_over_ranks";

AtomPart atoms_of(const SelectPart& part) {
  AtomPart atoms;
  atoms.scores = part.scores;
  atoms.candidates = part.candidates->data();
  atoms.num_atoms = part.candidates->num_places();
  atoms.first_atom = static_cast<uint64_t>(part.first_atom);
  return atoms;
}

/// One selection after another over the parts of an update.
class PartSelector {
 public:
  PartSelector(const std::vector<UpdatePart>& parts, int64_t num_units, const comm::Group& group,
               const comm::CallSite& site)
      : parts_(parts), num_units_(num_units), group_(group), site_(site) {}

  PartSelection over_ranks(AtomOrder order, const std::vector<const float*>& scores,
                           const std::vector<PackedMask>& candidates, int64_t k,
                           RandomKey key) const {
    std::vector<SelectPart> selected;
    for (size_t u = 0; u < parts_.size(); ++u) {
      selected.push_back(part_of(u, scores[u], candidates[u]));
    }
    return select_over_ranks(selected, order, k, key, num_units_, group_, site_);
  }
  /// Of one part alone, by the same order; not collective.
  PackedMask in_part(size_t u, AtomOrder order, const float* scores, const PackedMask& candidates,
                     int64_t k, RandomKey key) const {
    SelectPart part = part_of(u, scores, candidates);
    part.place = 0;
    part.is_counted = true;
    return select_over_ranks({part}, order, k, key, 1, {}).masks.front();
  }
  /// Sum over the units of all ranks.
  int64_t sum(const std::vector<int64_t>& of_parts) const {
    int64_t result = 0;
    for (size_t u = 0; u < parts_.size(); ++u) result += parts_[u].is_counted ? of_parts[u] : 0;
    comm::all_reduce(&result, 1, comm::ReduceOp::kSum, group_, site_);
    return result;
  }

 private:
  SelectPart part_of(size_t u, const float* scores, const PackedMask& candidates) const {
    return {parts_[u].place, parts_[u].first_atom, parts_[u].is_counted, scores, &candidates};
  }

  const std::vector<UpdatePart>& parts_;
  int64_t num_units_;
  const comm::Group& group_;
  const comm::CallSite& site_;
};

/// What has grown so far, up to the sum that is needed and the limit of each unit.
class Growth {
 public:
  Growth(const std::vector<UpdatePart>& parts, const PartSelector& selector,
         const std::vector<PackedMask>& kept, int64_t need)
      : parts_(parts), selector_(selector), kept_(kept), left_(need) {
    for (const UpdatePart& part : parts) {
      grown_.emplace_back(part.input.active->rows(), part.input.active->cols());
    }
  }

  /// At most k of the candidates that have not grown yet.
  void add(AtomOrder order, const std::vector<const float*>& scores,
           std::vector<PackedMask> candidates, int64_t k, RandomKey key) {
    k = std::min(k, left_);
    if (k <= 0) return;
    for (size_t u = 0; u < parts_.size(); ++u) {
      candidates[u] = without(candidates[u], grown_[u]);
      if (parts_[u].highest < 0) continue;
      // The best of all under a limit for each unit are the best among those that each may have.
      const int64_t room =
          std::max<int64_t>(0, parts_[u].highest - kept_[u].count() - grown_[u].count());
      if (candidates[u].count() > room) {
        candidates[u] = selector_.in_part(u, order, scores[u], candidates[u], room, key);
      }
    }
    const PartSelection selection = selector_.over_ranks(order, scores, candidates, k, key);
    for (size_t u = 0; u < parts_.size(); ++u) grown_[u] = grown_[u] | selection.masks[u];
    left_ -= selection.num_selected;
  }

  const std::vector<PackedMask>& grown() const { return grown_; }
  int64_t left() const { return left_; }

 private:
  const std::vector<UpdatePart>& parts_;
  const PartSelector& selector_;
  const std::vector<PackedMask>& kept_;
  int64_t left_;
  std::vector<PackedMask> grown_;
};

void check_parts(const std::vector<UpdatePart>& parts, const UpdateRule& rule,
                 const UpdateOfAll& update) {
  require(rule.drop != DropCriterion::kSetSigned, kUpdateOverRanks, "drop", "set_signed",
          "ranks the weights of one unit; choose magnitude");
  const bool is_known = rule.grow == GrowCriterion::kRandom || rule.grow == GrowCriterion::kGrad ||
                        rule.grow == GrowCriterion::kUnfired || rule.grow == GrowCriterion::kNone;
  require(is_known, kUpdateOverRanks, "grow", static_cast<int>(rule.grow),
          "is not random, grad, unfired or none");
  require(update.fraction >= 0 && update.fraction <= 1, kUpdateOverRanks, "fraction",
          update.fraction, "is outside [0, 1]");
  require(update.target >= 0, kUpdateOverRanks, "target", update.target, "is negative");
  for (const UpdatePart& part : parts) {
    require(part.input.active != nullptr && part.input.drop_scores != nullptr, kUpdateOverRanks,
            "parts", "null", "lack their mask or scores");
  }
}

}  // namespace

PartSelection select_over_ranks(const std::vector<SelectPart>& parts, AtomOrder order, int64_t k,
                                RandomKey key, int64_t num_units, const comm::Group& group,
                                const comm::CallSite& site) {
  PartSelection result;
  // The limit: keys of `range` and above are selected once exactly k are left of them.
  KeyRange range;
  int64_t num_needed = std::max<int64_t>(0, k), num_at_limit = num_needed + 1;
  bool takes_all = false;
  while (num_needed > 0 && num_needed < num_at_limit && range.shift > 0) {
    std::vector<int64_t> histogram(static_cast<size_t>(kernels::kKeyDigits), 0);
    for (const SelectPart& part : parts) {
      if (!part.is_counted) continue;
      kernels::count_key_digits(atoms_of(part), order, key, range, histogram.data());
    }
    comm::all_reduce(histogram.data(), kernels::kKeyDigits, comm::ReduceOp::kSum, group, site);
    if (range.shift == 64) {
      int64_t num_candidates = 0;
      for (const int64_t count : histogram) num_candidates += count;
      takes_all = num_needed >= num_candidates;
      result.num_selected = std::min(num_needed, num_candidates);
      if (takes_all) break;
    }
    auto digit = static_cast<size_t>(kernels::kKeyDigits - 1);
    while (histogram[digit] < num_needed) num_needed -= histogram[digit--];
    num_at_limit = histogram[digit];
    range.prefix = range.prefix << kernels::kKeyDigitBits | digit;
    range.shift -= kernels::kKeyDigitBits;
  }
  if (takes_all || result.num_selected == 0) {
    for (const SelectPart& part : parts) {
      result.masks.push_back(takes_all
                                 ? *part.candidates
                                 : PackedMask(part.candidates->rows(), part.candidates->cols()));
    }
    return result;
  }
  const uint64_t limit = range.shift == 64 ? 0 : range.prefix << range.shift;
  // Units that have one key in common, which takes more than 2^32 atoms: the first ones take it.
  std::vector<int64_t> at_limit;
  if (num_needed < num_at_limit) {
    at_limit.assign(static_cast<size_t>(num_units), 0);
    for (const SelectPart& part : parts) {
      if (!part.is_counted) continue;
      std::vector<int64_t> histogram(static_cast<size_t>(kernels::kKeyDigits), 0);
      const KeyRange last{limit >> kernels::kKeyDigitBits, kernels::kKeyDigitBits};
      kernels::count_key_digits(atoms_of(part), order, key, last, histogram.data());
      at_limit[static_cast<size_t>(part.place)] =
          histogram[static_cast<size_t>(limit & (kernels::kKeyDigits - 1))];
    }
    comm::all_reduce(at_limit.data(), num_units, comm::ReduceOp::kSum, group, site);
    for (int64_t& count : at_limit) {
      const int64_t taken = std::min(count, num_needed);
      num_needed -= taken;
      count = taken;
    }
  }
  for (const SelectPart& part : parts) {
    const bool takes_limit = at_limit.empty() || at_limit[static_cast<size_t>(part.place)] > 0;
    PackedMask mask(part.candidates->rows(), part.candidates->cols());
    kernels::mark_keys(atoms_of(part), order, key, limit, takes_limit, mask.data());
    result.masks.push_back(std::move(mask));
  }
  return result;
}

std::vector<MaskUpdate> update_over_ranks(const std::vector<UpdatePart>& parts,
                                          const UpdateRule& rule, const UpdateOfAll& update,
                                          int64_t num_units, const comm::Group& group,
                                          const comm::CallSite& site) {
  check_parts(parts, rule, update);
  const PartSelector selector(parts, num_units, group, site);
  std::vector<const float*> drop_scores, grow_scores, no_scores(parts.size(), nullptr);
  std::vector<int64_t> num_active, num_changing;
  // Who may go: not the best `lowest` of a unit.
  std::vector<PackedMask> droppable;
  for (size_t u = 0; u < parts.size(); ++u) {
    const UpdatePart& part = parts[u];
    const PackedMask& active = *part.input.active;
    drop_scores.push_back(part.input.drop_scores);
    grow_scores.push_back(part.input.grow_scores);
    num_active.push_back(active.count());
    num_changing.push_back(part.is_skipped ? 0 : num_active.back());
    droppable.push_back(
        without(active, selector.in_part(u, AtomOrder::kLargestMagnitude, drop_scores[u], active,
                                         part.lowest, update.drop_key)));
  }
  const int64_t total = selector.sum(num_active);
  const bool grows = rule.grow != GrowCriterion::kNone;
  const int64_t num_grow = grows ? share_of(update.fraction, selector.sum(num_changing)) : 0;

  PartSelection dropped = selector.over_ranks(AtomOrder::kSmallestMagnitude, drop_scores, droppable,
                                              total - update.target, update.drop_key);
  for (size_t u = 0; u < parts.size(); ++u) {
    droppable[u] = without(droppable[u], dropped.masks[u]);
    if (parts[u].is_skipped) droppable[u] = PackedMask(droppable[u].rows(), droppable[u].cols());
  }
  const PartSelection more = selector.over_ranks(AtomOrder::kSmallestMagnitude, drop_scores,
                                                 droppable, num_grow, update.drop_key);
  std::vector<PackedMask> kept, eligible, was_dropped, inactive;
  for (size_t u = 0; u < parts.size(); ++u) {
    const PackedMask& active = *parts[u].input.active;
    was_dropped.push_back(dropped.masks[u] | more.masks[u]);
    kept.push_back(without(active, was_dropped[u]));
    inactive.push_back(without(PackedMask::full(active.rows(), active.cols()), active));
    eligible.push_back(rule.exclude_just_dropped ? inactive[u] : inactive[u] | was_dropped[u]);
    if (parts[u].is_skipped) eligible[u] = PackedMask(active.rows(), active.cols());
  }

  const int64_t need = update.target - (total - dropped.num_selected - more.num_selected);
  Growth growth(parts, selector, kept, need);
  const int64_t by_chance = share_of(rule.random_share, std::max<int64_t>(0, need));
  const int64_t by_score = need - by_chance;
  if (rule.grow == GrowCriterion::kGrad) {
    std::vector<PackedMask> with_gradient = eligible;
    for (size_t u = 0; u < parts.size(); ++u) {
      for (int64_t atom = 0; atom < eligible[u].num_places(); ++atom) {
        if (eligible[u].test(atom) && grow_scores[u][atom] == 0.0f) {
          with_gradient[u].set(atom, false);
        }
      }
    }
    growth.add(AtomOrder::kLargestMagnitude, grow_scores, with_gradient, by_score, update.grow_key);
  } else if (rule.grow == GrowCriterion::kUnfired) {
    std::vector<PackedMask> unfired;
    for (size_t u = 0; u < parts.size(); ++u) {
      unfired.push_back(without(eligible[u], *parts[u].input.ever_active));
    }
    growth.add(AtomOrder::kLargest, no_scores, unfired, by_score, update.grow_key);
    growth.add(AtomOrder::kLargest, no_scores, eligible, growth.left() - by_chance,
               update.grow_key);
  }
  if (grows) {
    const bool is_random = rule.grow == GrowCriterion::kRandom;
    growth.add(AtomOrder::kLargest, no_scores, eligible, is_random ? need : by_chance,
               update.random_key);
  }
  // The sum comes first: the best of the dropped ones stay; and if the target rose, any come.
  growth.add(AtomOrder::kLargestMagnitude, drop_scores, was_dropped, growth.left(),
             update.drop_key);
  growth.add(AtomOrder::kLargest, no_scores, eligible, growth.left(), update.random_key);
  growth.add(AtomOrder::kLargest, no_scores, inactive, growth.left(), update.random_key);
  PERSEID_INVARIANT(growth.left() <= 0);

  std::vector<MaskUpdate> result;
  for (size_t u = 0; u < parts.size(); ++u) {
    const PackedMask& active = *parts[u].input.active;
    MaskUpdate change;
    change.mask = kept[u] | growth.grown()[u];
    change.dropped = without(active, change.mask);
    change.grown = without(change.mask, active);
    change.num_dropped = change.dropped.count();
    change.num_grown = change.grown.count();
    result.push_back(std::move(change));
  }
  return result;
}

}  // namespace perseid
