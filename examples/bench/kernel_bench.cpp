#include "examples/bench/kernel_bench.h"

#include <ATen/ATen.h>

#include <ostream>

#include "examples/bench/limits_bench.h"
#include "examples/bench/timing.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::bench {
namespace {

using examples::format_text;

constexpr int64_t kWarmupRounds = 2;

/// Without tokens that have a type and choose experts.
bool has_no_rows(const std::string& bench) { return bench == "router" || bench == "search"; }

/// Which sizes matter to a bench, in the order of "shape" in its JSON.
std::vector<std::pair<const char*, int64_t>> sizes_of(const std::string& bench,
                                                      const LayerCase& shape) {
  if (bench == "router") {
    return {{"T", shape.num_tokens}, {"E", shape.num_experts}, {"K", shape.top_k}};
  }
  if (bench == "search") return {{"E", shape.num_experts}, {"iterations", kSearchIterations}};
  return {
      {"T", shape.num_tokens}, {"D", shape.d_model}, {"E", shape.num_experts}, {"K", shape.top_k}};
}

std::vector<Work> works_of(const std::string& bench, const LayerCase& shape, const Place& place,
                           uint64_t seed) {
  if (bench == "router") return router_works(shape, place, seed);
  if (bench == "search") return search_works(shape, place, seed);
  return bench == "permute" ? permute_works(shape, place, seed) : combine_works(shape, place, seed);
}

std::string title_of(const std::string& bench, const LayerCase& shape) {
  std::string names, values;
  for (const auto& [name, value] : sizes_of(bench, shape)) {
    names += (names.empty() ? "" : ", ") + std::string(name);
    values += (values.empty() ? "" : ", ") + std::to_string(value);
  }
  const std::string kind = has_no_rows(bench)
                               ? "float32"
                               : std::string(name_of(shape.dtype)) + " " + name_of(shape.routing);
  return (shape.name.empty() ? "" : shape.name + ": ") + "(" + names + ") = (" + values + ") " +
         kind;
}

struct Result {
  LayerCase shape;
  std::vector<Work> works;
  std::vector<std::vector<double>> ms;  ///< [work][round]

  double gb_per_s(size_t work) const { return works[work].bytes / median(ms[work]) / 1e6; }
  double gflops(size_t work) const { return works[work].flops / median(ms[work]) / 1e6; }
  double ratio(size_t work) const { return median_ratio(ms[work], ms[works[work].reference]); }
};

void print(const std::string& bench, const Result& result, double copy, std::ostream& out) {
  out << format_text("\n%s\n%-26s %10s %11s %11s %9s %8s %9s %8s\n",
                     title_of(bench, result.shape).c_str(), "", "MB", "us median", "us min", "GB/s",
                     "of copy", "GFLOP/s", "ratio");
  for (size_t i = 0; i < result.works.size(); ++i) {
    const Work& work = result.works[i];
    const std::string gflops = work.flops > 0 ? format_text("%.1f", result.gflops(i)) : "-";
    out << format_text("%-26s %10.2f %11.1f %11.1f %9.1f %7.1f%% %9s %8.3f\n", work.name.c_str(),
                       work.bytes / 1e6, 1e3 * median(result.ms[i]), 1e3 * minimum(result.ms[i]),
                       result.gb_per_s(i), 100 * result.gb_per_s(i) / copy, gflops.c_str(),
                       result.ratio(i));
  }
  out << std::flush;
}

void write(const KernelBenchOptions& options, const Result& result, double copy, const Place& place,
           examples::JsonLines& json) {
  const bool is_float = has_no_rows(options.bench);
  std::vector<int64_t> shape;
  for (const auto& [name, value] : sizes_of(options.bench, result.shape)) shape.push_back(value);
  for (size_t i = 0; i < result.works.size(); ++i) {
    const Work& work = result.works[i];
    examples::JsonObject object{
        {"bench", options.bench},
        {"name", work.name},
        {"case", result.shape.name},
        {"shape", shape},
        {"dtype", std::string(is_float ? "float32" : name_of(result.shape.dtype))}};
    if (!is_float) object.push_back({"routing", std::string(name_of(result.shape.routing))});
    for (examples::JsonField& field :
         examples::JsonObject{{"device", std::string(place.name())},
                              {"threads", int64_t{options.threads}},
                              {"repeats", options.repeats},
                              {"ms_median", median(result.ms[i])},
                              {"ms_min", minimum(result.ms[i])},
                              {"bytes", work.bytes},
                              {"flops", work.flops},
                              {"gb_per_s", result.gb_per_s(i)},
                              {"gflops", result.gflops(i)},
                              {"copy_gb_per_s", copy},
                              {"fraction_of_limit", result.gb_per_s(i) / copy},
                              {"reference", result.works[work.reference].name},
                              {"ratio_to_reference", result.ratio(i)}}) {
      object.push_back(std::move(field));
    }
    json.write(object);
  }
}

}  // namespace

void require_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance,
                   const std::string& operation, const std::string& what) {
  const at::Tensor want = expected.to(at::kFloat);
  const double error = (actual.to(at::kFloat) - want).abs().max().item<double>();
  const double limit = tolerance * want.abs().max().item<double>();
  if (error <= limit) return;
  throw InternalError(ErrorDetail{"perseid-bench " + operation, what, to_text(error),
                                  "differs from LibTorch's by more than " + to_text(limit)});
}

void run_kernel_bench(const KernelBenchOptions& options, std::ostream& out) {
  examples::JsonLines json(options.json);
  const Place place(options.device);
  use_threads(options.threads);
  const double copy = copy_limit(place, options.repeats);
  out << format_text("%s, %d threads, %lld rounds; copy limit %.1f GB/s\n", place.name(),
                     options.threads, static_cast<long long>(options.repeats), copy)
      << "MB: least bytes to read and write; GB/s = these / time; of copy = GB/s / copy limit "
         "(over "
         "100%: data stay in caches);\nratio = time / time of LibTorch's row for the same, in the "
         "same round, median\n";
  for (const LayerCase& shape : options.cases) {
    place.release_memory();
    Result result{shape, works_of(options.bench, shape, place, options.seed), {}};
    std::vector<std::function<void()>> runs;
    for (const Work& work : result.works) runs.push_back(work.run);
    result.ms = time_calls(place, runs, kWarmupRounds, options.repeats);
    print(options.bench, result, copy, out);
    write(options, result, copy, place, json);
  }
}

}  // namespace perseid::bench
