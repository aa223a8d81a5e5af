#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "comm/group.h"

namespace perseid::comm {

/// What a session needs of MPI itself; mpi_stub.cpp stands in for a build without MPI.
bool has_mpi();

/// Initialises MPI unless somebody else has. Returns whether this call did. Throws ConfigError if
/// the library does not allow calls from any thread, one at a time.
bool initialise_mpi();
void finalise_mpi();
[[noreturn]] void abort_mpi(int exit_code);

/// How a rank ended.
struct Farewell {
  int64_t status = 0;      ///< exit status, 0: well
  uint64_t text_hash = 0;  ///< of the error without the rank that speaks
};

/// The last message of a program: [P] farewells in rank order, or nothing if they did not all come
/// in time. Works after the group has failed too. `world` is an mpi_group().
std::vector<Farewell> exchange_farewells(const Group& world, const Farewell& mine,
                                         int64_t timeout_ms);

}  // namespace perseid::comm
