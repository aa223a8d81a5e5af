#include "examples/bench/exchange_bench.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <vector>

#include "comm/collectives.h"
#include "comm/exchange.h"
#include "examples/bench/plain_alltoall.h"
#include "examples/bench/timing.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "kernels/device_memory.h"
#include "kernels/error.h"

namespace perseid::bench {
namespace {

using examples::format_text;

constexpr int64_t kRowFloats = 256;  // a row of 1 KiB; smaller blocks are one row

/// Where rows are: host memory, or device memory and a stream of this rank.
class RowPlace {
 public:
  explicit RowPlace(kernels::Device device) {
    if (device == kernels::Device::kCuda) stream_ = std::make_unique<kernels::OwnedStream>();
  }
  bool is_gpu() const { return stream_ != nullptr; }
  kernels::Stream stream() const { return is_gpu() ? stream_->get() : kernels::Stream{}; }
  void finish() const {
    if (is_gpu()) kernels::synchronize(stream());
  }

 private:
  std::unique_ptr<kernels::OwnedStream> stream_;
};

/// Rows on the host, which are those of the exchange or are copied to and from them.
class Rows {
 public:
  Rows(int64_t floats, const RowPlace& place)
      : host(static_cast<size_t>(floats)), stream_(place.stream()) {
    if (place.is_gpu()) device_ = kernels::DeviceMemory(bytes(), stream_);
  }
  float* data() { return is_gpu() ? device_.as<float>() : host.data(); }
  void to_device() {
    if (!is_gpu()) return;
    kernels::copy_bytes(device_.data(), host.data(), bytes(), stream_);
    kernels::synchronize(stream_);
  }
  void to_host() {
    if (!is_gpu()) return;
    kernels::copy_bytes(host.data(), device_.data(), bytes(), stream_);
    kernels::synchronize(stream_);
  }

  std::vector<float> host;

 private:
  bool is_gpu() const { return stream_.device == kernels::Device::kCuda; }
  int64_t bytes() const { return static_cast<int64_t>(host.size() * sizeof(float)); }

  kernels::Stream stream_;
  kernels::DeviceMemory device_;
};

struct Buffers {
  Rows send, recv;
};

/// Element i of the block from rank `source` to rank `target`: exact, and unique near i.
float value_of(int source, int target, int64_t i, int num_ranks) {
  return static_cast<float>((i * num_ranks + target) % 4093 * num_ranks + source);
}

Buffers make_buffers(int64_t floats, const comm::Group& world, const RowPlace& place) {
  Buffers buffers{Rows(floats * world.size(), place), Rows(floats * world.size(), place)};
  for (int target = 0; target < world.size(); ++target) {
    for (int64_t i = 0; i < floats; ++i) {
      buffers.send.host[static_cast<size_t>(target * floats + i)] =
          value_of(world.rank(), target, i, world.size());
    }
  }
  buffers.send.to_device();
  return buffers;
}

/// Elements that did not arrive as sent, on all ranks, after one exchange by `exchange`.
int64_t count_wrong(Buffers& buffers, int64_t floats, const comm::Group& world,
                    const std::function<void()>& exchange) {
  std::vector<float>& arrived = buffers.recv.host;
  std::fill(arrived.begin(), arrived.end(), std::numeric_limits<float>::quiet_NaN());
  buffers.recv.to_device();
  exchange();
  buffers.recv.to_host();
  int64_t wrong = 0;
  for (int source = 0; source < world.size(); ++source) {
    for (int64_t i = 0; i < floats; ++i) {
      const float got = arrived[static_cast<size_t>(source * floats + i)];
      wrong += got == value_of(source, world.rank(), i, world.size()) ? 0 : 1;
    }
  }
  comm::all_reduce(&wrong, 1, comm::ReduceOp::kSum, world);
  return wrong;
}

/// Milliseconds of one exchange in each round, of the slowest rank.
std::vector<std::vector<double>> time_exchanges(const std::vector<std::function<void()>>& exchanges,
                                                int64_t iterations,
                                                const ExchangeBenchOptions& options,
                                                const comm::Group& world, const RowPlace& place) {
  std::vector<std::vector<double>> ms(exchanges.size());
  for (int64_t round = -options.warmup_rounds; round < options.repeats; ++round) {
    for (size_t i = 0; i < exchanges.size(); ++i) {
      comm::barrier(world);
      const double start = now_ms();
      for (int64_t n = 0; n < iterations; ++n) exchanges[i]();
      place.finish();
      double slowest = (now_ms() - start) / static_cast<double>(iterations);
      comm::all_reduce(&slowest, 1, comm::ReduceOp::kMax, world);
      if (round >= 0) ms[i].push_back(slowest);
    }
  }
  return ms;
}

struct Row {
  int64_t floats = 0;  ///< per peer
  int num_ranks = 1;
  std::vector<std::vector<double>> ms;  ///< ours, and plain MPI's if there is one
  std::optional<int64_t> wrong;

  int64_t peer_bytes() const { return floats * int64_t{sizeof(float)}; }
  int64_t size() const { return peer_bytes() * num_ranks; }
  bool has_plain() const { return ms.size() == 2; }
  double gb_per_s(size_t contender) const {
    return static_cast<double>(size()) / median(ms[contender]) / 1e6;
  }
  double bus_factor() const { return static_cast<double>(num_ranks - 1) / num_ranks; }
};

Row measure(int64_t floats, const ExchangeBenchOptions& options, const comm::Group& world,
            const RowPlace& place) {
  Buffers buffers = make_buffers(floats, world, place);
  const comm::RowType row{kernels::DType::kFloat32, floats % kRowFloats == 0 ? kRowFloats : floats};
  const std::vector<int64_t> rows(static_cast<size_t>(world.size()), floats / row.width);
  const comm::ExchangePlan plan{rows, rows};
  std::vector<std::function<void()>> exchanges = {[&] {
    comm::exchange_rows(buffers.send.data(), buffers.recv.data(), row, plan, world, {},
                        place.stream());
  }};
  if (!place.is_gpu() && PlainAllToAll::available(world)) {
    exchanges.emplace_back(
        [&] { PlainAllToAll()(buffers.send.data(), buffers.recv.data(), floats, world.size()); });
  }

  Row result{floats, world.size(), {}, {}};
  if (options.check) {
    result.wrong = 0;
    for (const auto& exchange : exchanges) {
      *result.wrong += count_wrong(buffers, floats, world, exchange);
    }
  }
  const int64_t small_enough = std::max<int64_t>(1, (int64_t{20} << 20) / result.peer_bytes());
  result.ms =
      time_exchanges(exchanges, std::min(options.iterations, small_enough), options, world, place);
  return result;
}

void print_head(const comm::Group& world, const RowPlace& place, std::ostream& out) {
  out << format_text("%d ranks, %s, %s\n", world.size(), world.backend_name(),
                     place.is_gpu() ? "cuda" : "cpu")
      << "per peer: bytes a rank sends to each rank, itself included; size = P * per peer; count: "
         "floats per peer;\ntime: median, slowest rank; algbw = size / time, busbw = "
         "algbw*(P-1)/P; "
         "ratio: exchange_rows / MPI_Alltoallv in the same round, median\n\n"
      << format_text("%43s| %-29s| %-29s|\n", "", "exchange_rows", "MPI_Alltoallv")
      << format_text("%12s %12s %12s     | %9s %9s %9s | %9s %9s %9s | %7s %7s\n", "per peer (B)",
                     "size (B)", "count", "time (us)", "algbw", "busbw", "time (us)", "algbw",
                     "busbw", "ratio", "#wrong");
}

std::string times_text(const Row& row, size_t contender) {
  if (contender >= row.ms.size()) return format_text("%9s %9s %9s", "-", "-", "-");
  const double algbw = row.gb_per_s(contender);
  return format_text("%9.2f %9.3f %9.3f", 1e3 * median(row.ms[contender]), algbw,
                     algbw * row.bus_factor());
}

void print(const Row& row, std::ostream& out) {
  const std::string ratio =
      row.has_plain() ? format_text("%.3f", median_ratio(row.ms[0], row.ms[1])) : "-";
  const std::string wrong = row.wrong ? std::to_string(*row.wrong) : "-";
  out << format_text("%12lld %12lld %12lld     | %s | %s | %7s %7s\n",
                     static_cast<long long>(row.peer_bytes()), static_cast<long long>(row.size()),
                     static_cast<long long>(row.floats), times_text(row, 0).c_str(),
                     times_text(row, 1).c_str(), ratio.c_str(), wrong.c_str())
      << std::flush;
}

void write(const Row& row, const comm::Group& world, const RowPlace& place,
           examples::JsonLines& json) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const char* const names[] = {"exchange_rows", "MPI_Alltoallv"};
  for (size_t i = 0; i < row.ms.size(); ++i) {
    json.write(
        {{"bench", std::string("exchange")},
         {"name", std::string(names[i])},
         {"shape", std::vector<int64_t>{row.num_ranks, row.floats}},
         {"dtype", std::string("float32")},
         {"ranks", int64_t{row.num_ranks}},
         {"comm", std::string(world.backend_name())},
         {"device", std::string(place.is_gpu() ? "cuda" : "cpu")},
         {"threads", int64_t{1}},
         {"bytes_per_peer", row.peer_bytes()},
         {"size", row.size()},
         {"ms_median", median(row.ms[i])},
         {"ms_min", minimum(row.ms[i])},
         {"algbw", row.gb_per_s(i)},
         {"busbw", row.gb_per_s(i) * row.bus_factor()},
         {"fraction_of_limit", row.has_plain() ? 1 / median_ratio(row.ms[i], row.ms[1]) : nan}});
  }
}

}  // namespace

void run_exchange_bench(const ExchangeBenchOptions& options, const comm::Group& world,
                        std::ostream& out) {
  const bool speaks = world.rank() == 0;
  examples::JsonLines json(speaks ? options.json : std::string());
  const RowPlace place(options.device);
  if (speaks) print_head(world, place, out);
  int64_t wrong = 0;
  for (int64_t bytes = options.min_bytes; bytes <= options.max_bytes;
       bytes *= options.step_factor) {
    const Row row = measure(bytes / int64_t{sizeof(float)}, options, world, place);
    wrong += row.wrong.value_or(0);
    if (!speaks) continue;
    print(row, out);
    write(row, world, place, json);
  }
  if (wrong > 0) {
    throw InternalError(ErrorDetail{"perseid-bench exchange", "wrong", to_text(wrong),
                                    "elements arrived that were not sent", world.rank()});
  }
}

}  // namespace perseid::bench
