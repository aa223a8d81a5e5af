// Sessions of processes that torchrun or srun would have started: a child each, with its variables.
//   Status        0 on all ranks, and what body sees
//   OneFails      no rank returns 0; the cause is printed by its rank
//   Agreed        an agreed error ends all ranks alike, and rank 0 alone prints it
//   OneIsKilled   the others end with 75 and name it
//   Slurm         the same without MASTER_ADDR
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>

#include "comm/collectives.h"
#include "comm/session.h"
#include "ranks.h"
#include "tcp_ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;

struct Job {
  std::vector<int> statuses;  // [P]; -n: signal n
  std::string output;         // of all ranks
};

using Start = std::function<void(int rank, int size, int port)>;

void set(const char* name, const std::string& value) { ::setenv(name, value.c_str(), 1); }

void as_torchrun(int rank, int size, int port) {
  set("RANK", std::to_string(rank));
  set("WORLD_SIZE", std::to_string(size));
  set("LOCAL_RANK", std::to_string(rank));
  set("MASTER_ADDR", "localhost");
  set("MASTER_PORT", std::to_string(port - 1));
}

void as_slurm(int rank, int size, int port) {
  set("SLURM_PROCID", std::to_string(rank));
  set("SLURM_NTASKS", std::to_string(size));
  set("SLURM_LOCALID", std::to_string(rank));
  set("SLURM_JOB_NODELIST", "localhost");
  set("PERSEID_PORT", std::to_string(port));
}

Job run_job(int size, const Start& start, const RankBody& body) {
  const int port = free_address().port;
  std::FILE* output = std::tmpfile();
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::dup2(::fileno(output), STDERR_FILENO);
      start(rank, size, port);
      comm::SessionOptions options;
      options.comm = "tcp";
      ::_exit(comm::run_session(options, body));
    }
    children.push_back(child);
  }
  Job job;
  for (const pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    job.statuses.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
  }
  std::rewind(output);
  char line[1024];
  while (std::fgets(line, sizeof(line), output) != nullptr) job.output += line;
  std::fclose(output);
  return job;
}

void check_world(const Group& world) {
  int sum = 0;
  std::vector<int> all(size_t(world.size()));
  const int mine = world.rank();
  comm::all_gather(&mine, sizeof(mine), all.data(), world);
  for (const int rank : all) sum += rank;
  require(sum == world.size() * (world.size() - 1) / 2, "test", "sum", sum, "is wrong");
  const std::string name = world.backend_name();
  require(name == (world.size() == 1 ? "self" : "tcp"), "test", "backend", name, "is wrong");
  const std::string line = comm::describe({}, world, comm::count_hosts(world));
  require(world.size() == 1 || line.find("on 1 host by tcp") != std::string::npos, "test", "line",
          line, "is wrong");
}

TEST(TcpSession, Status) {
  for (const int size : {1, 2, 4}) {
    const Job job = run_job(size, as_torchrun, check_world);
    EXPECT_EQ(job.statuses, std::vector<int>(size_t(size), 0)) << job.output;
    EXPECT_EQ(job.output, "");
  }
}

TEST(TcpSession, Slurm) {
  const Job job = run_job(3, as_slurm, check_world);
  EXPECT_EQ(job.statuses, std::vector<int>(3, 0)) << job.output;
}

TEST(TcpSession, OneFails) {
  const Job job = run_job(3, as_torchrun, [](const Group& world) {
    if (world.rank() == 1) throw DataError(ErrorDetail{"read", "row", "7", "is damaged"});
  });
  EXPECT_EQ(job.statuses, std::vector<int>(3, 65));
  EXPECT_EQ(job.output, "[rank 1] error: [read] row=7 is damaged\n");
  const Job waiting = run_job(3, as_torchrun, [](const Group& world) {
    if (world.rank() == 1) throw DataError(ErrorDetail{"read", "row", "7", "is damaged"});
    comm::barrier(world);
  });
  EXPECT_EQ(waiting.statuses, (std::vector<int>{75, 65, 75}));
  expect_contains(waiting.output, {"[rank 1] error: [read] row=7 is damaged\n",
                                   "[barrier] peer=1 has left; nothing received from rank(s) 1"});
}

TEST(TcpSession, Agreed) {
  const Job job = run_job(3, as_torchrun, [](const Group& world) {
    comm::barrier(world, {"load", -1, world.rank() == 2 ? 1 : 0});
  });
  EXPECT_EQ(job.statuses, std::vector<int>(3, 76));
  EXPECT_EQ(job.output.find("[rank 0] error: [load] step=1 of rank 2 differs from step=0"), 0u)
      << job.output;
  EXPECT_EQ(job.output.find('\n'), job.output.size() - 1);
}

TEST(TcpSession, OneIsKilled) {
  const Job job = run_job(3, as_torchrun, [](const Group& world) {
    comm::barrier(world);
    if (world.rank() == 0) ::raise(SIGKILL);
    comm::barrier(world);
  });
  EXPECT_EQ(job.statuses, (std::vector<int>{-SIGKILL, 75, 75}));
  expect_contains(job.output, {"[barrier] peer=", "nothing received from rank(s) 0"});
}

}  // namespace
}  // namespace perseid::testing
