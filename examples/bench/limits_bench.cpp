#include "examples/bench/limits_bench.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cstring>
#include <limits>
#include <ostream>
#include <vector>

#include "examples/bench/layer_problem.h"
#include "examples/bench/timing.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "kernels/device_memory.h"

namespace perseid::bench {
namespace {

using examples::format_text;

constexpr int64_t kWarmupRounds = 2;

struct Limit {
  std::string name;
  std::string dtype;
  int64_t size = 0;  ///< bytes copied, or rows of a matrix
  double bytes = 0;
  double flops = 0;
  std::function<void()> run;
  std::vector<double> ms;  ///< [round]
};

Limit copy_of(const Place& place, int64_t bytes) {
  if (bytes == 0) bytes = int64_t{place.is_gpu() ? 1024 : 256} << 20;
  const auto options = at::TensorOptions(at::kByte).device(place.tensors());
  const at::Tensor from = at::ones({bytes}, options), to = at::zeros({bytes}, options);
  Limit limit{"copy", "bytes", bytes, 2 * static_cast<double>(bytes), 0, {}, {}};
  limit.run = [from, to, bytes, &place] {
    const auto* source = static_cast<const char*>(from.const_data_ptr());
    auto* target = static_cast<char*>(to.mutable_data_ptr());
    if (place.is_gpu()) return kernels::copy_bytes(target, source, bytes, place.stream());
    at::parallel_for(0, bytes, 1 << 16, [&](int64_t begin, int64_t end) {
      std::memcpy(target + begin, source + begin, static_cast<size_t>(end - begin));
    });
  };
  return limit;
}

Limit product_of(const Place& place, int64_t size, at::ScalarType dtype) {
  if (size == 0) size = place.is_gpu() ? 8192 : 1024;
  const auto random = [&] {
    return at::randn({size, size}, at::TensorOptions(at::kFloat).device(place.tensors())).to(dtype);
  };
  const at::Tensor a = random(), b = random(), c = at::empty_like(a);
  const auto n = static_cast<double>(size);
  const auto element = static_cast<double>(a.element_size());
  return {"product",
          name_of(dtype),
          size,
          3 * n * n * element,
          2 * n * n * n,
          [a, b, c] { at::mm_out(const_cast<at::Tensor&>(c), a, b); },
          {}};
}

void print(const Limit& limit, std::ostream& out) {
  const double ms = median(limit.ms);
  const std::string size =
      limit.flops > 0 ? format_text("%lld^3", static_cast<long long>(limit.size))
                      : format_text("%.1f MiB", static_cast<double>(limit.size) / (1 << 20));
  const std::string gflops = limit.flops > 0 ? format_text("%.1f", limit.flops / ms / 1e6) : "-";
  out << format_text("%-8s %-9s %12s %11.3f %11.3f %10.1f %11s\n", limit.name.c_str(),
                     limit.dtype.c_str(), size.c_str(), ms, minimum(limit.ms),
                     limit.bytes / ms / 1e6, gflops.c_str())
      << std::flush;
}

void write(const Limit& limit, const LimitsBenchOptions& options, const Place& place,
           examples::JsonLines& json) {
  const double ms = median(limit.ms);
  json.write({{"bench", std::string("limits")},
              {"name", limit.name},
              {"shape", std::vector<int64_t>{limit.size}},
              {"dtype", limit.dtype},
              {"device", std::string(place.name())},
              {"threads", int64_t{options.threads}},
              {"repeats", options.repeats},
              {"ms_median", ms},
              {"ms_min", minimum(limit.ms)},
              {"bytes", limit.bytes},
              {"flops", limit.flops},
              {"gb_per_s", limit.bytes / ms / 1e6},
              {"gflops", limit.flops / ms / 1e6}});
}

}  // namespace

double copy_limit(const Place& place, int64_t repeats, int64_t bytes) {
  const Limit copy = copy_of(place, bytes);
  const std::vector<double> ms = time_calls(place, {copy.run}, kWarmupRounds, repeats).front();
  const double limit = copy.bytes / median(ms) / 1e6;
  return limit;
}

void run_limits_bench(const LimitsBenchOptions& options, std::ostream& out) {
  examples::JsonLines json(options.json);
  const Place place(options.device);
  use_threads(options.threads);
  out << format_text("%s, %d threads, %lld rounds\n", place.name(), options.threads,
                     static_cast<long long>(options.repeats))
      << "copy: bytes read and written / time, by all threads on the CPU; product: LibTorch's mm, "
         "2*n^3 FLOPs\n\n"
      << format_text("%-8s %-9s %12s %11s %11s %10s %11s\n", "", "", "size", "ms median", "ms min",
                     "GB/s", "GFLOP/s");
  std::vector<std::function<Limit()>> makers = {[&] { return copy_of(place, options.copy_bytes); }};
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
    makers.emplace_back([&, dtype] { return product_of(place, options.matrix_size, dtype); });
  }
  for (const auto& make : makers) {
    Limit limit = make();
    limit.ms = time_calls(place, {limit.run}, kWarmupRounds, options.repeats).front();
    print(limit, out);
    write(limit, options, place, json);
  }
}

}  // namespace perseid::bench
