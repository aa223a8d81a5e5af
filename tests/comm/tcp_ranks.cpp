// Threads as ranks that talk by TCP on the loopback device.
#include "tcp_ranks.h"

#include <barrier>
#include <exception>
#include <memory>
#include <thread>

#include "comm/tcp_socket.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

std::unique_ptr<std::barrier<>> meeting;

}  // namespace

comm::TcpAddress free_address() {
  const comm::Socket socket = comm::listen_at(AF_INET, true, 0);
  return {"127.0.0.1", comm::address_of(socket).port(), 7};
}

void run_tcp(int size, const std::function<void(const comm::Group&)>& body) {
  const comm::TcpAddress address = free_address();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      SCOPED_TRACE("rank " + std::to_string(rank) + " of " + std::to_string(size));
      try {
        const comm::Group group = comm::tcp_group(address, rank, size, 20000);
        group.set_timeout_ms(20000);
        body(group);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "body threw: " << error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void run_ranks(const RankBody& body) {
  for (const int size : {1, 2, 4}) {
    meeting = std::make_unique<std::barrier<>>(size);
    run_tcp(size, body);
  }
}

void meet() { meeting->arrive_and_wait(); }

}  // namespace perseid::testing
