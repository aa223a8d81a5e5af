#include "moe/experts.h"

#include <algorithm>
#include <limits>

#include "gates/describe.h"
#include "gates/device.h"
#include "kernels/error.h"
#include "moe/row_counts.h"
#include "moe/sparsifier.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"

namespace perseid {

Experts::Experts(std::string name, std::vector<int64_t> expert_ids, int64_t d_in, int64_t d_out)
    : torch::nn::Module(std::move(name)),
      expert_ids_(std::move(expert_ids)),
      d_in_(d_in),
      d_out_(d_out),
      row_counts_(std::make_shared<RowCounts>()) {
  const char* operation = this->name().c_str();
  const auto require_width = [operation](const char* argument, int64_t width) {
    require(width >= 1, operation, argument, width, "must be at least 1");
    require(width <= std::numeric_limits<int32_t>::max(), operation, argument, width,
            "must be below 2^31");
  };
  require_width("d_in", d_in_);
  require_width("d_out", d_out_);
  for (size_t slot = 0; slot < expert_ids_.size(); ++slot) {
    const std::string argument = "expert_ids[" + to_text(slot) + "]";
    require(expert_ids_[slot] >= 0, operation, argument.c_str(), expert_ids_[slot],
            "must be at least 0");
    require(slot == 0 || expert_ids_[slot] > expert_ids_[slot - 1], operation, argument.c_str(),
            expert_ids_[slot], "must be larger than the id before it; sort the ids, each once");
  }
  row_counts_->rows.resize(expert_ids_.size());
  use_libtorch_threads();
}

std::vector<SparseUnit> Experts::matrices() const { return {}; }

std::vector<std::string> Experts::matrix_names() const {
  std::vector<std::string> names;
  for (const SparseUnit& unit : matrices()) {
    if (unit.key.expert == expert_ids_.front()) names.push_back(unit.name);
  }
  return names;
}

std::vector<SparseUnit> Experts::sparse_units(int64_t layer, const std::string& pattern) const {
  std::vector<SparseUnit> units = matrices();
  const std::vector<std::string> names = matrix_names();
  // A rank without experts has no units, and need not know any names.
  require(!names.empty() || expert_ids_.empty(), name().c_str(), "sparse_units", "none",
          "of these experts' parameters can be sparse; override Experts::matrices");
  const bool fits = std::any_of(names.begin(), names.end(), [&](const std::string& matrix) {
    return fits_pattern(pattern, matrix);
  });
  std::string list;
  for (const std::string& matrix : names) list += (list.empty() ? "" : ", ") + matrix;
  require(fits || names.empty(), name().c_str(), "pattern", pattern,
          "fits none of " + list + "; correct it");
  std::erase_if(units, [&](const SparseUnit& unit) { return !fits_pattern(pattern, unit.name); });
  for (SparseUnit& unit : units) {
    const int64_t id = unit.key.expert;
    const auto slot = std::find(expert_ids_.begin(), expert_ids_.end(), id) - expert_ids_.begin();
    unit.name = "layer" + to_text(layer) + (replicated_ ? ".shared" : ".expert") + to_text(id) +
                "." + unit.name;
    unit.key.layer = layer;
    if (replicated_) unit.key.expert = -1 - id;
    unit.holders = replicated_ ? Holders::kAllRanks : Holders::kReplicas;
    unit.row_counts = row_counts_;
    unit.row_slot = static_cast<size_t>(slot);
  }
  return units;
}

void Experts::require_inputs(const at::Tensor& rows, const at::Tensor& weights,
                             const std::shared_ptr<const RoutingPlan>& routing_plan) const {
  const char* operation = name().c_str();
  require(routing_plan != nullptr, operation, "plan", "null",
          "is none; make_routing_plan makes it");
  const LocalPlan& plan = routing_plan->local;
  require(rows.defined(), operation, "rows", "undefined", "is no tensor");
  gates::stream_of(rows, operation);  // throws for devices without kernels
  require(weights.defined() && weights.device() == rows.device(), operation, "weights",
          weights.defined() ? gates::describe(weights) + " on " + to_text(weights.device())
                            : "undefined",
          "must be a tensor on the device of the rows, " + to_text(rows.device()));
  dtype_of(rows, operation);  // throws for others
  require(rows.dim() == 2 && rows.size(1) == d_in_, operation, "rows", rows.sizes(),
          "must be [N, d_in] with d_in=" + to_text(d_in_));
  require(rows.size(0) == plan.num_rows, operation, "rows", rows.sizes(),
          "differs from num_rows=" + to_text(plan.num_rows) + " of the plan");
  require(weights.dim() == 2 && weights.size(0) == plan.num_assignments && weights.size(1) >= 1,
          operation, "weights", weights.sizes(),
          "must be [R, G] with R=" + to_text(plan.num_assignments) +
              " assignments of the plan and G >= 1 gates");
  require(weights.scalar_type() == weight_type(rows), operation, "weights.dtype",
          weights.scalar_type(),
          "must be " + to_text(weight_type(rows)) + " for rows of " + to_text(rows.scalar_type()));
  require(plan.num_local_experts() == num_local_experts(), operation, "plan experts",
          plan.num_local_experts(),
          "differs from the " + to_text(num_local_experts()) + " experts of this rank");
}

}  // namespace perseid
