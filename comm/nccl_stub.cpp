#include "comm/nccl_group.h"
#include "kernels/error.h"

namespace perseid::comm {

bool has_nccl() { return false; }
std::string nccl_version() { return "none"; }

void require_nccl() {
  ErrorDetail detail;
  detail.operation = "nccl_group";
  detail.limit =
      "built without NCCL; configure with -DPERSEID_NCCL=ON, or choose --comm mpi, tcp, local or "
      "self";
  throw ConfigError(detail);
}

Group nccl_group(const Group&) {
  require_nccl();
  return self_group();
}

}  // namespace perseid::comm
