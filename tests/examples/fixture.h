#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "comm/launcher.h"
#include "examples/common/data_folder.h"
#include "examples/common/fashion_mnist.h"
#include "examples/train_fashion/domains.h"
#include "kernels/error.h"

namespace perseid::examples {

/// 256 training and 64 test images of Fashion-MNIST.
inline std::string fixture_folder() { return PERSEID_FIXTURES "/fashion-mnist"; }

/// The published set, if it is on this machine.
inline std::optional<FashionMnist> whole_fashion_mnist() {
  const DataSet set = fashion_mnist_set();
  try {
    return load_fashion_mnist(
        find_data_folder(set, data_places(set, "", comm::process_environment())));
  } catch (const IoError&) {
    return std::nullopt;
  }
}

inline const DomainData& fixture_data() {
  static const DomainData data = make_domains(load_fashion_mnist(fixture_folder()), 0);
  return data;
}

/// The text of the error of type E that `body` throws; a text that no test expects if there is
/// none.
template <typename E, typename Body>
std::string error_text(Body&& body) {
  try {
    body();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another exception: ") + error.what();
  }
  return "no exception";
}

/// Largest difference as a share of the largest value.
inline double relative_difference(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return INFINITY;
  double scale = 0;
  double difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) return INFINITY;
    scale = std::max(scale, std::abs(a[i]));
    difference = std::max(difference, std::abs(a[i] - b[i]));
  }
  return scale > 0 ? difference / scale : difference;
}

}  // namespace perseid::examples
