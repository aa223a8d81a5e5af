#pragma once
#include <functional>
#include <string>

#include "comm/group.h"
#include "comm/launcher.h"

namespace perseid::comm {

/// What a program may ask for: --comm and --launcher.
struct SessionOptions {
  std::string comm = "auto";      ///< auto, self, local, mpi, tcp or nccl
  std::string launcher = "auto";  ///< auto, mpi, slurm, torchrun or single
  int local_ranks = 1;            ///< threads as ranks; only with comm = local
};

/// "launcher mpirun, 4 ranks on 1 host": for the first line of a program. Groups over tcp and nccl
/// say so, and nccl names this rank's device.
std::string describe(const LaunchInfo& launch, const Group& world, int num_hosts);

/// Collective. Number of different hosts that the ranks of `group` run on.
int count_hosts(const Group& group);

/// "Open MPI 4.1.4", or "none" in a build without MPI.
std::string mpi_version();

/// Runs body(world) with the group that the options and the launcher ask for, and returns the exit
/// status for main: 0, or the exit_code() of the exception that ended it (71 for std::bad_alloc, 70
/// for other foreign ones), whose text was printed to stderr, with the rank in front if there are
/// several. Ranks that fail alike print one line. No rank returns 0 if another failed.
///   auto         mpi for ranks that MPI has started, else self. Several ranks with a GPU each get
///                nccl; ranks of another launcher without GPUs have no transport
///   self, local  body runs in this process, for local once on each of `local_ranks` threads
///   mpi          initialises MPI if needed, and finalises it after body on all ranks; if a rank
///                leaves by an exception that its peers do not share, MPI_Abort(exit_code) ends the
///                job, so that no rank waits for ever
///   tcp          for ranks of torchrun and of srun without MPI: see comm/tcp_group.h. If a rank
///                leaves by an exception of its own, its process ends; the others lose a peer
///   nccl         a nccl_group over mpi or tcp, whichever the launcher is for; each rank's device
///   is
///                device_of(launch)
int run_session(const SessionOptions& options, const std::function<void(const Group&)>& body);

}  // namespace perseid::comm
