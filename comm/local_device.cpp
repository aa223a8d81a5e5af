#include "comm/local_device.h"

#include "kernels/error.h"

namespace perseid::comm {
namespace {

/// What a rank tells a peer about the block that it has for it.
struct Notice {
  const void* data = nullptr;
  int64_t bytes = 0;
};

// One notice from each rank to each other.
TransferResult exchange_notices(Backend& backend, const std::vector<Notice>& sent,
                                std::vector<Notice>& received, Clock::time_point deadline) {
  std::vector<PeerBlock> blocks(sent.size());
  for (size_t p = 0; p < blocks.size(); ++p) blocks[p] = {&sent[p], 1, &received[p], 1};
  return backend.exchange({blocks.data(), sizeof(Notice), deadline});
}

TransferResult wrong_size(int peer, int64_t bytes, int64_t expected) {
  TransferResult result;
  result.state = TransferResult::State::kBroken;
  result.missing = {peer};
  result.text = "bytes=" + to_text(bytes) + " from rank " + to_text(peer) + " instead of " +
                to_text(expected);
  return result;
}

}  // namespace

TransferResult exchange_events(Backend& backend, std::vector<RankEvents>& events,
                               const Transfer& transfer, const kernels::Stream& stream) {
  const int rank = backend.rank();
  const int size = backend.size();
  const PeerBlock& own = transfer.blocks[rank];
  if (size == 1) {
    kernels::copy_bytes(own.recv, own.send, own.recv_units * transfer.unit_bytes, stream);
    return {};
  }
  RankEvents& mine = events[static_cast<size_t>(rank)];
  if (!mine.ready.has_value()) mine.ready.emplace();
  if (!mine.taken.has_value()) mine.taken.emplace();

  std::vector<Notice> sent(static_cast<size_t>(size));
  std::vector<Notice> received(sent.size());
  for (int p = 0; p < size; ++p) {
    const PeerBlock& block = transfer.blocks[p];
    sent[static_cast<size_t>(p)] = {block.send, block.send_units * transfer.unit_bytes};
  }
  mine.ready->record(stream);
  TransferResult result = exchange_notices(backend, sent, received, transfer.deadline);
  if (result.state != TransferResult::State::kDone) return result;

  for (int k = 0; k < size; ++k) {  // peers start at this rank, so that not all read one buffer
    const int p = (rank + k) % size;
    const Notice& notice = received[static_cast<size_t>(p)];
    const int64_t bytes = transfer.blocks[p].recv_units * transfer.unit_bytes;
    if (notice.bytes != bytes) return wrong_size(p, notice.bytes, bytes);
    if (bytes == 0) continue;
    if (p != rank) events[static_cast<size_t>(p)].ready->make_wait(stream);
    kernels::copy_bytes(transfer.blocks[p].recv, notice.data, bytes, stream);
  }
  mine.taken->record(stream);
  // An event is recorded again only after all peers have entered the next exchange, that is, after
  // they have made their streams wait for it.
  result = exchange_notices(backend, sent, received, transfer.deadline);
  if (result.state != TransferResult::State::kDone) return result;
  for (int p = 0; p < size; ++p) {
    const bool has_read = p != rank && sent[static_cast<size_t>(p)].bytes > 0;
    if (has_read) events[static_cast<size_t>(p)].taken->make_wait(stream);
  }
  return result;
}

}  // namespace perseid::comm
