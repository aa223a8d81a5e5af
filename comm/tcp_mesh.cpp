// Rank 0 listens at the address of the job. Each other rank listens at a port of its own, tells
// rank 0 which, and gets the table of all. Later a rank calls the ranks below it and is called by
// those above it.
#include "comm/tcp_mesh.h"

#include <algorithm>
#include <thread>

#include "comm/collective.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr uint64_t kMagic = 0x3144494553524550ull;  // "PERSEID1"
constexpr int64_t kEnrolContext = 0;
constexpr auto kRetryPause = std::chrono::milliseconds(20);
constexpr auto kHelloTime = std::chrono::seconds(2);       // for a caller to say who it is
constexpr auto kTurnTime = std::chrono::milliseconds(20);  // that a thread holds the listener

/// First words of a connection.
struct Hello {
  uint64_t magic = kMagic;
  uint64_t job = 0;
  int64_t context = 0;
  int32_t rank = -1;
  int32_t size = 0;
  int32_t port = 0;
  int32_t unused = 0;
};

[[noreturn]] void throw_lost(const std::vector<int>& missing, const std::string& why) {
  ErrorDetail detail;
  detail.operation = "tcp_group";
  detail.argument = "rank(s)";
  detail.value = list_text(missing);
  detail.limit = why;
  detail.culprit = missing.empty() ? -1 : missing[0];
  throw PeerLost(std::move(detail));
}

bool is_loopback_host(const std::string& host) {
  return host == "localhost" || host.rfind("127.", 0) == 0 || host == "::1";
}

std::string place(const TcpAddress& address) { return address.host + ":" + to_text(address.port); }

}  // namespace

TcpMesh::TcpMesh(const TcpAddress& address, int rank, int size, Clock::time_point deadline)
    : rank_(rank), size_(size), job_(address.job), addresses_(static_cast<size_t>(size)) {
  if (rank == 0) {
    gather(address, deadline);
  } else {
    enrol(address, deadline);
  }
}

// Rank 0: waits for all others, and sends each the table.
void TcpMesh::gather(const TcpAddress& address, Clock::time_point deadline) {
  const SocketAddress own = resolve(address.host, address.port).front();
  listener_ = listen_at(own.storage.ss_family, is_loopback_host(address.host), address.port);
  std::vector<Socket> callers(addresses_.size());
  int num_missing = size_ - 1;
  while (num_missing > 0) {
    Socket caller = accept_until(listener_, deadline);
    if (!caller.is_open()) {
      if (Clock::now() < deadline) continue;
      std::vector<int> missing;
      for (int p = 1; p < size_; ++p) {
        if (!callers[static_cast<size_t>(p)].is_open()) missing.push_back(p);
      }
      throw_lost(missing, "of " + to_text(size_) + " did not come to " + place(address) +
                              " in time; start all of them, or choose --launcher single");
    }
    Hello hello;
    const bool is_heard =
        recv_all(caller, &hello, sizeof(hello), std::min(deadline, Clock::now() + kHelloTime));
    const bool is_ours = is_heard && hello.magic == kMagic && hello.job == job_ &&
                         hello.context == kEnrolContext && hello.size == size_ && hello.rank > 0 &&
                         hello.rank < size_ && hello.port > 0 && hello.port < 65536;
    if (!is_ours || callers[static_cast<size_t>(hello.rank)].is_open()) continue;
    const auto p = static_cast<size_t>(hello.rank);
    addresses_[p] = peer_of(caller);
    addresses_[p].set_port(hello.port);
    callers[p] = std::move(caller);
    --num_missing;
  }
  for (int p = 1; p < size_; ++p) {
    const size_t bytes = addresses_.size() * sizeof(SocketAddress);
    if (!send_all(callers[static_cast<size_t>(p)], addresses_.data(), bytes, deadline)) {
      throw_lost({p}, "left while all were gathering");
    }
  }
}

// Other ranks: tell rank 0 where they listen.
void TcpMesh::enrol(const TcpAddress& address, Clock::time_point deadline) {
  const std::vector<SocketAddress> candidates = resolve(address.host, address.port);
  Socket caller;
  while (!caller.is_open()) {
    for (const SocketAddress& candidate : candidates) {
      if (!caller.is_open()) caller = connect_to(candidate, deadline);
    }
    if (caller.is_open()) break;
    if (Clock::now() > deadline) {
      throw_lost({0}, "does not listen at " + place(address) +
                          "; look at MASTER_ADDR, PERSEID_PORT and the firewall");
    }
    std::this_thread::sleep_for(kRetryPause);
  }
  const SocketAddress first = peer_of(caller);
  listener_ = listen_at(first.storage.ss_family, is_loopback_host(address.host), 0);
  Hello hello;
  hello.job = job_;
  hello.context = kEnrolContext;
  hello.rank = rank_;
  hello.size = size_;
  hello.port = address_of(listener_).port();
  const size_t bytes = addresses_.size() * sizeof(SocketAddress);
  const bool is_answered = send_all(caller, &hello, sizeof(hello), deadline) &&
                           recv_all(caller, addresses_.data(), bytes, deadline);
  if (!is_answered) {
    throw_lost({0},
               Clock::now() > deadline
                   ? "did not answer at " + place(address) + " in time; it may wait for other ranks"
                   : "closed the connection at " + place(address) +
                         "; another process has this rank, it waits for another number of "
                         "ranks, or another job uses the port: set PERSEID_PORT");
  }
  addresses_[0] = first;
  // Ranks on the host of rank 0 may have reached it by the loopback device, which is ours here.
  for (SocketAddress& other : addresses_) {
    if (!other.is_loopback() || first.is_loopback()) continue;
    const int port = other.port();
    other = first;
    other.set_port(port);
  }
}

void TcpMesh::take_context(int64_t context) {
  int64_t next = next_context_.load();
  while (next <= context && !next_context_.compare_exchange_weak(next, context + 1)) {
  }
}

std::vector<Socket> TcpMesh::connect(const std::vector<int>& world_ranks, int64_t context,
                                     Clock::time_point deadline) {
  std::vector<Socket> sockets(world_ranks.size());
  for (size_t p = 0; p < sockets.size(); ++p) {
    if (world_ranks[p] < rank_) dial(sockets[p], world_ranks[p], context, deadline);
  }
  for (size_t p = 0; p < sockets.size(); ++p) {
    if (world_ranks[p] > rank_) sockets[p] = accept_from({context, world_ranks[p]}, deadline);
  }
  return sockets;
}

void TcpMesh::dial(Socket& socket, int world_rank, int64_t context,
                   Clock::time_point deadline) const {
  while (true) {
    socket = connect_to(addresses_[static_cast<size_t>(world_rank)], deadline);
    if (socket.is_open() || Clock::now() > deadline) break;
    std::this_thread::sleep_for(kRetryPause);
  }
  Hello hello;
  hello.job = job_;
  hello.context = context;
  hello.rank = rank_;
  hello.size = size_;
  if (!socket.is_open() || !send_all(socket, &hello, sizeof(hello), deadline)) {
    throw_lost({world_rank}, "cannot be reached; it has ended, or a firewall is between us");
  }
}

Socket TcpMesh::accept_from(const Visitor& visitor, Clock::time_point deadline) {
  while (Clock::now() <= deadline) {
    const std::lock_guard lock(mutex_);
    const auto found = visitors_.find(visitor);
    if (found != visitors_.end()) {
      Socket socket = std::move(found->second);
      visitors_.erase(found);
      return socket;
    }
    Socket caller = accept_until(listener_, std::min(deadline, Clock::now() + kTurnTime));
    Hello hello;
    const bool is_heard =
        caller.is_open() &&
        recv_all(caller, &hello, sizeof(hello), std::min(deadline, Clock::now() + kHelloTime));
    const bool is_ours = is_heard && hello.magic == kMagic && hello.job == job_ &&
                         hello.size == size_ && hello.context > kEnrolContext &&
                         hello.rank > rank_ && hello.rank < size_;
    if (is_ours) visitors_[{hello.context, hello.rank}] = std::move(caller);
  }
  throw_lost({visitor.world_rank}, "did not connect in time; it has ended or hangs");
}

}  // namespace perseid::comm
