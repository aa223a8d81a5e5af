#include <sstream>

#include "moe/sparsifier_unit.h"

namespace perseid {

uint64_t Sparsifier::config_hash() const {
  std::ostringstream text;
  text.precision(17);
  text << config_;
  uint64_t hash = 0;
  for (const char c : text.str()) {
    hash = kernels::splitmix64(hash ^ static_cast<unsigned char>(c));
  }
  return hash;
}

SparsifierState Sparsifier::state_dict() const {
  SparsifierState result;
  result.config_hash = config_hash();
  for (size_t u = 0; u < units_.size(); ++u) {
    const Unit& unit = states_[u];
    result.units.push_back({units_[u].key, unit.mask, unit.ever_active, unit.num_rows,
                            unit.num_updates, unit.num_skipped,
                            unit.grad_sum.defined() ? unit.grad_sum.clone() : at::Tensor()});
  }
  return result;
}

void Sparsifier::load(const SparsifierState& state) {
  require(state.version == SparsifierState::kVersion, kSparsifier, "version", state.version,
          "is not " + to_text(SparsifierState::kVersion) + ", which this build reads");
  require(state.config_hash == config_hash(), kSparsifier, "config_hash", state.config_hash,
          "differs from " + to_text(config_hash()) +
              " of this configuration; resume with the one it was saved with");
  std::vector<const UnitState*> found(units_.size(), nullptr);
  for (size_t u = 0; u < units_.size(); ++u) {
    for (const UnitState& saved : state.units) {
      if (saved.key == units_[u].key) found[u] = &saved;
    }
    const std::string& name = units_[u].name;
    if (found[u] == nullptr) {
      fail_sparsifier("state", name, "has no mask in it (" + to_string(units_[u].key) + ")");
    }
    const Unit& mine = states_[u];
    for (const PackedMask* mask : {&found[u]->mask, &found[u]->ever_active}) {
      if (mask->rows() != mine.layout.rows || mask->cols() != mine.layout.cols) {
        fail_sparsifier(
            "mask of " + name, to_text(mask->rows()) + "x" + to_text(mask->cols()),
            "is not of " + to_text(mine.layout.rows) + "x" + to_text(mine.layout.cols) + " atoms");
      }
    }
    std::vector<int64_t> saved_counts(static_cast<size_t>(mine.layout.cells.num_cells));
    std::vector<int64_t> counts = saved_counts;
    kernels::count_atoms(mine.layout.cells, found[u]->mask.data(), saved_counts.data());
    kernels::count_atoms(mine.layout.cells, mine.mask.data(), counts.data());
    if (saved_counts != counts) {
      fail_sparsifier("mask of " + name, to_text(found[u]->mask.count()),
                      "active atoms do not keep its budget of " + to_text(mine.mask.count()) +
                          " in equal cells");
    }
  }
  for (size_t u = 0; u < units_.size(); ++u) {
    Unit& mine = states_[u];
    mine.ever_active = found[u]->ever_active;
    set_mask(u, found[u]->mask);
    mine.num_rows = found[u]->num_rows;
    mine.num_updates = found[u]->num_updates;
    mine.num_skipped = found[u]->num_skipped;
    mine.grad_sum = found[u]->grad_sum.defined() ? found[u]->grad_sum.clone() : at::Tensor();
  }
  is_started_ = false;
}

}  // namespace perseid
