// Device memory over a transport of host memory: copy out, wait, exchange, copy in, wait.
#include "comm/staging.h"

#include <sched.h>

#include <vector>

#include "comm/backend.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

void grow(kernels::PinnedMemory& memory, int64_t bytes) {
  if (memory.bytes() >= bytes) return;
  memory = kernels::PinnedMemory();  // freed first: both together may be too much
  memory = kernels::PinnedMemory(bytes);
}

}  // namespace

void Staging::reserve(int64_t send_bytes, int64_t recv_bytes) {
  grow(send_, send_bytes);
  grow(recv_, recv_bytes);
}

void Backend::reserve_device(int64_t send_bytes, int64_t recv_bytes) {
  state_.staging.reserve(send_bytes, recv_bytes);
}

TransferResult Backend::wait_device(const kernels::Stream& stream, Clock::time_point deadline) {
  while (!kernels::is_done(stream)) {
    if (Clock::now() > deadline) {
      TransferResult result;
      result.state = TransferResult::State::kBroken;
      result.text = "stream=busy until the deadline; the GPU of this rank has not done its work";
      return result;
    }
    sched_yield();
  }
  return {};
}

TransferResult Backend::exchange_device(const Transfer& transfer, const kernels::Stream& stream) {
  int64_t send_bytes = 0;
  int64_t recv_bytes = 0;
  for (int p = 0; p < size(); ++p) {
    if (p == rank()) continue;
    send_bytes += transfer.blocks[p].send_units * transfer.unit_bytes;
    recv_bytes += transfer.blocks[p].recv_units * transfer.unit_bytes;
  }
  Staging& staging = state_.staging;
  staging.reserve(send_bytes, recv_bytes);  // was done before, by reserve_device()

  std::vector<PeerBlock> blocks(transfer.blocks, transfer.blocks + size());
  std::byte* send = staging.send();
  std::byte* recv = staging.recv();
  for (int p = 0; p < size(); ++p) {
    PeerBlock& block = blocks[static_cast<size_t>(p)];
    if (p == rank()) {
      kernels::copy_bytes(block.recv, block.send, block.recv_units * transfer.unit_bytes, stream);
      block = PeerBlock{};
      continue;
    }
    const int64_t bytes = block.send_units * transfer.unit_bytes;
    kernels::copy_bytes(send, block.send, bytes, stream);
    block.send = send;
    block.recv = recv;
    send += bytes;
    recv += block.recv_units * transfer.unit_bytes;
  }
  TransferResult result = wait_device(stream, transfer.deadline);
  if (result.state == TransferResult::State::kDone) {
    result = exchange({blocks.data(), transfer.unit_bytes, transfer.deadline});
  }
  if (result.state != TransferResult::State::kDone) return result;
  for (int p = 0; p < size(); ++p) {
    const PeerBlock& block = blocks[static_cast<size_t>(p)];
    kernels::copy_bytes(transfer.blocks[p].recv, block.recv, block.recv_units * transfer.unit_bytes,
                        stream);
  }
  return wait_device(stream, transfer.deadline);
}

}  // namespace perseid::comm
