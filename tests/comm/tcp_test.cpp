// What only ranks over TCP show.
//   Addresses        host and port for torchrun and Slurm, and what is missing or no port
//   NobodyComes      rank 0 names the ranks that did not come; the others name rank 0
//   PortIsTaken, NoSuchHost    the error names the port or the host, and the way out
//   StrangersAreRefused    another job, another size, a rank twice, and bytes of another protocol
//   PeerEnds         a process that is killed in a collective: the others throw PeerLost at once
//   FailureIsTold    a rank that times out tells those who come later whom it waited for
//   DropsNothing     a rank that ends after its last collective: the others get what it sent
#include "comm/tcp_group.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <thread>

#include "comm/collectives.h"
#include "comm/exchange.h"
#include "comm/tcp_socket.h"
#include "ranks.h"
#include "tcp_ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;
using comm::TcpAddress;
using Clock = std::chrono::steady_clock;
using Variables = std::map<std::string, std::string>;

comm::Environment environment(const Variables& variables) {
  return [variables](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    if (found == variables.end()) return std::nullopt;
    return found->second;
  };
}

TcpAddress address_in(const Variables& variables) {
  return comm::tcp_address(comm::LaunchInfo{}, environment(variables));
}

TEST(Tcp, Addresses) {
  const TcpAddress torchrun = address_in({{"MASTER_ADDR", "h1"}, {"MASTER_PORT", "29500"}});
  EXPECT_EQ(torchrun.host, "h1");
  EXPECT_EQ(torchrun.port, 29501);
  EXPECT_EQ(address_in({{"MASTER_ADDR", "h1"}, {"MASTER_PORT", "1"}, {"PERSEID_PORT", "77"}}).port,
            77);
  for (const auto& [list, host] : Variables{{"n1", "n1"},
                                            {"n1,n2", "n1"},
                                            {"gpu[03-07,9]", "gpu03"},
                                            {"gpu[3,9],x", "gpu3"},
                                            {"gpu[12]-ib,x[1-2]", "gpu12-ib"}}) {
    const TcpAddress slurm =
        address_in({{"SLURM_JOB_NODELIST", list}, {"SLURM_JOB_ID", "1234567"}});
    EXPECT_EQ(slurm.host, host);
    EXPECT_EQ(slurm.port, 24567);
  }
  const Variables job{{"MASTER_ADDR", "h"}, {"PERSEID_PORT", "5"}, {"TORCHELASTIC_RUN_ID", "a"}};
  Variables other = job;
  other["TORCHELASTIC_RUN_ID"] = "b";
  EXPECT_NE(address_in(job).job, address_in(other).job);
  EXPECT_EQ(address_in(job).job, address_in(job).job);

  const auto text_in = [](const Variables& variables) {
    const Caught caught = catch_error([&] { address_in(variables); });
    EXPECT_EQ(caught.type, "ConfigError");
    return caught.text;
  };
  expect_contains(text_in({}), {"[tcp_address] MASTER_ADDR=unset", "set MASTER_ADDR"});
  expect_contains(text_in({{"MASTER_ADDR", "h"}}), {"[tcp_address] PERSEID_PORT=unset"});
  expect_contains(text_in({{"MASTER_ADDR", "h"}, {"MASTER_PORT", "65535"}}), {"MASTER_PORT=65535"});
  expect_contains(text_in({{"MASTER_ADDR", "h"}, {"PERSEID_PORT", "9x"}}), {"PERSEID_PORT=9x"});
}

TEST(Tcp, NobodyComes) {
  const TcpAddress address = free_address();
  const Caught first = catch_error([&] { comm::tcp_group(address, 0, 3, 100); });
  EXPECT_EQ(first.type, "PeerLost");
  expect_contains(first.text, {"[tcp_group] rank(s)=1, 2 of 3 did not come to 127.0.0.1:",
                               "--launcher single"});
  const Caught other = catch_error([&] { comm::tcp_group(address, 1, 3, 100); });
  EXPECT_EQ(other.type, "PeerLost");
  expect_contains(other.text, {"[tcp_group] rank(s)=0 does not listen at", "PERSEID_PORT"});
}

TEST(Tcp, PortIsTaken) {
  const comm::Socket taken = comm::listen_at(AF_INET, true, 0);
  const int port = comm::address_of(taken).port();
  const Caught caught = catch_error([&] { comm::tcp_group({"127.0.0.1", port, 0}, 0, 2, 100); });
  EXPECT_EQ(caught.type, "ConfigError");
  expect_contains(caught.text,
                  {"[tcp_group] port=" + std::to_string(port), "in use", "PERSEID_PORT"});
}

TEST(Tcp, NoSuchHost) {
  const Caught caught = catch_error([] {
    comm::tcp_group({"no-such-host.invalid", 5, 0}, 1, 2, 100);
  });
  EXPECT_EQ(caught.type, "ConfigError");
  expect_contains(caught.text, {"[tcp_group] host=no-such-host.invalid", "MASTER_ADDR"});
}

TEST(Tcp, StrangersAreRefused) {
  const TcpAddress address = free_address();
  std::thread first([&] {
    const Group group = comm::tcp_group(address, 0, 2, 20000);
    comm::barrier(group);
  });
  const auto refused = [](const TcpAddress& at, int rank, int size) {
    const Caught caught = catch_error([&] { comm::tcp_group(at, rank, size, 10000); });
    EXPECT_EQ(caught.type, "PeerLost");
    expect_contains(caught.text, {"[tcp_group] rank(s)=0 closed the connection", "PERSEID_PORT"});
  };
  refused({address.host, address.port, address.job + 1}, 1, 2);
  refused(address, 1, 3);
  {
    const auto deadline = Clock::now() + std::chrono::seconds(5);
    const comm::Socket noise =
        comm::connect_to(comm::resolve(address.host, address.port)[0], deadline);
    const std::string text = "GET / HTTP/1.1\r\nHost: somebody\r\nUser-Agent: nobody\r\n\r\n";
    EXPECT_TRUE(comm::send_all(noise, text.data(), text.size(), deadline));
  }
  const Group second = comm::tcp_group(address, 1, 2, 20000);
  comm::barrier(second);
  first.join();
}

// In a process of its own: runs `body`, and ends with its result.
pid_t start_rank(const TcpAddress& address, int rank, int size,
                 const std::function<int(const Group&)>& body) {
  const pid_t child = ::fork();
  if (child != 0) return child;
  int status = 99;
  try {
    status = body(comm::tcp_group(address, rank, size, 20000));
  } catch (const std::exception&) {
  }
  ::_exit(status);
}

int status_of(pid_t child) {
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

TEST(Tcp, PeerEnds) {
  const TcpAddress address = free_address();
  constexpr int kSize = 4;
  const auto begin = Clock::now();
  std::vector<pid_t> children;
  for (int rank = 0; rank < kSize; ++rank) {
    children.push_back(start_rank(address, rank, kSize, [](const Group& group) {
      for (int i = 0; i < 50; ++i) comm::barrier(group);
      if (group.rank() == 2) ::raise(SIGKILL);
      const Caught caught = catch_error([&] {
        while (true) comm::barrier(group);
      });
      const bool is_named = caught.detail.culprit == 2 && caught.type == "PeerLost" &&
                            caught.text.find("has left") != std::string::npos;
      return is_named ? 0 : 1;
    }));
  }
  for (int rank = 0; rank < kSize; ++rank) {
    EXPECT_EQ(status_of(children[size_t(rank)]), rank == 2 ? -SIGKILL : 0) << "rank " << rank;
  }
  EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 10);
}

TEST(Tcp, FailureIsTold) {
  run_tcp(3, [](const Group& group) {
    if (group.rank() == 2) std::this_thread::sleep_for(std::chrono::milliseconds(500));
    if (group.rank() == 0) group.set_timeout_ms(50);  // the others would wait for 20 s
    const auto begin = Clock::now();
    const Caught caught = catch_error([&] { comm::barrier(group); });
    EXPECT_EQ(caught.type, "PeerLost");
    EXPECT_TRUE(group.rank() != 0 || caught.detail.culprit == 2) << caught.text;
    expect_contains(caught.text, {"timeout_ms=50 has passed; nothing received from rank(s) 2"});
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - begin).count(), 10);
  });
}

TEST(Tcp, DropsNothing) {
  for (int round = 0; round < 20; ++round) {
    run_tcp(3, [](const Group& group) {
      std::vector<int> data(100000, group.rank() == 0 ? 5 : 0);
      comm::broadcast(data.data(), int64_t(data.size() * sizeof(int)), 0, group);
      EXPECT_EQ(data, std::vector<int>(100000, 5));
    });
  }
}

}  // namespace
}  // namespace perseid::testing
