#include "moe/grouped_gemm.h"

#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <vector>

namespace perseid {
namespace {

constexpr int64_t kExpertsMax = 1023;  // at::_grouped_mm prepares its groups in one block

/// Calls body(expert, first row, number of rows) for the experts that have any.
template <typename Body>
void for_each_expert(const LocalPlan& plan, Body&& body) {
  const std::vector<int64_t> offsets = plan.host_offsets();
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    const int64_t count = offsets[e + 1] - offsets[e];
    if (count > 0) body(static_cast<int64_t>(e), offsets[e], count);
  }
}

/// Dense, and each row begins at a multiple of 16 bytes.
bool has_aligned_rows(const at::Tensor& tensor) {
  return tensor.is_contiguous() && tensor.size(-1) * tensor.element_size() % 16 == 0 &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

}  // namespace

GroupedGemm::GroupedGemm(const LocalPlan& plan, Backend backend)
    : plan_(plan), backend_(backend), ends_(plan.expert_ends()) {}

bool GroupedGemm::fits_aten(const at::Tensor& a, const at::Tensor& b) const {
  const int64_t num_experts = plan_.num_local_experts();
  return backend_ == Backend::kAuto && a.scalar_type() != at::kDouble && num_experts >= 1 &&
         num_experts <= kExpertsMax && plan_.num_assignments > 0 && has_aligned_rows(a) &&
         has_aligned_rows(b);
}

at::Tensor GroupedGemm::forward(const at::Tensor& rows, const at::Tensor& weight) const {
  if (fits_aten(rows, weight)) return at::_grouped_mm(rows, weight.transpose(1, 2), ends_);
  const at::Tensor out = at::empty({rows.size(0), weight.size(1)}, rows.options());
  for_each_expert(plan_, [&](int64_t e, int64_t begin, int64_t count) {
    at::Tensor part = out.narrow(0, begin, count);
    at::mm_out(part, rows.narrow(0, begin, count), weight.select(0, e).t());
  });
  return out;
}

at::Tensor GroupedGemm::grad_input(const at::Tensor& grad, const at::Tensor& weight) const {
  if (fits_aten(grad, weight)) return at::_grouped_mm(grad, weight, ends_);
  const at::Tensor out = at::empty({grad.size(0), weight.size(2)}, grad.options());
  for_each_expert(plan_, [&](int64_t e, int64_t begin, int64_t count) {
    at::Tensor part = out.narrow(0, begin, count);
    at::mm_out(part, grad.narrow(0, begin, count), weight.select(0, e));
  });
  return out;
}

at::Tensor GroupedGemm::grad_weight(const at::Tensor& grad, const at::Tensor& rows) const {
  // The one layout of this product whose groups may be empty and of any length: see the rules of
  // at::_grouped_mm for two matrices.
  if (fits_aten(grad, rows)) return at::_grouped_mm(grad.t(), rows, ends_);
  const at::Tensor out =
      at::zeros({plan_.num_local_experts(), grad.size(1), rows.size(1)}, grad.options());
  for_each_expert(plan_, [&](int64_t e, int64_t begin, int64_t count) {
    at::Tensor part = out.select(0, e);
    at::mm_out(part, grad.narrow(0, begin, count).t(), rows.narrow(0, begin, count));
  });
  return out;
}

}  // namespace perseid
