#pragma once
#include <atomic>
#include <map>
#include <mutex>
#include <vector>

#include "comm/tcp_group.h"
#include "comm/tcp_socket.h"

namespace perseid::comm {

/// The ranks of a job: where each listens, and connections between them. Each group has its own, so
/// that groups share neither order nor failures.
class TcpMesh {
 public:
  TcpMesh(const TcpAddress& address, int rank, int size, Clock::time_point deadline);

  /// A connection to each of `world_ranks` but this one. All of them call it with one context,
  /// which no other group of theirs has. Throws PeerLost.
  std::vector<Socket> connect(const std::vector<int>& world_ranks, int64_t context,
                              Clock::time_point deadline);

  int64_t next_context() const { return next_context_.load(); }
  /// Marks a context that was agreed from next_context() of all ranks as taken.
  void take_context(int64_t context);

 private:
  struct Visitor {
    int64_t context;
    int world_rank;
    auto operator<=>(const Visitor&) const = default;
  };

  void gather(const TcpAddress& address, Clock::time_point deadline);
  void enrol(const TcpAddress& address, Clock::time_point deadline);
  void dial(Socket& socket, int world_rank, int64_t context, Clock::time_point deadline) const;
  Socket accept_from(const Visitor& visitor, Clock::time_point deadline);

  int rank_;
  int size_;
  uint64_t job_;
  Socket listener_;
  std::vector<SocketAddress> addresses_;  // [P]
  std::mutex mutex_;                      // of the listener and the visitors
  std::map<Visitor, Socket> visitors_;    // who came before we waited for them
  std::atomic<int64_t> next_context_{1};
};

}  // namespace perseid::comm
