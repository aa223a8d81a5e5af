#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/normalization.h>

#include <algorithm>

#include "gates/gate.h"
#include "moe/experts.h"
#include "moe/sparsifier_unit.h"

namespace perseid {
namespace {

void collect_matrices(const torch::nn::Module& module, const std::string& prefix,
                      std::vector<SparseUnit>& units) {
  const bool is_left_out = dynamic_cast<const Experts*>(&module) != nullptr ||
                           dynamic_cast<const gates::Gate*>(&module) != nullptr ||
                           dynamic_cast<const torch::nn::EmbeddingImpl*>(&module) != nullptr ||
                           dynamic_cast<const torch::nn::EmbeddingBagImpl*>(&module) != nullptr ||
                           dynamic_cast<const torch::nn::LayerNormImpl*>(&module) != nullptr;
  if (is_left_out) return;
  for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
    const at::Tensor& value = parameter.value();
    const bool is_tied = std::any_of(units.begin(), units.end(), [&](const SparseUnit& unit) {
      return unit.parameter.is_same(value);
    });
    if (value.dim() != 2 || !value.requires_grad() || is_tied) continue;
    SparseUnit unit;
    unit.name = prefix + parameter.key();
    unit.parameter = value;
    unit.has_bias = module.named_parameters(/*recurse=*/false).contains("bias");
    units.push_back(unit);
  }
  for (const auto& child : module.named_children()) {
    collect_matrices(*child.value(), prefix + child.key() + ".", units);
  }
}

}  // namespace

at::Tensor SparseUnit::part_of(const at::Tensor& tensor) const {
  const at::Tensor whole = slot < 0 ? tensor : tensor.select(0, slot);
  return num_out < 0 ? whole : whole.narrow(0, first_out, num_out);
}
at::Tensor SparseUnit::weight() const { return part_of(parameter.detach()); }

std::vector<SparseUnit> module_matrices(const torch::nn::Module& module) {
  std::vector<SparseUnit> units;
  collect_matrices(module, "", units);
  // By name: the order in which modules were registered does not matter.
  std::sort(units.begin(), units.end(),
            [](const SparseUnit& a, const SparseUnit& b) { return a.name < b.name; });
  if (units.size() > static_cast<size_t>(kMaxNumberedMatrices)) {
    fail_sparsifier("module", to_text(units.size()) + " matrices",
                    "exceeds " + to_text(kMaxNumberedMatrices) + "; pass its parts one by one");
  }
  for (size_t n = 0; n < units.size(); ++n) {
    units[n].key.matrix = numbered_matrix(static_cast<int64_t>(n));
  }
  return units;
}

std::vector<SparseUnit> sparse_units(const torch::nn::Module& module, const std::string& pattern,
                                     int64_t layer) {
  std::vector<SparseUnit> units = module_matrices(module);
  std::string names;
  for (const SparseUnit& unit : units) names += (names.empty() ? "" : ", ") + unit.name;
  std::erase_if(units, [&](const SparseUnit& unit) { return !fits_pattern(pattern, unit.name); });
  if (units.empty()) {
    fail_sparsifier("pattern", pattern,
                    names.empty() ? "fits no matrix, as " + module.name() + " has none"
                                  : "fits none of " + names + "; correct it");
  }
  for (SparseUnit& unit : units) {
    unit.key.layer = layer;
    unit.name = "layer" + to_text(layer) + "." + unit.name;
  }
  return units;
}

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
    unit.holders = Holders::kReplicas;
    units.push_back(unit);
  }
  return units;
}

}  // namespace perseid
