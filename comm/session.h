#pragma once
#include <functional>
#include <string>

#include "comm/group.h"
#include "comm/launcher.h"

namespace perseid::comm {

/// What a program may ask for: --comm and --launcher.
struct SessionOptions {
  std::string comm = "auto";      ///< auto, self, local or mpi (nccl: not in this build)
  std::string launcher = "auto";  ///< auto, mpi, slurm, torchrun or single
  int local_ranks = 1;            ///< threads as ranks; only with comm = local
};

/// "launcher mpirun, 4 ranks on 1 host": for the first line of a program.
std::string describe(const LaunchInfo& launch, const Group& world, int num_hosts);

/// Collective. Number of different hosts that the ranks of `group` run on.
int count_hosts(const Group& group);

/// "Open MPI 4.1.4", or "none" in a build without MPI.
std::string mpi_version();

/// Runs body(world) with the group that the options and the launcher ask for, and returns the exit
/// status for main: 0, or the exit_code() of the exception that ended it (71 for std::bad_alloc, 70
/// for other foreign ones), whose text was printed to stderr, with the rank in front if there are
/// several. Ranks that fail alike print one line. No rank returns 0 if another failed.
///   self, local  body runs in this process, for local once on each of `local_ranks` threads
///   mpi          initialises MPI if needed, and finalises it after body on all ranks; if a rank
///                leaves by an exception that its peers do not share, MPI_Abort(exit_code) ends the
///                job, so that no rank waits for ever
int run_session(const SessionOptions& options, const std::function<void(const Group&)>& body);

}  // namespace perseid::comm
