#pragma once
#include <string>

#include "kernels/error.h"

namespace perseid::testing {

/// The text of the ConfigError that `body` throws, or "no ConfigError".
template <typename Body>
std::string config_error(Body&& body) {
  try {
    body();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no ConfigError";
}

}  // namespace perseid::testing
