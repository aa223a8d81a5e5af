#include "examples/bench/plain_alltoall.h"
#include "kernels/error.h"

namespace perseid::bench {

bool PlainAllToAll::available(const comm::Group&) { return false; }

void PlainAllToAll::operator()(const float*, float*, int64_t, int) const {
  throw ConfigError(
      ErrorDetail{"plain_alltoall", "", "", "built without MPI; configure with -DPERSEID_MPI=ON"});
}

}  // namespace perseid::bench
