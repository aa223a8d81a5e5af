#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "moe/ranks_agree.h"
#include "moe/sparsifier_unit.h"

namespace perseid {
namespace {

/// Who holds a unit, as the ranks say.
struct HeldUnit {
  std::vector<int> ranks;
  int64_t out = 0, in = 0, holders = 0, counts_rows = 0, is_double = 0, has_bias = 0;
  std::string name;
};

[[noreturn]] void units_disagree(const std::string& argument, const std::string& value,
                                 const std::string& limit, int rank, int culprit,
                                 const comm::CallSite& site) {
  ErrorDetail detail{kSparsifier, argument, value, limit};
  detail.rank = rank;
  detail.culprit = culprit;
  detail.step = site.step;
  throw RanksDisagree(detail);
}

std::string list_of(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i == 8) return text + ", ... (" + to_text(ranks.size()) + ")";
    text += (i == 0 ? "" : ", ") + to_text(ranks[i]);
  }
  return text;
}

std::string facts_of(const HeldUnit& unit) {
  return unit.name + " [" + to_text(unit.out) + ", " + to_text(unit.in) + "]" +
         (unit.is_double != 0 ? " float64" : "") + (unit.counts_rows != 0 ? " with rows" : "") +
         (unit.has_bias != 0 ? " with bias" : "") +
         (unit.holders == static_cast<int64_t>(Holders::kReplicas) ? " of an expert" : "");
}

/// The first word that differs.
void require_same_texts(const std::vector<std::string>& texts, int rank,
                        const comm::CallSite& site) {
  for (size_t r = 1; r < texts.size(); ++r) {
    if (texts[r] == texts[0]) continue;
    std::istringstream first(texts[0]), other(texts[r]);
    std::string a, b;
    while (a == b && (first || other)) {
      a.clear();
      b.clear();
      first >> a;
      other >> b;
    }
    units_disagree("config", a,
                   "from rank 0 differs from " + b + " from rank " + to_text(r) +
                       "; all ranks must pass the same configuration",
                   rank, static_cast<int>(r), site);
  }
}

}  // namespace

std::vector<std::string> gather_bytes(const std::string& mine, const comm::Group& group,
                                      const comm::CallSite& site) {
  const auto num_ranks = static_cast<size_t>(group.size());
  const auto size = static_cast<int64_t>(mine.size());
  std::vector<int64_t> sizes(num_ranks);
  comm::all_gather(&size, sizeof(size), sizes.data(), group, site);
  std::vector<std::string> all(num_ranks);
  // Rank by rank, as ranks have much or little.
  for (size_t r = 0; r < num_ranks; ++r) {
    all[r].resize(static_cast<size_t>(sizes[r]));
    if (static_cast<int>(r) == group.rank()) all[r] = mine;
    if (sizes[r] > 0) {
      comm::broadcast(all[r].data(), sizes[r], static_cast<int>(r), group, site);
    }
  }
  return all;
}

/// Fills known_: the units of all ranks, after it has been checked that each is held by the ranks
/// that it says. All ranks see the same lists and come to the same error.
void Sparsifier::know_units(const comm::CallSite& site) {
  const comm::Group& world = groups_.world;
  require_same_texts(gather_bytes(config_text(), world, site), world.rank(), site);

  const comm::Group& replicas = groups_.expert_replicas;
  const int rank = world.rank();
  replica_ranks_.resize(static_cast<size_t>(replicas.size()));
  comm::all_gather(&rank, sizeof(rank), replica_ranks_.data(), replicas, site);
  std::vector<int> first_replica(static_cast<size_t>(world.size()));
  comm::all_gather(replica_ranks_.data(), sizeof(int), first_replica.data(), world, site);

  std::ostringstream mine;
  for (const SparseUnit& unit : units_) {
    const at::Tensor weight = unit.weight();
    const bool counts = unit.link != nullptr || unit.row_counts != nullptr || unit.counts_rows;
    mine << unit.key.layer << ' ' << unit.key.expert << ' ' << static_cast<int>(unit.key.matrix)
         << ' ' << weight.size(0) << ' ' << weight.size(1) << ' ' << static_cast<int>(unit.holders)
         << ' ' << counts << ' ' << (weight.scalar_type() == at::kDouble) << ' ' << unit.has_bias
         << ' ' << unit.name.size() << ' ' << unit.name << '\n';
  }
  std::map<UnitKey, HeldUnit> found;
  const std::vector<std::string> lists = gather_bytes(mine.str(), world, site);
  for (size_t r = 0; r < lists.size(); ++r) {
    std::istringstream list(lists[r]);
    UnitKey key;
    HeldUnit unit;
    int matrix = 0;
    size_t name_size = 0;
    while (list >> key.layer >> key.expert >> matrix >> unit.out >> unit.in >> unit.holders >>
           unit.counts_rows >> unit.is_double >> unit.has_bias >> name_size) {
      key.matrix = static_cast<Matrix>(matrix);
      unit.name.resize(name_size);
      list.get();
      list.read(unit.name.data(), static_cast<std::streamsize>(name_size));
      const auto [place, is_new] = found.emplace(key, unit);
      if (!is_new && facts_of(place->second) != facts_of(unit)) {
        units_disagree("unit " + to_string(key), facts_of(place->second),
                       "from rank " + to_text(place->second.ranks.front()) + " differs from " +
                           facts_of(unit) + " from rank " + to_text(r),
                       rank, static_cast<int>(r), site);
      }
      place->second.ranks.push_back(static_cast<int>(r));
    }
  }
  for (const auto& [key, unit] : found) {
    std::vector<int> wanted;
    for (int r = 0; r < world.size(); ++r) {
      const bool is_wanted = unit.holders == static_cast<int64_t>(Holders::kAllRanks) ||
                             first_replica[static_cast<size_t>(r)] ==
                                 first_replica[static_cast<size_t>(unit.ranks.front())];
      if (is_wanted) wanted.push_back(r);
    }
    if (wanted != unit.ranks) {
      units_disagree("unit " + unit.name, "on ranks " + list_of(unit.ranks),
                     "must be on ranks " + list_of(wanted) +
                         ", which hold the same parameters; pass it there and nowhere else",
                     rank, unit.ranks.front(), site);
    }
    Known known;
    known.key = key;
    known.name = unit.name;
    known.out = unit.out;
    known.in = unit.in;
    known.holders = static_cast<Holders>(unit.holders);
    known.counts_rows = unit.counts_rows != 0;
    known.has_bias = unit.has_bias != 0;
    known_.push_back(known);
  }
}

bool Sparsifier::is_primary(size_t u) const {
  return (units_[u].holders == Holders::kAllRanks ? groups_.world : groups_.expert_replicas)
             .rank() == 0;
}

int64_t Sparsifier::rows_here(size_t u) const {
  const SparseUnit& unit = units_[u];
  const Unit& state = states_[u];
  if (unit.link != nullptr || unit.row_counts == nullptr) return state.num_pending;
  return state.num_pending + unit.row_counts->rows[unit.row_slot] - state.num_rows_seen;
}

/// Rows of all ranks that are in no sum yet, of each of known_. Ranks that hold a unit have
/// different rows of it, others have none.
std::vector<int64_t> Sparsifier::summed_rows(const comm::CallSite& site) const {
  std::vector<int64_t> rows(known_.size(), 0);
  const bool is_any =
      std::any_of(known_.begin(), known_.end(), [](const Known& unit) { return unit.counts_rows; });
  if (!is_any) return rows;
  for (size_t u = 0; u < units_.size(); ++u) rows[states_[u].place] = rows_here(u);
  comm::all_reduce(rows.data(), static_cast<int64_t>(rows.size()), comm::ReduceOp::kSum,
                   groups_.world, site);
  return rows;
}

void Sparsifier::sum_rows(const comm::CallSite& site) {
  const std::vector<int64_t> rows = summed_rows(site);
  for (size_t i = 0; i < known_.size(); ++i) known_[i].total_rows += rows[i];
  for (size_t u = 0; u < units_.size(); ++u) {
    Unit& state = states_[u];
    state.num_rows += rows[state.place];
    state.num_pending = 0;
    if (units_[u].row_counts != nullptr) {
      state.num_rows_seen = units_[u].row_counts->rows[units_[u].row_slot];
    }
  }
}

/// Sums over the holders what links were given in this step, with its sign, and adds it to the sums
/// of the window. All holders have the same units in the same order, and the same candidates.
void Sparsifier::add_link_gradients(Holders holders, const comm::CallSite& site) {
  const comm::Group& group =
      holders == Holders::kAllRanks ? groups_.world : groups_.expert_replicas;
  std::vector<size_t> units;
  for (size_t u = 0; u < units_.size(); ++u) {
    const bool is_wanted = units_[u].link != nullptr && units_[u].holders == holders &&
                           current_.actions[u] != UnitAction::kNone && wants_gradient(u);
    if (is_wanted) units.push_back(u);
  }
  if (units.empty()) return;
  if (group.size() > 1) {
    struct Sum {
      at::Tensor* tensor;
      std::vector<int64_t> sizes;
      at::TensorOptions options;
    };
    std::vector<Sum> parts;
    int64_t count = 0;
    const auto add_part = [&](at::Tensor& tensor, int64_t rows, int64_t cols,
                              const at::TensorOptions& options) {
      parts.push_back({&tensor, {rows, cols}, options});
      count += rows * cols;
    };
    for (const size_t u : units) {
      Unit& state = states_[u];
      const at::Tensor weight = units_[u].weight();
      const at::TensorOptions options =
          weight.options().dtype(weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
      if (config_.rule.grow == GrowCriterion::kSampledGrad) {
        add_part(state.link_gradient, 1, state.sampled.count(), options);
      } else {
        add_part(state.link_gradient, state.layout.out, state.layout.in, options);
      }
      if (config_.rule.grow == GrowCriterion::kGreedyProgress) {
        add_part(state.link_energy, 1, state.layout.in, options.dtype(at::kDouble));
      }
    }
    const at::Tensor sums = at::empty({count}, at::kDouble).zero_();
    const auto for_each = [&](auto&& body) {
      int64_t first = 0;
      for (const Sum& part : parts) {
        const int64_t size = part.sizes[0] * part.sizes[1];
        body(part, sums.narrow(0, first, size).view(part.sizes));
        first += size;
      }
    };
    for_each([](const Sum& part, const at::Tensor& place) {
      if (part.tensor->defined()) place.copy_(*part.tensor);
    });
    comm::all_reduce(sums.mutable_data_ptr<double>(), count, comm::ReduceOp::kSum, group, site);
    for_each([](const Sum& part, const at::Tensor& place) {
      *part.tensor = place.to(part.options, /*non_blocking=*/false, /*copy=*/true);
    });
  }
  for (const size_t u : units) {
    Unit& state = states_[u];
    add_gradient(u, state.link_gradient, /*is_owned=*/true);
    state.link_gradient = at::Tensor();
    if (state.link_energy.defined()) {
      state.energy_sum =
          state.energy_sum.defined() ? state.energy_sum.add_(state.link_energy) : state.link_energy;
    }
    state.link_energy = at::Tensor();
  }
}

/// Collective. Throws RanksDisagree on every rank if holders of a unit have another fingerprint.
/// @param units         of units_, the same among holders
/// @param fingerprints  of each of them
void Sparsifier::require_same_fingerprints(const std::vector<size_t>& units,
                                           const std::vector<uint64_t>& fingerprints,
                                           const char* what, const comm::CallSite& site) const {
  if (groups_.world.size() == 1) return;
  struct Difference {
    std::string name, first, other;
    UnitKey key;
    int first_rank = 0, other_rank = 0;
  };
  std::vector<Difference> differences;
  for (const Holders holders : {Holders::kAllRanks, Holders::kReplicas}) {
    const bool is_world = holders == Holders::kAllRanks;
    const comm::Group& group = is_world ? groups_.world : groups_.expert_replicas;
    std::vector<size_t> chosen;
    std::vector<uint64_t> mine;
    for (size_t i = 0; i < units.size(); ++i) {
      if (units_[units[i]].holders != holders) continue;
      chosen.push_back(units[i]);
      mine.push_back(fingerprints[i]);
    }
    // Ranks of other experts may have no update in this step: then no one of this group has.
    if (mine.empty() || group.size() == 1) continue;
    std::vector<uint64_t> all(mine.size() * static_cast<size_t>(group.size()));
    comm::all_gather(mine.data(), static_cast<int64_t>(mine.size() * sizeof(uint64_t)), all.data(),
                     group, site);
    for (size_t r = 1; r < static_cast<size_t>(group.size()); ++r) {
      for (size_t i = 0; i < mine.size(); ++i) {
        if (all[r * mine.size() + i] == all[i]) continue;
        const SparseUnit& unit = units_[chosen[i]];
        differences.push_back({unit.name, to_text(all[i]), to_text(all[r * mine.size() + i]),
                               unit.key, is_world ? 0 : replica_ranks_[0],
                               is_world ? static_cast<int>(r) : replica_ranks_[r]});
      }
    }
  }
  comm::agree(groups_.world, site, [&] {
    if (differences.empty()) return;
    const Difference& first = differences.front();
    ErrorDetail detail{kSparsifier, std::string(what) + " of " + first.name, first.first,
                       "from rank " + to_text(first.first_rank) + " differs from " + first.other +
                           " from rank " + to_text(first.other_rank) +
                           "; its ranks must train it alike, sum_gradients before end_backward"};
    detail.rank = groups_.world.rank();
    detail.culprit = first.other_rank;
    detail.layer = static_cast<int>(first.key.layer);
    detail.step = site.step;
    throw RanksDisagree(detail);
  });
}

SparsityTotals Sparsifier::totals() const {
  SparsityTotals totals;
  double churn_sum = 0;
  for (size_t u = 0; u < units_.size(); ++u) {
    if (!is_primary(u)) continue;
    const Unit& unit = states_[u];
    totals.nnz += count_positions(unit.layout, unit.mask);
    totals.size += unit.layout.out * unit.layout.in;
    totals.ever_active += unit.ever_active.count();
    totals.num_atoms += unit.layout.num_atoms();
    totals.num_updates += unit.num_updates;
    totals.num_skipped += unit.num_skipped;
    churn_sum += unit.churn_sum;
  }
  const comm::CallSite site{.operation = kSparsifier};
  int64_t* const counts[] = {&totals.nnz,       &totals.size,        &totals.ever_active,
                             &totals.num_atoms, &totals.num_updates, &totals.num_skipped};
  std::vector<int64_t> values;
  for (const int64_t* count : counts) values.push_back(*count);
  comm::all_reduce(values.data(), static_cast<int64_t>(values.size()), comm::ReduceOp::kSum,
                   groups_.world, site);
  comm::all_reduce(&churn_sum, 1, comm::ReduceOp::kSum, groups_.world, site);
  for (size_t i = 0; i < values.size(); ++i) *counts[i] = values[i];
  if (totals.num_updates > 0) totals.churn = churn_sum / static_cast<double>(totals.num_updates);
  return totals;
}

}  // namespace perseid
