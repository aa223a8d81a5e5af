#include "comm/nccl_group.h"
#include "kernels/error.h"

namespace perseid::comm {

Group nccl_group() {
  ErrorDetail detail;
  detail.operation = "nccl_group";
  detail.limit = "built without NCCL; choose --comm mpi, local or self";
  throw ConfigError(detail);
}

}  // namespace perseid::comm
