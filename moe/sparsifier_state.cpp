#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <sstream>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "moe/ranks_agree.h"
#include "moe/sparsifier_unit.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

/// Plain values one after another.
class ByteWriter {
 public:
  template <typename T>
  void add(const T& value) {
    add(&value, sizeof(T));
  }
  void add(const void* data, size_t size) { bytes_.append(static_cast<const char*>(data), size); }
  void add(const PackedMask& mask) {
    add(mask.rows());
    add(mask.cols());
    add(mask.data(), mask.words().size() * sizeof(uint64_t));
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

class ByteReader {
 public:
  explicit ByteReader(const std::string& bytes) : bytes_(bytes) {}
  bool at_end() const { return next_ == bytes_.size(); }
  void take(void* data, size_t size) {
    PERSEID_INVARIANT(size <= bytes_.size() - next_);
    if (size > 0) std::memcpy(data, bytes_.data() + next_, size);
    next_ += size;
  }
  template <typename T>
  T take() {
    T value{};
    take(&value, sizeof(T));
    return value;
  }
  PackedMask take_mask() {
    const auto rows = take<int64_t>(), cols = take<int64_t>();
    PackedMask mask(rows, cols);
    take(mask.data(), mask.words().size() * sizeof(uint64_t));
    return mask;
  }

 private:
  const std::string& bytes_;
  size_t next_ = 0;
};

void write(const at::Tensor& matrix, ByteWriter& bytes) {
  bytes.add(matrix.defined());
  if (!matrix.defined()) return;
  const at::Tensor values = matrix.cpu().contiguous();
  bytes.add(values.scalar_type() == at::kDouble);
  bytes.add(values.size(0));
  bytes.add(values.size(1));
  bytes.add(data_of(values), values.nbytes());
}

at::Tensor read_matrix(ByteReader& bytes) {
  if (!bytes.take<bool>()) return {};
  const bool is_double = bytes.take<bool>();
  const auto rows = bytes.take<int64_t>(), cols = bytes.take<int64_t>();
  const at::Tensor matrix = at::empty({rows, cols}, is_double ? at::kDouble : at::kFloat);
  bytes.take(mutable_data_of(matrix), matrix.nbytes());
  return matrix;
}

void write(const UnitState& unit, ByteWriter& bytes) {
  bytes.add(unit.key.layer);
  bytes.add(unit.key.expert);
  bytes.add(unit.key.matrix);
  for (const int64_t count :
       {unit.num_rows, unit.num_updates, unit.num_skipped, unit.total_rows, unit.window,
        unit.chosen_step, unit.nnz, unit.frame, unit.load_rows}) {
    bytes.add(count);
  }
  bytes.add(unit.churn_sum);
  bytes.add(unit.load);
  bytes.add(unit.mask);
  bytes.add(unit.ever_active);
  bytes.add(unit.backward);
  for (const at::Tensor& sum : {unit.grad_sum, unit.active_sum, unit.energy_sum}) {
    write(sum, bytes);
  }
}

UnitState read(ByteReader& bytes) {
  UnitState unit;
  unit.key.layer = bytes.take<int64_t>();
  unit.key.expert = bytes.take<int64_t>();
  unit.key.matrix = bytes.take<Matrix>();
  for (int64_t* const count :
       {&unit.num_rows, &unit.num_updates, &unit.num_skipped, &unit.total_rows, &unit.window,
        &unit.chosen_step, &unit.nnz, &unit.frame, &unit.load_rows}) {
    *count = bytes.take<int64_t>();
  }
  unit.churn_sum = bytes.take<double>();
  unit.load = bytes.take<double>();
  unit.mask = bytes.take_mask();
  unit.ever_active = bytes.take_mask();
  unit.backward = bytes.take_mask();
  for (at::Tensor* const sum : {&unit.grad_sum, &unit.active_sum, &unit.energy_sum}) {
    *sum = read_matrix(bytes);
  }
  return unit;
}

uint64_t hash_of_text(const std::string& text) {
  uint64_t hash = 0;
  for (const char c : text) hash = kernels::splitmix64(hash ^ static_cast<unsigned char>(c));
  return hash;
}

}  // namespace

std::string Sparsifier::config_text() const {
  std::ostringstream text;
  text.precision(17);
  text << config_;
  return text.str();
}
uint64_t Sparsifier::config_hash() const { return hash_of_text(config_text()); }

SparsifierState Sparsifier::state_dict() const {
  const comm::CallSite site{.operation = kSparsifier};
  SparsifierState result;
  result.config_hash = config_hash();
  result.mean_rows = mean_rows_;
  result.num_counted_steps = num_counted_steps_;
  result.step = last_step_;
  const std::vector<int64_t> pending = summed_rows(site);
  const bool is_alone = groups_.world.size() == 1;
  ByteWriter mine;
  for (size_t u = 0; u < units_.size(); ++u) {
    const Unit& unit = states_[u];
    const Known& known = known_[unit.place];
    UnitState state;
    state.key = known.key;
    state.mask = unit.mask;
    state.ever_active = unit.ever_active;
    state.num_rows = unit.num_rows + pending[unit.place];
    state.num_updates = unit.num_updates;
    state.num_skipped = unit.num_skipped;
    state.churn_sum = unit.churn_sum;
    state.total_rows = known.total_rows + pending[unit.place];
    state.window = known.window;
    state.nnz = unit.nnz;
    state.frame = unit.frame;
    state.load = known.load;
    state.load_rows = known.load_rows;
    state.backward = unit.soft.backward;
    state.chosen_step = unit.soft.chosen_step;
    if (unit.grad_sum.defined()) state.grad_sum = unit.grad_sum.clone();
    if (unit.active_sum.defined()) state.active_sum = unit.active_sum.clone();
    if (unit.energy_sum.defined()) state.energy_sum = unit.energy_sum.clone();
    if (is_alone) {
      result.units.push_back(std::move(state));
    } else if (is_primary(u)) {
      write(state, mine);
    }
  }
  if (is_alone) return result;
  for (const std::string& bytes : gather_bytes(mine.bytes(), groups_.world, site)) {
    ByteReader reader(bytes);
    while (!reader.at_end()) result.units.push_back(read(reader));
  }
  std::sort(result.units.begin(), result.units.end(),
            [](const UnitState& a, const UnitState& b) { return a.key < b.key; });
  return result;
}

void Sparsifier::load(const SparsifierState& state) {
  const comm::CallSite site{.operation = kSparsifier};
  std::vector<const UnitState*> found(known_.size(), nullptr);
  std::vector<SoftMask> soft(units_.size());
  comm::agree(groups_.world, site, [&] {
    require(state.version == SparsifierState::kVersion, kSparsifier, "version", state.version,
            "is not " + to_text(SparsifierState::kVersion) + ", which this build reads");
    require(state.config_hash == config_hash(), kSparsifier, "config_hash", state.config_hash,
            "differs from " + to_text(config_hash()) +
                " of this configuration; resume with the one it was saved with");
    for (size_t i = 0; i < known_.size(); ++i) {
      for (const UnitState& saved : state.units) {
        if (saved.key == known_[i].key) found[i] = &saved;
      }
      if (found[i] == nullptr) {
        fail_sparsifier("state", known_[i].name,
                        "has no mask in it (" + to_string(known_[i].key) + ")");
      }
    }
    for (size_t u = 0; u < units_.size(); ++u) {
      const Unit& mine = states_[u];
      const UnitState& saved = *found[mine.place];
      const std::string& name = units_[u].name;
      for (const PackedMask* mask : {&saved.mask, &saved.ever_active}) {
        if (mask->rows() != mine.layout.rows || mask->cols() != mine.layout.cols) {
          fail_sparsifier("mask of " + name, to_text(mask->rows()) + "x" + to_text(mask->cols()),
                          "is not of " + to_text(mine.layout.rows) + "x" +
                              to_text(mine.layout.cols) + " atoms");
        }
      }
      if (config_.forward.is_soft()) {
        soft[u] = restore_soft_mask(config_.forward, mine.layout, mine.nnz, saved.mask,
                                    saved.backward, saved.chosen_step, units_[u].weight(), name);
        continue;
      }
      check_saved_budget(u, saved, state.step);
    }
    check_saved_sum(found, state.step);
    std::vector<const PackedMask*> masks;
    for (const Unit& mine : states_) masks.push_back(&found[mine.place]->mask);
    check_saved_neurons(masks);
  });
  std::vector<size_t> units;
  std::vector<uint64_t> fingerprints;
  for (size_t u = 0; u < units_.size(); ++u) {
    units.push_back(u);
    fingerprints.push_back(found[states_[u].place]->mask.fingerprint());
  }
  require_same_fingerprints(units, fingerprints, "saved mask", site);
  // The clocks of all units, also of those on other ranks.
  uint64_t clock = std::bit_cast<uint64_t>(state.mean_rows);
  for (size_t i = 0; i < known_.size(); ++i) {
    clock = kernels::splitmix64(clock ^ std::bit_cast<uint64_t>(found[i]->load));
    for (const int64_t count : {found[i]->num_rows, found[i]->total_rows, found[i]->window,
                                found[i]->load_rows, found[i]->nnz}) {
      clock = kernels::splitmix64(clock ^ static_cast<uint64_t>(count));
    }
  }
  for (const int64_t count : {state.num_counted_steps, state.step}) {
    clock = kernels::splitmix64(clock ^ static_cast<uint64_t>(count));
  }
  std::vector<uint64_t> clocks(static_cast<size_t>(groups_.world.size()));
  comm::all_gather(&clock, sizeof(clock), clocks.data(), groups_.world, site);
  require_same_on_ranks(clocks, "counts of rows", groups_.world.rank(), site);

  for (size_t i = 0; i < known_.size(); ++i) {
    known_[i].total_rows = found[i]->total_rows;
    known_[i].window = found[i]->window;
    known_[i].load = found[i]->load;
    known_[i].load_rows = found[i]->load_rows;
  }
  mean_rows_ = state.mean_rows;
  num_counted_steps_ = state.num_counted_steps;
  for (Hidden& layer : hidden_) layer.candidates.clear();  // set_mask takes them away
  for (size_t u = 0; u < units_.size(); ++u) {
    Unit& mine = states_[u];
    const UnitState& saved = *found[mine.place];
    mine.ever_active = saved.ever_active;
    if (config_.forward.is_soft()) {
      set_soft_mask(u, std::move(soft[u]));
      set_factors(config_.forward, std::max<int64_t>(state.step, 0), mine.soft);
    } else {
      mine.nnz = saved.nnz;
      set_frame(u, saved.frame);
      set_mask(u, saved.mask);
      change_compressed(u, saved.mask, GrownSecondMoment::kMean, {});
    }
    mine.num_rows = saved.num_rows;
    mine.num_pending = 0;
    if (units_[u].row_counts != nullptr) {
      mine.num_rows_seen = units_[u].row_counts->rows[units_[u].row_slot];
    }
    mine.num_updates = saved.num_updates;
    mine.num_skipped = saved.num_skipped;
    mine.churn_sum = saved.churn_sum;
    const auto restored = [&](const at::Tensor& sum) {
      return sum.defined() ? sum.clone().to(units_[u].weight().device()) : at::Tensor();
    };
    mine.grad_sum = restored(saved.grad_sum);
    mine.active_sum = restored(saved.active_sum);
    mine.energy_sum = restored(saved.energy_sum);
    mine.candidates_step = -1;
    mine.link_gradient = at::Tensor();
    mine.link_energy = at::Tensor();
  }
  is_started_ = false;
  last_step_ = state.step;
}

}  // namespace perseid
