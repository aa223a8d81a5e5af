#include "comm/gpu_place.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "comm/collectives.h"
#include "kernels/device_memory.h"

namespace perseid::comm {
namespace {

template <size_t kBytes>
void set(std::array<char, kBytes>& into, const std::string& text) {
  into.fill('\0');
  std::copy_n(text.begin(), std::min(text.size(), kBytes - 1), into.begin());
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool share(const GpuPlace& x, const GpuPlace& y) {
  return x.host == y.host && x.host_id == y.host_id && x.bus_id == y.bus_id &&
         (x.may_share == 0 || y.may_share == 0);
}

ErrorDetail shared_detail(const std::vector<GpuPlace>& places, size_t first, size_t second) {
  const GpuPlace& place = places[second];
  const auto num_ranks = std::count_if(places.begin(), places.end(), [&](const GpuPlace& other) {
    return other.host == place.host;
  });
  ErrorDetail detail;
  detail.operation = "nccl_group";
  detail.argument = "device";
  detail.value = place.bus_id.data();
  detail.limit = "of rank " + to_text(second) + " on host " + place.host.data() +
                 " is that of rank " + to_text(first) + ", too; " + to_text(num_ranks) +
                 " ranks run there and this one sees " + to_text(place.num_devices) +
                 " GPU(s): start one rank for each GPU (with Slurm --ntasks-per-node equal to "
                 "--gpus-per-node), choose --comm mpi or local, or for a test set NCCL_HOSTID to "
                 "another word on each rank";
  detail.culprit = static_cast<int>(second);
  return detail;
}

}  // namespace

GpuPlace own_place(int device) {
  GpuPlace place;
  std::array<char, 128> host{};
  gethostname(host.data(), host.size() - 1);
  place.host = host;
  set(place.host_id, variable("NCCL_HOSTID"));
  place.num_devices = kernels::device_count();
  place.may_share = variable("NCCL_MULTI_RANK_GPU_ENABLE") == "1" ? 1 : 0;
  if (device >= 0 && device < place.num_devices) {
    set(place.bus_id, kernels::device_bus_id(device));
  }
  return place;
}

std::vector<GpuPlace> gather_places(const GpuPlace& mine, const Group& group) {
  std::vector<GpuPlace> places(static_cast<size_t>(group.size()));
  all_gather(&mine, sizeof(mine), places.data(), group, {"nccl_group"});
  return places;
}

std::optional<ErrorDetail> place_problem(const std::vector<GpuPlace>& places) {
  for (size_t r = 0; r < places.size(); ++r) {
    if (places[r].bus_id[0] != '\0') continue;
    ErrorDetail detail;
    detail.operation = "nccl_group";
    detail.argument = "device";
    detail.value = "none";
    detail.limit =
        "is visible to rank " + to_text(r) + " on host " + places[r].host.data() +
        "; look at nvidia-smi and CUDA_VISIBLE_DEVICES there, or choose --comm mpi, tcp, "
        "local or self";
    detail.culprit = static_cast<int>(r);
    return detail;
  }
  for (size_t second = 0; second < places.size(); ++second) {
    for (size_t first = 0; first < second; ++first) {
      if (share(places[first], places[second])) return shared_detail(places, first, second);
    }
  }
  return std::nullopt;
}

}  // namespace perseid::comm
