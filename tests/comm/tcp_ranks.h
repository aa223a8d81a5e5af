#pragma once
#include <functional>

#include "comm/group.h"
#include "comm/tcp_group.h"

namespace perseid::testing {

/// A port of the loopback device that nobody uses now.
comm::TcpAddress free_address();

/// `size` threads as ranks of one tcp_group.
void run_tcp(int size, const std::function<void(const comm::Group&)>& body);

}  // namespace perseid::testing
