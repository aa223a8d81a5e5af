#include "examples/bench/suites.h"

#include <algorithm>

namespace perseid::bench {
namespace {

// T, D, F, E, K. The batches of SonicMoE are those of its own benchmark (arXiv 2512.14080); the
// other models have 8192 tokens, Qwen3 also four times as many.
LayerCase named(const char* name, int64_t num_tokens, int64_t d_model, int64_t d_ff,
                int64_t num_experts, int64_t top_k) {
  LayerCase shape{num_tokens, d_model, d_ff, num_experts, top_k};
  shape.name = name;
  return shape;
}

std::vector<LayerCase> main_shapes() {
  return {named("OLMoE-1B-7B", 8192, 2048, 1024, 64, 8),
          named("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8),
          named("Mixtral-8x7B", 8192, 4096, 14336, 8, 2),
          named("SonicMoE 7B, F=256", 24576, 1536, 256, 128, 8),
          named("SonicMoE 120B, F=1024", 32768, 4096, 1024, 128, 8)};
}

std::vector<LayerCase> all_shapes() {
  return {named("SonicMoE 1.4B, F=256", 40960, 768, 256, 128, 8),
          named("SonicMoE 1.4B, F=512", 40960, 768, 512, 64, 4),
          named("SonicMoE 1.4B, F=1024", 40960, 768, 1024, 32, 2),
          named("SonicMoE 7B, F=256", 24576, 1536, 256, 128, 8),
          named("SonicMoE 7B, F=512", 24576, 1536, 512, 64, 4),
          named("SonicMoE 7B, F=1024", 24576, 1536, 1024, 32, 2),
          named("SonicMoE 30B, F=256", 32768, 4096, 256, 256, 16),
          named("SonicMoE 30B, F=512", 32768, 4096, 512, 128, 8),
          named("SonicMoE 30B, F=1024", 32768, 4096, 1024, 64, 4),
          named("SonicMoE 120B, F=512", 32768, 4096, 512, 256, 16),
          named("SonicMoE 120B, F=1024", 32768, 4096, 1024, 128, 8),
          named("SonicMoE 120B, F=2048", 32768, 4096, 2048, 64, 4),
          named("OLMoE-1B-7B", 8192, 2048, 1024, 64, 8),
          named("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8),
          named("Qwen3-30B-A3B, T=32768", 32768, 2048, 768, 128, 8),
          named("Mixtral-8x7B", 8192, 4096, 14336, 8, 2)};
}

/// Every shape with every type and every routing.
std::vector<LayerCase> cross(const std::vector<LayerCase>& shapes,
                             const std::vector<at::ScalarType>& dtypes,
                             const std::vector<Distribution>& routings) {
  std::vector<LayerCase> cases;
  for (LayerCase shape : shapes) {
    for (const at::ScalarType dtype : dtypes) {
      for (const Distribution routing : routings) {
        shape.dtype = dtype;
        shape.routing = routing;
        cases.push_back(shape);
      }
    }
  }
  return cases;
}

}  // namespace

std::vector<std::string> suite_names() { return {"cpu", "gpu", "gpu-all"}; }

std::vector<LayerCase> make_suite(const std::string& name) {
  const auto balanced = Distribution::kBalanced, random = Distribution::kRandom,
             zipf = Distribution::kZipf;
  if (name == "cpu") {
    return cross({LayerCase{2048, 128, 256, 8, 2}, LayerCase{4096, 512, 1024, 16, 2},
                  LayerCase{4096, 256, 128, 64, 8}},
                 {at::kFloat, at::kBFloat16}, {balanced, zipf});
  }
  if (name == "gpu") return cross(main_shapes(), {at::kBFloat16}, {balanced, zipf});
  return cross(all_shapes(), {at::kBFloat16}, {balanced, random, zipf});
}

std::vector<LayerCase> make_router_suite(const std::string& name) {
  std::vector<LayerCase> cases;
  const auto add = [&cases](const LayerCase& shape) {
    const bool is_new = std::none_of(cases.begin(), cases.end(), [&](const LayerCase& other) {
      return other.num_tokens == shape.num_tokens && other.num_experts == shape.num_experts &&
             other.top_k == shape.top_k;
    });
    if (is_new) cases.push_back(shape);
  };
  for (const LayerCase& shape : make_suite(name)) add(shape);
  if (name == "cpu") return cases;
  const bool all = name == "gpu-all";
  for (const int64_t T : {8192, 65536}) {
    for (const int64_t E : {64, 128, 256, 512, 1024}) {
      for (const int64_t K : {1, 2, 4, 8, 16}) {
        if (all || (E == 256 && K == 8)) add(named("", T, 0, 0, E, K));
      }
    }
  }
  return cases;
}

}  // namespace perseid::bench
