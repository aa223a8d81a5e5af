#pragma once
#include <string>
#include <vector>

#include "examples/bench/layer_problem.h"

namespace perseid::bench {

/// Names for --suite:
///   cpu      three small shapes, float32 and bfloat16, balanced and zipf: what the CPU path is
///   held to gpu      OLMoE, Qwen3-30B, Mixtral and two SonicMoE shapes, bfloat16, balanced and
///   zipf gpu-all  all 12 SonicMoE shapes, OLMoE, Qwen3-30B at two batches and Mixtral, bfloat16,
///            balanced, random and zipf
std::vector<std::string> suite_names();

/// The cases of a suite of layers, of permute and of combine.
std::vector<LayerCase> make_suite(const std::string& name);

/// The router sees T, E and K alone: those of the suite, each once; on a GPU also E = 256, K = 8 at
/// 8192 and 65536 tokens, and for gpu-all all of E 64 to 1024 and K 1 to 16 there.
std::vector<LayerCase> make_router_suite(const std::string& name);

}  // namespace perseid::bench
