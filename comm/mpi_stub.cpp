#include <cstdlib>

#include "comm/mpi_runtime.h"
#include "comm/session.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

[[noreturn]] void throw_no_mpi() {
  ErrorDetail detail;
  detail.operation = "mpi_group";
  detail.limit =
      "built without MPI; configure with -DPERSEID_MPI=ON, or choose --comm tcp, local or self";
  throw ConfigError(detail);
}

}  // namespace

bool has_mpi() { return false; }
bool initialise_mpi() { throw_no_mpi(); }
void finalise_mpi() {}
void abort_mpi(int exit_code) { std::_Exit(exit_code); }
std::vector<Farewell> exchange_farewells(const Group&, const Farewell&, int64_t) { throw_no_mpi(); }
Group mpi_group() { throw_no_mpi(); }
std::string mpi_version() { return "none"; }

}  // namespace perseid::comm
