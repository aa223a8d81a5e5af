#pragma once
#include <optional>
#include <string>

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

}  // namespace perseid::examples
