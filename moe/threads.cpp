#include "moe/threads.h"

#include <ATen/Parallel.h>

#include <mutex>

#include "kernels/parallel.h"

// at::parallel_for is an inline OpenMP region: compiled without -fopenmp it runs on the calling
// thread. Grad mode and dispatch keys do not reach its threads; kernels see raw pointers only.

namespace perseid {
namespace {
int pool_threads() {
#ifdef _OPENMP
  return at::get_num_threads();
#else
  return 1;
#endif
}
}  // namespace

void use_libtorch_threads() {
  static std::once_flag once;
  std::call_once(once, [] {
    kernels::set_parallel_for(
        [](int64_t begin, int64_t end, int64_t grain,
           const std::function<void(int64_t, int64_t)>& body) {
          at::parallel_for(begin, end, grain, body);
        },
        pool_threads);
  });
}

}  // namespace perseid
