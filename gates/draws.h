#pragma once
#include <cstdint>

#include "kernels/random.h"

namespace perseid::gates {

/// Independent streams of one gate and step.
enum class Draw : uint64_t { kJitter = 1, kNoise, kSecondExpert, kSecondKept };

/// Key of the random numbers of one forward. Element t * width + i of a stream belongs to the token
/// with the global id t, so that results do not depend on ranks.
inline kernels::RandomKey draw_key(uint64_t seed, int64_t step, int64_t layer_id, int64_t gate_id,
                                   Draw draw) {
  constexpr uint64_t kGateDraws = 0x6761746573ull;  // first, so that seed and step do not commute
  return kernels::random_key(kGateDraws)
      .with(seed)
      .with(static_cast<uint64_t>(step))
      .with(static_cast<uint64_t>(layer_id))
      .with(static_cast<uint64_t>(gate_id))
      .with(static_cast<uint64_t>(draw));
}

}  // namespace perseid::gates
