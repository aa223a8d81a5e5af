#include <cstring>

#include "comm/backend.h"
#include "comm/group.h"
#include "kernels/device_memory.h"

namespace perseid::comm {
namespace {

class SelfBackend final : public Backend {
 public:
  SelfBackend() : Backend(0, 1) {}
  const char* name() const override { return "self"; }
  TransferResult exchange(const Transfer& transfer) override {
    const PeerBlock& block = transfer.blocks[0];
    const int64_t bytes = block.recv_units * transfer.unit_bytes;
    if (bytes > 0) std::memcpy(block.recv, block.send, static_cast<size_t>(bytes));
    return {};
  }
  TransferResult exchange_device(const Transfer& transfer, const kernels::Stream& stream) override {
    const PeerBlock& block = transfer.blocks[0];
    kernels::copy_bytes(block.recv, block.send, block.recv_units * transfer.unit_bytes, stream);
    return {};
  }
  void reserve_device(int64_t, int64_t) override {}
  std::shared_ptr<Backend> split(const Subgroup&) override {
    return std::make_shared<SelfBackend>();
  }
};

}  // namespace

Group self_group() { return Group(std::make_shared<SelfBackend>()); }

}  // namespace perseid::comm
