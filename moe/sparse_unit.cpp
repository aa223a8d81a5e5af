#include "moe/sparse_unit.h"

#include "kernels/error.h"

namespace perseid {
namespace {

const char* name_of(Matrix matrix) {
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
  return "layer " + to_text(key.layer) + ", expert " + to_text(key.expert) + ", " +
         name_of(key.matrix);
}

}  // namespace perseid
