#include "moe/sparsifier_unit.h"

namespace perseid {

at::Tensor SparseUnit::weight() const { return slot_of(parameter.detach(), slot); }

std::vector<SparseUnit> expert_units(const std::string& name, const at::Tensor& parameter,
                                     int64_t layer, Matrix matrix,
                                     const std::vector<int64_t>& expert_ids) {
  if (parameter.dim() != 3 || parameter.size(0) != static_cast<int64_t>(expert_ids.size())) {
    fail_sparsifier("parameter of " + name, to_text(parameter.sizes()),
                    "is not [experts, out, in] of " + to_text(expert_ids.size()) + " experts");
  }
  std::vector<SparseUnit> units;
  for (size_t slot = 0; slot < expert_ids.size(); ++slot) {
    SparseUnit unit;
    unit.name = name + "." + to_text(expert_ids[slot]);
    unit.key = {layer, expert_ids[slot], matrix};
    unit.parameter = parameter;
    unit.slot = static_cast<int64_t>(slot);
    units.push_back(unit);
  }
  return units;
}

}  // namespace perseid
