#include "comm/session_processes.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "comm/backend.h"
#include "comm/gpu_place.h"
#include "comm/mpi_runtime.h"
#include "comm/nccl_group.h"
#include "comm/session_outcome.h"
#include "comm/tcp_group.h"
#include "comm/text_hash.h"
#include "kernels/device_memory.h"

namespace perseid::comm {
namespace {

// How long a rank that is done waits for the others, and one that failed for those that fail alike.
constexpr int64_t kDoneWaitMs = 600000;
constexpr int64_t kAgreedWaitMs = 5000;
constexpr int64_t kFailedWaitMs = 500;

/// What the end of a program needs of its transport.
struct Ending {
  std::function<std::vector<Farewell>(const Farewell& mine, int64_t timeout_ms)> exchange;
  std::function<void(int exit_code)> abort;  ///< does not return
};

int64_t farewell_wait_ms(const Outcome& outcome) {
  if (outcome.status == 0) return kDoneWaitMs;
  return outcome.is_agreed ? kAgreedWaitMs : kFailedWaitMs;
}

[[noreturn]] void abort_job(const Outcome& outcome, const Group& world, const Ending& ending) {
  int status = outcome.status;
  if (status == 0) {
    print_error("[run_session] not all ranks came to the end of the program", world.rank(),
                world.size());
    status = PeerLost(ErrorDetail{}).exit_code();
  } else {
    print_error(outcome.text, world.rank(), world.size());
  }
  ending.abort(status);
  std::_Exit(status);
}

// Ranks tell each other how they ended, so that none leaves with 0 when another failed.
int part(const Outcome& outcome, const Group& world, const Ending& ending) {
  if (outcome.is_peer_lost) abort_job(outcome, world, ending);
  const Farewell mine{outcome.status, hash_text(outcome.common_text)};
  const std::vector<Farewell> all = ending.exchange(mine, farewell_wait_ms(outcome));
  if (all.empty()) abort_job(outcome, world, ending);
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

// The group that body gets. Collective over the group of the processes.
Group chosen_group(const Group& world, UseNccl use, const LaunchInfo& launch) {
  if (use == UseNccl::kNo || !has_nccl()) return world;
  const int num_devices = kernels::device_count();
  const int device = num_devices > 0 ? device_of(launch, num_devices) : -1;
  if (use == UseNccl::kIfOneGpuEach) {
    if (world.size() == 1) return world;
    if (place_problem(gather_places(own_place(device), world)).has_value()) return world;
  }
  if (device >= 0) kernels::set_device(device);
  return nccl_group(world);
}

Outcome run_chosen(const Group& world, UseNccl use, const LaunchInfo& launch,
                   const std::function<void(const Group&)>& body) {
  return run_body([&](const Group& all) { body(chosen_group(all, use, launch)); }, world);
}

// For TCP: a group that the others cannot disturb.
std::vector<Farewell> exchange_by(const Group& group, const Farewell& mine, int64_t timeout_ms) {
  std::vector<Farewell> all(static_cast<size_t>(group.size()));
  std::vector<PeerBlock> blocks(all.size());
  for (size_t p = 0; p < all.size(); ++p) blocks[p] = PeerBlock{&mine, 1, &all[p], 1};
  const auto deadline = Clock::now() + std::chrono::milliseconds(timeout_ms);
  const TransferResult result =
      group.backend().exchange({blocks.data(), sizeof(Farewell), deadline});
  return result.state == TransferResult::State::kDone ? all : std::vector<Farewell>{};
}

void exit_now(int exit_code) {
  std::fflush(stdout);
  std::fflush(stderr);
  std::_Exit(exit_code);
}

}  // namespace

int run_mpi(UseNccl use, const LaunchInfo& launch, const std::function<void(const Group&)>& body) {
  bool is_ours = false;
  int status = 0;
  try {
    is_ours = initialise_mpi();
    const Group world = mpi_group();
    const Ending ending{[&](const Farewell& mine, int64_t timeout_ms) {
                          return exchange_farewells(world, mine, timeout_ms);
                        },
                        [](int exit_code) { abort_mpi(exit_code); }};
    status = part(run_chosen(world, use, launch, body), world, ending);
  } catch (...) {
    const Outcome outcome = outcome_of(std::current_exception());
    print_error(outcome.text, 0, 1);
    return outcome.status;  // before there was a group; the launcher ends the other ranks
  }
  if (is_ours) finalise_mpi();
  return status;
}

int run_tcp(UseNccl use, const LaunchInfo& launch, const std::function<void(const Group&)>& body) {
  try {
    const Group world = launch.size == 1 ? self_group()
                                         : tcp_group(tcp_address(launch, process_environment()),
                                                     launch.rank, launch.size);
    const Group farewells = world.split(0, world.rank());
    const Ending ending{[&](const Farewell& mine, int64_t timeout_ms) {
                          return exchange_by(farewells, mine, timeout_ms);
                        },
                        exit_now};
    return part(run_chosen(world, use, launch, body), world, ending);
  } catch (...) {  // before there was a group; the launcher ends the other ranks
    const Outcome outcome = outcome_of(std::current_exception());
    print_error(outcome.text, launch.rank, launch.size);
    return outcome.status;
  }
}

}  // namespace perseid::comm
