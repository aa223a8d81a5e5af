#include "comm/tcp_socket.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int kPollMsMax = 1000;
constexpr int kBacklog = 1024;

void set_option(const Socket& socket, int level, int option, int value) {
  (void)::setsockopt(socket.fd(), level, option, &value, sizeof(value));
}

[[noreturn]] void throw_failed(const char* argument, const std::string& value, int error,
                               const std::string& way_out) {
  throw ConfigError(ErrorDetail{"tcp_group", argument, value,
                                std::string(std::strerror(error)) + "; " + way_out});
}

bool is_ready(const Socket& socket, short events, Clock::time_point deadline) {
  pollfd entry{socket.fd(), events, 0};
  while (::poll(&entry, 1, poll_ms(deadline)) <= 0) {
    if (Clock::now() > deadline) return false;
  }
  return true;
}

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}
Socket::Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

void SocketAddress::set_port(int port) {
  const auto number = htons(static_cast<uint16_t>(port));
  if (storage.ss_family == AF_INET6) {
    reinterpret_cast<sockaddr_in6*>(&storage)->sin6_port = number;
  } else {
    reinterpret_cast<sockaddr_in*>(&storage)->sin_port = number;
  }
}

int SocketAddress::port() const {
  if (storage.ss_family == AF_INET6) {
    return ntohs(reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port);
  }
  return ntohs(reinterpret_cast<const sockaddr_in*>(&storage)->sin_port);
}

bool SocketAddress::is_loopback() const {
  if (storage.ss_family == AF_INET6) {
    const auto& address = reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(&address) != 0;
  }
  const auto& address = reinterpret_cast<const sockaddr_in*>(&storage)->sin_addr;
  return ntohl(address.s_addr) >> 24 == 127;
}

std::vector<SocketAddress> resolve(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int status = ::getaddrinfo(host.c_str(), nullptr, &hints, &found);
  if (status != 0) {
    throw ConfigError(ErrorDetail{
        "tcp_group", "host", host,
        std::string(::gai_strerror(status)) + "; set MASTER_ADDR to the host of rank 0"});
  }
  std::vector<SocketAddress> addresses;
  for (const addrinfo* info = found; info != nullptr; info = info->ai_next) {
    if (info->ai_family != AF_INET && info->ai_family != AF_INET6) continue;
    SocketAddress address;
    std::memcpy(&address.storage, info->ai_addr, info->ai_addrlen);
    address.length = info->ai_addrlen;
    address.set_port(port);
    addresses.push_back(address);
  }
  ::freeaddrinfo(found);
  // IPv4 first, so that all ranks try one family first; the order is not the same on all systems.
  std::stable_partition(addresses.begin(), addresses.end(), [](const SocketAddress& address) {
    return address.storage.ss_family == AF_INET;
  });
  return addresses;
}

SocketAddress address_of(const Socket& socket) {
  SocketAddress address;
  address.length = sizeof(address.storage);
  (void)::getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&address.storage), &address.length);
  return address;
}

SocketAddress peer_of(const Socket& socket) {
  SocketAddress address;
  address.length = sizeof(address.storage);
  (void)::getpeername(socket.fd(), reinterpret_cast<sockaddr*>(&address.storage), &address.length);
  return address;
}

Socket listen_at(int family, bool is_loopback_only, int port) {
  Socket socket(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.is_open()) throw_failed("port", to_text(port), errno, "raise ulimit -n");
  set_option(socket, SOL_SOCKET, SO_REUSEADDR, 1);
  SocketAddress address;
  address.storage.ss_family = static_cast<sa_family_t>(family);
  if (family == AF_INET6) {
    auto& inet6 = *reinterpret_cast<sockaddr_in6*>(&address.storage);
    inet6.sin6_addr = is_loopback_only ? in6addr_loopback : in6addr_any;
    address.length = sizeof(inet6);
  } else {
    auto& inet = *reinterpret_cast<sockaddr_in*>(&address.storage);
    inet.sin_addr.s_addr = htonl(is_loopback_only ? INADDR_LOOPBACK : INADDR_ANY);
    address.length = sizeof(inet);
  }
  address.set_port(port);
  const auto* raw = reinterpret_cast<const sockaddr*>(&address.storage);
  if (::bind(socket.fd(), raw, address.length) != 0 || ::listen(socket.fd(), kBacklog) != 0) {
    throw_failed("port", to_text(port), errno,
                 "rank 0 cannot listen there; set PERSEID_PORT to a free port of its host");
  }
  return socket;
}

Socket accept_until(const Socket& listener, Clock::time_point deadline) {
  if (!is_ready(listener, POLLIN, deadline)) return {};
  Socket socket(::accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (socket.is_open()) set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  return socket;
}

Socket connect_to(const SocketAddress& address, Clock::time_point deadline) {
  Socket socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.is_open()) return {};
  const auto* raw = reinterpret_cast<const sockaddr*>(&address.storage);
  if (::connect(socket.fd(), raw, address.length) != 0) {
    if (errno != EINPROGRESS || !is_ready(socket, POLLOUT, deadline)) return {};
    int error = 0;
    socklen_t length = sizeof(error);
    (void)::getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) return {};
  }
  set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  return socket;
}

bool send_all(const Socket& socket, const void* data, size_t bytes, Clock::time_point deadline) {
  const auto* from = static_cast<const std::byte*>(data);
  while (bytes > 0) {
    const ssize_t sent = ::send(socket.fd(), from, bytes, MSG_NOSIGNAL);
    if (sent > 0) {
      from += sent;
      bytes -= static_cast<size_t>(sent);
    } else if (errno != EAGAIN && errno != EINTR) {
      return false;
    } else if (!is_ready(socket, POLLOUT, deadline)) {
      return false;
    }
  }
  return true;
}

bool recv_all(const Socket& socket, void* data, size_t bytes, Clock::time_point deadline) {
  auto* into = static_cast<std::byte*>(data);
  while (bytes > 0) {
    const ssize_t got = ::recv(socket.fd(), into, bytes, 0);
    if (got > 0) {
      into += got;
      bytes -= static_cast<size_t>(got);
    } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
      return false;
    } else if (!is_ready(socket, POLLIN, deadline)) {
      return false;
    }
  }
  return true;
}

int poll_ms(Clock::time_point deadline) {
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left + 1, 0, kPollMsMax));
}

}  // namespace perseid::comm
