#pragma once

namespace perseid {

/// Makes kernels run on LibTorch's thread pool (at::parallel_for), so that one pool serves both.
/// Constructors of experts and layers call it; more calls do nothing.
void use_libtorch_threads();

}  // namespace perseid
