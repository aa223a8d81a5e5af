#include "comm/launcher.h"

#include <charconv>
#include <cstdlib>
#include <limits>

#include "kernels/error.h"

namespace perseid::comm {
namespace {

/// Reads variables; an error names variable and value.
class Variables {
 public:
  explicit Variables(const Environment& environment) : environment_(environment) {}

  bool has(const char* name) const { return environment_(name).has_value(); }

  int number(const char* name, int min, int max) const {
    const std::optional<std::string> text = environment_(name);
    if (!text.has_value()) {
      throw ConfigError(ErrorDetail{"detect_launcher", name, "unset",
                                    "but other variables of its launcher are set; start all ranks "
                                    "with one launcher, or choose --launcher single"});
    }
    int value = 0;
    const char* end = text->data() + text->size();
    const std::from_chars_result parsed = std::from_chars(text->data(), end, value);
    const bool is_number = parsed.ec == std::errc{} && parsed.ptr == end;
    require(is_number && value >= min && value <= max, "detect_launcher", name, *text,
            "is not a whole number in [" + to_text(min) + ", " + to_text(max) +
                "]; correct it, or choose --launcher single");
    return value;
  }

  LaunchInfo launch(Launcher launcher, const char* text, const char* rank, const char* size,
                    const char* local_rank) const {
    LaunchInfo info;
    info.launcher = launcher;
    info.name = text;
    info.size = number(size, 1, std::numeric_limits<int>::max());
    info.rank = number(rank, 0, info.size - 1);
    info.local_rank = has(local_rank) ? number(local_rank, 0, info.size - 1) : 0;
    return info;
  }

 private:
  const Environment& environment_;
};

bool is_mpirun(const Variables& variables) {
  return variables.has("OMPI_COMM_WORLD_RANK") || variables.has("OMPI_COMM_WORLD_SIZE");
}

LaunchInfo mpi_launch(const Variables& variables) {
  if (is_mpirun(variables)) {
    return variables.launch(Launcher::kMpi, "mpirun", "OMPI_COMM_WORLD_RANK",
                            "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK");
  }
  return variables.launch(Launcher::kMpi, "srun (PMIx)", "PMIX_RANK", "SLURM_NTASKS",
                          "SLURM_LOCALID");
}

LaunchInfo torchrun_launch(const Variables& variables) {
  return variables.launch(Launcher::kTorchrun, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK");
}

LaunchInfo slurm_launch(const Variables& variables) {
  return variables.launch(Launcher::kSlurm, "srun", "SLURM_PROCID", "SLURM_NTASKS",
                          "SLURM_LOCALID");
}

bool is_slurm(const Variables& variables) {
  if (!variables.has("SLURM_NTASKS")) return false;
  return variables.number("SLURM_NTASKS", 1, std::numeric_limits<int>::max()) > 1;
}

void require_variables(bool are_set, const std::string& requested, const char* names) {
  require(are_set, "detect_launcher", "launcher", requested,
          std::string("but ") + names +
              " is not set; start with that launcher, or choose --launcher auto");
}

}  // namespace

Environment process_environment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* value = std::getenv(name.c_str());
    return value == nullptr ? std::nullopt : std::optional<std::string>(value);
  };
}

int device_of(const LaunchInfo& launch, int num_devices) {
  require(num_devices > 0, "device_of", "num_devices", num_devices,
          "is below 1; ask only where there is a GPU");
  return launch.local_rank % num_devices;
}

LaunchInfo detect_launcher(const Environment& environment, const std::string& requested) {
  const Variables variables(environment);
  const bool is_mpi = is_mpirun(variables) || variables.has("PMIX_RANK");
  const bool is_torchrun = variables.has("RANK") && variables.has("WORLD_SIZE");
  if (requested == "mpi") {
    require_variables(is_mpi, requested, "OMPI_COMM_WORLD_RANK or PMIX_RANK");
    return mpi_launch(variables);
  }
  if (requested == "torchrun") {
    require_variables(is_torchrun, requested, "RANK or WORLD_SIZE");
    return torchrun_launch(variables);
  }
  if (requested == "slurm") {
    const bool is_complete = variables.has("SLURM_PROCID") && variables.has("SLURM_NTASKS");
    require_variables(is_complete, requested, "SLURM_PROCID or SLURM_NTASKS");
    return slurm_launch(variables);
  }
  if (requested == "single") return LaunchInfo{};
  require(requested == "auto", "detect_launcher", "launcher", requested,
          "is not a launcher; choose auto, mpi, slurm, torchrun or single");
  if (is_mpi) return mpi_launch(variables);
  if (is_torchrun) return torchrun_launch(variables);
  if (is_slurm(variables)) return slurm_launch(variables);
  return LaunchInfo{};
}

}  // namespace perseid::comm
