#include "kernels/stream.h"

#include <string>

#include "kernels/error.h"

namespace perseid::kernels {

void require_device(const Stream& stream, const char* operation, const char* way_out) {
  if (stream.device != Device::kCpu) {
    throw ConfigError(ErrorDetail{operation, "device", "cuda",
                                  std::string("has no kernel for this operation; ") + way_out});
  }
}

}  // namespace perseid::kernels
