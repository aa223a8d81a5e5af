#pragma once
#include <driver_types.h>

namespace perseid::kernels {

/// Throws an Error that names operation and CUDA call, unless the call succeeded: OutOfMemory for
/// device memory, ConfigError for a missing or wrong driver or device, else InternalError.
void cuda_check(cudaError_t status, const char* operation, const char* call);

}  // namespace perseid::kernels
