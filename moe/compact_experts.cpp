#include "moe/compact_experts.h"

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "kernels/error.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

constexpr const char* kCompactExperts = "compact_experts";

std::vector<int64_t> active_units(const PackedMask& mask) {
  std::vector<int64_t> result;
  for (int64_t place = 0; place < mask.num_places(); ++place) {
    if (mask.test(place)) result.push_back(place);
  }
  return result;
}

}  // namespace

CompactExperts compact_experts(const at::Tensor& up_proj, const at::Tensor& down_proj, bool gated,
                               const std::vector<PackedMask>& active, int64_t multiple) {
  const int64_t parts = gated ? 2 : 1;
  require(up_proj.dim() == 3 && down_proj.dim() == 3 && up_proj.size(0) == down_proj.size(0) &&
              up_proj.size(1) == parts * down_proj.size(2),
          kCompactExperts, "up_proj", to_text(up_proj.sizes()),
          "does not go with down_proj=" + to_text(down_proj.sizes()) + "; they are [L, " +
              (gated ? "2F" : "F") + ", D] and [L, d_out, F]");
  require(multiple >= 1, kCompactExperts, "multiple", multiple, "is below 1");
  const int64_t num_experts = up_proj.size(0), width = down_proj.size(2);
  require(static_cast<int64_t>(active.size()) == num_experts, kCompactExperts, "active",
          active.size(), "masks are not one for each of " + to_text(num_experts) + " experts");
  int64_t compact = 0;
  for (const PackedMask& mask : active) {
    require(mask.rows() == 1 && mask.cols() == width, kCompactExperts, "active",
            to_text(mask.rows()) + "x" + to_text(mask.cols()),
            "is not one row of F=" + to_text(width));
    compact = std::max(compact, mask.count());
  }
  compact = std::min((compact + multiple - 1) / multiple * multiple, width);

  const c10::NoGradGuard no_grad;
  CompactExperts result;
  result.up_proj = at::zeros({num_experts, parts * compact, up_proj.size(2)}, up_proj.options());
  result.down_proj = at::zeros({num_experts, down_proj.size(1), compact}, down_proj.options());
  result.units = at::full({num_experts, compact}, -1, at::kLong);
  for (int64_t slot = 0; slot < num_experts; ++slot) {
    const std::vector<int64_t> units = active_units(active[static_cast<size_t>(slot)]);
    const auto count = static_cast<int64_t>(units.size());
    const at::Tensor mine = result.units.select(0, slot).narrow(0, 0, count);
    std::copy(units.begin(), units.end(), mine.mutable_data_ptr<int64_t>());
    const at::Tensor places = mine.to(up_proj.device());
    for (int64_t part = 0; part < parts; ++part) {  // W1, then W3
      const at::Tensor rows = up_proj.select(0, slot).narrow(0, part * width, width);
      result.up_proj.select(0, slot)
          .narrow(0, part * compact, count)
          .copy_(rows.index_select(0, places));
    }
    result.down_proj.select(0, slot)
        .narrow(1, 0, count)
        .copy_(down_proj.select(0, slot).index_select(1, places));
  }
  return result;
}

}  // namespace perseid
