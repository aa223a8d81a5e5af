#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace perseid {

/// The parts of a layer's parameter that a soft method replaces in the products, see
/// moe/soft_mask.h. The layer makes it and computes with `of`; the Sparsifier of the parts fills it
/// while it lives.
class EffectiveParts {
 public:
  using Effective = std::function<at::Tensor(const at::Tensor& weight)>;

  /// @param slot     parameter[slot] has the rows; -1: the parameter has
  /// @param num_out  rows [first_out, first_out + num_out), -1: all; parts do not overlap
  void set(int64_t slot, int64_t first_out, int64_t num_out, Effective effective);
  void erase(int64_t slot, int64_t first_out);
  bool contains(int64_t slot, int64_t first_out) const;

  /// What to compute with, differentiable: the parameter itself without parts, else a copy in which
  /// each part is replaced.
  /// @param parameter  [out, in], or [L, out, in] for parts with slots
  at::Tensor of(const at::Tensor& parameter) const;

 private:
  struct Part {
    int64_t slot = -1;
    int64_t first_out = 0;
    int64_t num_out = -1;
    Effective effective;
  };
  static at::Tensor replaced(const at::Tensor& weight, std::vector<const Part*> parts);
  std::vector<Part> parts_;
};

}  // namespace perseid
