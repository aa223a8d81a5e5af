#pragma once

namespace perseid {

/// Makes kernels run on LibTorch's thread pool (at::parallel_for), so that one pool serves both.
/// Needs OpenMP at compile time, as at::parallel_for does; without it kernels use one thread.
/// Constructors of experts and layers call it; more calls do nothing.
void use_libtorch_threads();

}  // namespace perseid
