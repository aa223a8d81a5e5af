#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "comm/group.h"
#include "kernels/error.h"

namespace perseid::comm {

/// Where the GPU of a rank is. Texts end with 0; what is longer is cut.
struct GpuPlace {
  std::array<char, 128> host{};
  std::array<char, 32> bus_id{};   ///< PCI; empty: the rank sees no GPU
  std::array<char, 96> host_id{};  ///< NCCL_HOSTID, by which ranks may share a GPU in tests
  int32_t num_devices = 0;         ///< that the rank sees
  int32_t may_share = 0;           ///< NCCL_MULTI_RANK_GPU_ENABLE=1
};

/// That of this rank if it uses `device`; without a GPU, whatever `device` is.
GpuPlace own_place(int device);
/// Collective. [P]
std::vector<GpuPlace> gather_places(const GpuPlace& mine, const Group& group);
/// Why these ranks cannot form an NCCL group, as an error of `nccl_group`; nothing if they can.
std::optional<ErrorDetail> place_problem(const std::vector<GpuPlace>& places);

}  // namespace perseid::comm
