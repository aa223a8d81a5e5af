#include "kernels/stream.h"

#include "kernels/error.h"

namespace perseid::kernels {

void require_device(const Stream& stream, const char* operation) {
  if (stream.device != Device::kCpu) {
    throw ConfigError(ErrorDetail{operation, "device", "cuda",
                                  "is not in this build; configure with -DPERSEID_CUDA=ON"});
  }
}

}  // namespace perseid::kernels
