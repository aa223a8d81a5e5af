#include "comm/session.h"

#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <set>
#include <vector>

#include "comm/collectives.h"
#include "comm/mpi_runtime.h"
#include "comm/nccl_group.h"
#include "comm/text_hash.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int kExitInternal = 70;
constexpr int kExitOutOfMemory = 71;
// How long a rank that is done waits for the others, and one that failed for those that fail alike.
constexpr int64_t kDoneWaitMs = 600000;
constexpr int64_t kAgreedWaitMs = 5000;
constexpr int64_t kFailedWaitMs = 500;

enum class Transport { kSelf, kLocal, kMpi, kNccl };

/// How body ended on a rank.
struct Outcome {
  int status = 0;
  bool is_peer_lost = false;
  bool is_agreed = false;  // all ranks of a group threw it
  std::string text;
  std::string common_text;  // without the rank that speaks, to see that ranks failed alike
};

Outcome outcome_of(const std::exception_ptr& failure) {
  Outcome outcome;
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    outcome.status = error.exit_code();
    outcome.is_peer_lost = dynamic_cast<const PeerLost*>(&error) != nullptr;
    outcome.is_agreed = error.detail().culprit >= 0 && !outcome.is_peer_lost;
    outcome.text = error.what();
    ErrorDetail detail = error.detail();
    detail.rank = -1;
    if (outcome.is_agreed) {  // in which the ranks may just have disagreed
      detail.layer = -1;
      detail.step = -1;
    }
    outcome.common_text = InternalError(std::move(detail)).what();
    return outcome;
  } catch (const std::bad_alloc&) {
    outcome.status = kExitOutOfMemory;
    outcome.text = "out of memory";
  } catch (const std::exception& error) {
    outcome.status = kExitInternal;
    outcome.text = error.what();
  } catch (...) {
    outcome.status = kExitInternal;
    outcome.text = "unknown exception";
  }
  outcome.common_text = outcome.text;
  return outcome;
}

void print_error(const std::string& text, int rank, int size) {
  const std::string front = size > 1 ? "[rank " + to_text(rank) + "] " : "";
  std::fflush(stdout);
  std::fprintf(stderr, "%serror: %s\n", front.c_str(), text.c_str());
  std::fflush(stderr);
}

Outcome run_body(const std::function<void(const Group&)>& body, const Group& world) {
  try {
    body(world);
  } catch (...) {
    return outcome_of(std::current_exception());
  }
  return {};
}

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

// ---- mpi ---------------------------------------------------------------------------------------
int64_t farewell_wait_ms(const Outcome& outcome) {
  if (outcome.status == 0) return kDoneWaitMs;
  return outcome.is_agreed ? kAgreedWaitMs : kFailedWaitMs;
}

[[noreturn]] void abort_job(const Outcome& outcome, const Group& world) {
  if (outcome.status == 0) {
    print_error("[run_session] not all ranks came to the end of the program", world.rank(),
                world.size());
    abort_mpi(PeerLost(ErrorDetail{}).exit_code());
  }
  print_error(outcome.text, world.rank(), world.size());
  abort_mpi(outcome.status);
}

// Ranks tell each other how they ended, so that none leaves with 0 when another failed.
int part(const Outcome& outcome, const Group& world) {
  if (outcome.is_peer_lost) abort_job(outcome, world);
  const Farewell mine{outcome.status, hash_text(outcome.common_text)};
  const std::vector<Farewell> all = exchange_farewells(world, mine, farewell_wait_ms(outcome));
  if (all.empty()) abort_job(outcome, world);
  int status = outcome.status;
  bool is_first = true;
  for (int p = 0; p < world.size(); ++p) {
    const Farewell& farewell = all[static_cast<size_t>(p)];
    if (status == 0) status = static_cast<int>(farewell.status);
    is_first = is_first && (p >= world.rank() || farewell.text_hash != mine.text_hash);
  }
  if (outcome.status != 0 && is_first) print_error(outcome.text, world.rank(), world.size());
  return status;
}

int run_processes(const std::function<void(const Group&)>& body) {
  bool is_ours = false;
  int status = 0;
  try {
    is_ours = initialise_mpi();
    const Group world = mpi_group();
    status = part(run_body(body, world), world);
  } catch (...) {
    const Outcome outcome = outcome_of(std::current_exception());
    print_error(outcome.text, 0, 1);
    return outcome.status;  // before there was a group; the launcher ends the other ranks
  }
  if (is_ours) finalise_mpi();
  return status;
}

// ---- choice ------------------------------------------------------------------------------------
Transport choose_auto(const LaunchInfo& launch) {
  if (launch.launcher == Launcher::kMpi && (has_mpi() || launch.size > 1)) return Transport::kMpi;
  if (launch.size == 1) return Transport::kSelf;
  ErrorDetail detail;
  detail.operation = "run_session";
  detail.argument = "comm";
  detail.value = "auto";
  detail.limit = "has no transport for " + to_text(launch.size) + " CPU ranks of " + launch.name +
                 "; start with mpirun, or one process with --comm local";
  throw ConfigError(std::move(detail));
}

Transport choose(const SessionOptions& options) {
  const LaunchInfo launch = detect_launcher(process_environment(), options.launcher);
  const std::string& word = options.comm;
  const bool is_known =
      word == "auto" || word == "self" || word == "local" || word == "mpi" || word == "nccl";
  require(is_known, "run_session", "comm", word,
          "is not a transport; choose --comm auto, self, local, mpi or nccl");
  require(options.local_ranks >= 1, "run_session", "local_ranks", options.local_ranks,
          "is below 1; choose the number of threads");
  require(options.local_ranks == 1 || word == "local", "run_session", "local_ranks",
          options.local_ranks, "needs comm=local, not comm=" + word + "; add --comm local");
  if (word == "self") return Transport::kSelf;
  if (word == "local") return Transport::kLocal;
  if (word == "mpi") return Transport::kMpi;
  return word == "nccl" ? Transport::kNccl : choose_auto(launch);
}

bool started_by_mpi() {
  const Environment environment = process_environment();
  return environment("OMPI_COMM_WORLD_SIZE").has_value() || environment("PMIX_RANK").has_value();
}

int run_chosen(const SessionOptions& options, const std::function<void(const Group&)>& body) {
  switch (choose(options)) {
    case Transport::kSelf:
      return run_self(body);
    case Transport::kLocal:
      return run_threads(options.local_ranks, body);
    case Transport::kMpi:
      return run_processes(body);
    default:
      require_nccl();
  }
  return 0;
}

}  // namespace

std::string describe(const LaunchInfo& launch, const Group& world, int num_hosts) {
  const auto counted = [](int count, const char* noun) {
    return to_text(count) + " " + noun + (count == 1 ? "" : "s");
  };
  return "launcher " + launch.name + ", " + counted(world.size(), "rank") + " on " +
         counted(num_hosts, "host");
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
      return run_processes([&](const Group&) { std::rethrow_exception(failure); });
    }
    const Outcome outcome = outcome_of(failure);
    print_error(outcome.text, 0, 1);
    return outcome.status;
  }
}

}  // namespace perseid::comm
