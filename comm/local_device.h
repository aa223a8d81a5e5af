#pragma once
#include <optional>
#include <vector>

#include "comm/backend.h"
#include "kernels/device_memory.h"

namespace perseid::comm {

/// Two points of a rank's stream in a device exchange. Made by the rank when it first needs them.
struct RankEvents {
  std::optional<kernels::DeviceEvent> ready;  ///< its blocks may be read
  std::optional<kernels::DeviceEvent> taken;  ///< it has read the blocks of its peers
};

/// Blocks in device memory between threads of one process: each rank's stream copies what it gets
/// out of the senders' memory. Ranks meet twice on the host, by backend.exchange(), to tell each
/// other where the blocks are and that events are recorded; streams wait for events, the host never
/// waits for a stream. What comes later on a sender's stream may write to its blocks.
TransferResult exchange_events(Backend& backend, std::vector<RankEvents>& events,
                               const Transfer& transfer, const kernels::Stream& stream);

}  // namespace perseid::comm
