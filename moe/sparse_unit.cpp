#include "moe/sparse_unit.h"

#include "kernels/error.h"

namespace perseid {
namespace {

std::string name_of(Matrix matrix) {
  if (matrix >= Matrix::kNumbered) {
    return "weight " +
           to_text(static_cast<int64_t>(matrix) - static_cast<int64_t>(Matrix::kNumbered));
  }
  switch (matrix) {
    case Matrix::kW1:
      return "w1";
    case Matrix::kW3:
      return "w3";
    case Matrix::kW2:
      return "w2";
    default:
      return "weight";
  }
}

}  // namespace

std::string to_string(const UnitKey& key) {
  const std::string expert = key.expert < 0 ? "shared expert " + to_text(-1 - key.expert)
                                            : "expert " + to_text(key.expert);
  return "layer " + to_text(key.layer) + ", " + expert + ", " + name_of(key.matrix);
}

}  // namespace perseid
