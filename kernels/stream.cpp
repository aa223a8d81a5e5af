#include "kernels/stream.h"

#include "kernels/error.h"

namespace perseid::kernels {

void require_device(const Stream& stream, const char* operation) {
  if (stream.device != Device::kCpu) {
    throw ConfigError(ErrorDetail{operation, "device", "cuda",
                                  "has no kernel for this operation; give it CPU memory"});
  }
}

}  // namespace perseid::kernels
