#pragma once
#include <functional>
#include <optional>
#include <string>

namespace perseid::comm {

/// Value of an environment variable, or nothing. The real one is std::getenv.
using Environment = std::function<std::optional<std::string>(const std::string& name)>;
Environment process_environment();

enum class Launcher { kSingle, kMpi, kTorchrun, kSlurm };

/// How this process was started.
struct LaunchInfo {
  Launcher launcher = Launcher::kSingle;
  std::string name = "single";  ///< "mpirun", "srun (PMIx)", "torchrun", "srun", "single"
  int rank = 0;
  int size = 1;
  int local_rank = 0;
};

/// A pure function of the environment. `requested` is auto, mpi, slurm, torchrun or single; auto
/// looks for Open MPI and PMIx variables, then RANK + WORLD_SIZE, then SLURM_NTASKS above 1, then
/// single. Throws ConfigError for another word, for a requested launcher whose variables are
/// missing, and for a variable that is not a number or out of range, naming variable and value.
LaunchInfo detect_launcher(const Environment& environment, const std::string& requested = "auto");

/// The GPU of a rank that sees `num_devices` > 0 of them: its local rank, from the first one again
/// if there are more ranks; the only one where a launcher shows each rank its own.
int device_of(const LaunchInfo& launch, int num_devices);

}  // namespace perseid::comm
