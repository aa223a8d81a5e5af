#include "moe/ops/arguments.h"

namespace perseid::ops {

const c10::IValue& Arguments::operator[](std::string_view name) const {
  const auto index = schema_.argumentIndexWithName(name);
  PERSEID_INVARIANT(index.has_value());
  return values_[static_cast<size_t>(*index)];
}

at::Tensor Arguments::tensor(std::string_view name) const {
  const c10::IValue& value = (*this)[name];
  return value.isNone() ? at::Tensor() : value.toTensor();
}

void require_sizes(const char* operation, const char* argument, const at::Tensor& tensor,
                   at::IntArrayRef sizes) {
  if (!tensor.defined() || (tensor.sizes() == sizes && tensor.is_floating_point())) return;
  require(false, operation, argument, to_text(tensor.scalar_type()) + to_text(tensor.sizes()),
          "is not a floating tensor " + to_text(sizes));
}

}  // namespace perseid::ops
