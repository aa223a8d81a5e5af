#pragma once
#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include "comm/backend.h"

namespace perseid::comm {

/// An open socket, or none. Reads and writes do not block.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket();
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;
  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;

  void set_port(int port);
  int port() const;
  bool is_loopback() const;
};

/// Addresses of a host, at least one. Throws ConfigError.
std::vector<SocketAddress> resolve(const std::string& host, int port);
SocketAddress address_of(const Socket& socket);  ///< this end
SocketAddress peer_of(const Socket& socket);     ///< the other end

/// Port 0: the system chooses one. Throws ConfigError.
Socket listen_at(int family, bool is_loopback_only, int port);
/// The next connection, or none at the deadline.
Socket accept_until(const Socket& listener, Clock::time_point deadline);
/// A connection, or none if nobody listens there or does not answer in time.
Socket connect_to(const SocketAddress& address, Clock::time_point deadline);

/// Return false if the peer is gone or the deadline has passed.
bool send_all(const Socket& socket, const void* data, size_t bytes, Clock::time_point deadline);
bool recv_all(const Socket& socket, void* data, size_t bytes, Clock::time_point deadline);

/// Milliseconds that a poll() may last.
int poll_ms(Clock::time_point deadline);

}  // namespace perseid::comm
