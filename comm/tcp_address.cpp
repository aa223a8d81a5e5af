#include <charconv>

#include "comm/tcp_group.h"
#include "comm/text_hash.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int64_t kPortMax = 65535;
constexpr int64_t kJobPortFirst = 20000;  // below the ports that systems give away
constexpr int64_t kJobPorts = 10000;

int64_t number(const char* name, const std::string& text, int64_t min, int64_t max) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const std::from_chars_result parsed = std::from_chars(text.data(), end, value);
  const bool is_number = parsed.ec == std::errc{} && parsed.ptr == end;
  require(is_number && value >= min && value <= max, "tcp_address", name, text,
          "is not a whole number in [" + to_text(min) + ", " + to_text(max) +
              "]; set PERSEID_PORT to a free port");
  return value;
}

// "gpu[03-07,9]-a,x" -> "gpu03-a"
std::string first_host(const std::string& list) {
  const size_t open = list.find_first_of("[,");
  if (open == std::string::npos || list[open] == ',') return list.substr(0, open);
  const size_t close = list.find(']', open);
  const size_t end = list.find_first_of("-,]", open);
  const size_t comma = list.find(',', close);
  if (close == std::string::npos) return list.substr(0, open);
  const std::string tail =
      list.substr(close + 1, comma == std::string::npos ? comma : comma - close - 1);
  return list.substr(0, open) + list.substr(open + 1, end - open - 1) + tail;
}

std::string host_of(const LaunchInfo& launch, const Environment& environment) {
  if (const auto host = environment("MASTER_ADDR"); host.has_value()) return *host;
  for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"}) {
    const auto list = environment(name);
    if (list.has_value() && !list->empty()) return first_host(*list);
  }
  throw ConfigError(ErrorDetail{"tcp_address", "MASTER_ADDR", "unset",
                                "but ranks of " + launch.name +
                                    " need the host of rank 0; set MASTER_ADDR and PERSEID_PORT"});
}

int port_of(const LaunchInfo& launch, const Environment& environment) {
  if (const auto port = environment("PERSEID_PORT"); port.has_value()) {
    return static_cast<int>(number("PERSEID_PORT", *port, 1, kPortMax));
  }
  if (const auto port = environment("MASTER_PORT"); port.has_value()) {
    return static_cast<int>(number("MASTER_PORT", *port, 1, kPortMax - 1)) + 1;
  }
  if (const auto job = environment("SLURM_JOB_ID"); job.has_value()) {
    const int64_t id = number("SLURM_JOB_ID", *job, 0, int64_t{1} << 62);
    return static_cast<int>(kJobPortFirst + id % kJobPorts);
  }
  throw ConfigError(ErrorDetail{"tcp_address", "PERSEID_PORT", "unset",
                                "but ranks of " + launch.name +
                                    " need the port of rank 0; set it to a free port of its host"});
}

}  // namespace

TcpAddress tcp_address(const LaunchInfo& launch, const Environment& environment) {
  std::string job = to_text(launch.size);
  for (const char* name :
       {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID"}) {
    job += ',';
    job += environment(name).value_or("");
  }
  return {host_of(launch, environment), port_of(launch, environment), hash_text(job)};
}

}  // namespace perseid::comm
