#include "comm/session.h"

#include <unistd.h>

#include <array>
#include <exception>
#include <set>
#include <vector>

#include "comm/collectives.h"
#include "comm/mpi_runtime.h"
#include "comm/nccl_group.h"
#include "comm/session_outcome.h"
#include "comm/session_processes.h"
#include "kernels/device_memory.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

// ---- self, local -------------------------------------------------------------------------------
int run_self(const std::function<void(const Group&)>& body) {
  const Outcome outcome = run_body(body, self_group());
  if (outcome.status != 0) print_error(outcome.text, 0, 1);
  return outcome.status;
}

int run_threads(int size, const std::function<void(const Group&)>& body) {
  std::vector<Outcome> outcomes(static_cast<size_t>(size));
  try {
    run_local(size, [&](const Group& world) {
      try {
        body(world);
      } catch (...) {
        outcomes[static_cast<size_t>(world.rank())] = outcome_of(std::current_exception());
        throw;
      }
    });
    return 0;
  } catch (...) {
    // Those who only lost a peer have nothing to add to what the peer says.
    bool has_cause = false;
    for (const Outcome& outcome : outcomes) {
      has_cause = has_cause || (outcome.status != 0 && !outcome.is_peer_lost);
    }
    std::set<std::string> printed;
    for (int r = 0; r < size; ++r) {
      const Outcome& outcome = outcomes[static_cast<size_t>(r)];
      if (outcome.status == 0 || (outcome.is_peer_lost && has_cause)) continue;
      if (printed.insert(outcome.common_text).second) print_error(outcome.text, r, size);
    }
    const Outcome cause = outcome_of(std::current_exception());
    if (printed.empty()) print_error(cause.text, 0, 1);  // a thread could not be started
    return cause.status;
  }
}

// ---- choice ------------------------------------------------------------------------------------
bool has_gpus() { return has_nccl() && kernels::device_count() > 0; }

[[noreturn]] void refuse_auto(const LaunchInfo& launch) {
  ErrorDetail detail;
  detail.operation = "run_session";
  detail.argument = "comm";
  detail.value = "auto";
  detail.limit = "has no transport for " + to_text(launch.size) + " CPU ranks of " + launch.name +
                 "; start with mpirun, or one process with --comm local, or choose --comm tcp";
  throw ConfigError(std::move(detail));
}

void check_options(const SessionOptions& options) {
  const std::string& word = options.comm;
  const bool is_known = word == "auto" || word == "self" || word == "local" || word == "mpi" ||
                        word == "tcp" || word == "nccl";
  require(is_known, "run_session", "comm", word,
          "is not a transport; choose --comm auto, self, local, mpi, tcp or nccl");
  require(options.local_ranks >= 1, "run_session", "local_ranks", options.local_ranks,
          "is below 1; choose the number of threads");
  require(options.local_ranks == 1 || word == "local", "run_session", "local_ranks",
          options.local_ranks, "needs comm=local, not comm=" + word + "; add --comm local");
}

bool started_by_mpi() {
  const Environment environment = process_environment();
  return environment("OMPI_COMM_WORLD_SIZE").has_value() || environment("PMIX_RANK").has_value();
}

int run_chosen(const SessionOptions& options, const std::function<void(const Group&)>& body) {
  const LaunchInfo launch = detect_launcher(process_environment(), options.launcher);
  check_options(options);
  const std::string& word = options.comm;
  const bool is_mpi = launch.launcher == Launcher::kMpi;
  if (word == "self") return run_self(body);
  if (word == "local") return run_threads(options.local_ranks, body);
  if (word == "mpi") return run_mpi(UseNccl::kNo, launch, body);
  if (word == "tcp") return run_tcp(UseNccl::kNo, launch, body);
  if (word == "nccl") {
    require_nccl();
    return is_mpi && has_mpi() ? run_mpi(UseNccl::kYes, launch, body)
                               : run_tcp(UseNccl::kYes, launch, body);
  }
  if (is_mpi && (has_mpi() || launch.size > 1)) {
    return run_mpi(UseNccl::kIfOneGpuEach, launch, body);
  }
  if (launch.size == 1) return run_self(body);
  if (!has_gpus()) refuse_auto(launch);
  return run_tcp(UseNccl::kYes, launch, body);
}

}  // namespace

std::string describe(const LaunchInfo& launch, const Group& world, int num_hosts) {
  const auto counted = [](int count, const char* noun) {
    return to_text(count) + " " + noun + (count == 1 ? "" : "s");
  };
  std::string text = "launcher " + launch.name + ", " + counted(world.size(), "rank") + " on " +
                     counted(num_hosts, "host");
  const std::string backend = world.backend_name();
  if (backend == "tcp" || backend == "nccl") text += " by " + backend;
  if (backend == "nccl") {
    const int device = kernels::current_device();
    text += ", " + nccl_version() + ", device " + to_text(device) + " of " +
            to_text(kernels::device_count()) + " (" + kernels::device_bus_id(device) + ")";
  }
  return text;
}

int count_hosts(const Group& group) {
  using Name = std::array<char, 256>;
  Name mine{};
  gethostname(mine.data(), mine.size() - 1);
  std::vector<Name> names(static_cast<size_t>(group.size()));
  all_gather(mine.data(), sizeof(mine), names.data(), group, {"count_hosts"});
  return static_cast<int>(std::set<Name>(names.begin(), names.end()).size());
}

int run_session(const SessionOptions& options, const std::function<void(const Group&)>& body) {
  try {
    return run_chosen(options, body);
  } catch (...) {
    const std::exception_ptr failure = std::current_exception();
    // Every rank was given the same words: they meet once more, so that one of them prints.
    if (has_mpi() && started_by_mpi()) {
      return run_mpi(UseNccl::kNo, LaunchInfo{},
                     [&](const Group&) { std::rethrow_exception(failure); });
    }
    const Outcome outcome = outcome_of(failure);
    print_error(outcome.text, 0, 1);
    return outcome.status;
  }
}

}  // namespace perseid::comm
