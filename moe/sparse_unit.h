#pragma once
#include <compare>
#include <cstdint>
#include <string>

#include "kernels/random.h"

namespace perseid {

/// Which weight of a layer or of an expert. The numbers are part of random keys: never change them.
enum class Matrix : uint8_t { kWeight = 0, kW1 = 1, kW3 = 2, kW2 = 3, kNumbered = 16 };

/// The n-th weight of a module, n in [0, 240).
inline Matrix numbered_matrix(int64_t n) {
  return static_cast<Matrix>(static_cast<int64_t>(Matrix::kNumbered) + n);
}
inline constexpr int64_t kMaxNumberedMatrices = 240;

/// Names one sparse weight, equal on all ranks whatever their number.
struct UnitKey {
  int64_t layer = 0;
  int64_t expert = 0;  ///< global id; 0 outside of experts; -1 - id for one that all ranks hold
  Matrix matrix = Matrix::kWeight;

  friend auto operator<=>(const UnitKey&, const UnitKey&) = default;
};

/// "layer 2, expert 5, w1", for errors and logs.
std::string to_string(const UnitKey& key);

/// What random numbers are for; streams of different purposes are independent. The numbers are part
/// of random keys: never change them.
enum class UnitDraw : uint64_t {
  kFirstMask = 1,
  kDrop,
  kGrow,
  kRandomGrow,
  kFill,
  kWeights,
  kCandidates,
  kNeuronPlaces
};

/// Key of the random numbers of one unit in one step: no rank and no order of calls in it.
inline kernels::RandomKey draw_key(uint64_t seed, int64_t step, const UnitKey& unit,
                                   UnitDraw draw) {
  // random_key(a).with(b) is random_key(b).with(a), so the seed is not the first.
  constexpr uint64_t kSparseTraining = 0x7370617273656D6Full;
  return kernels::random_key(kSparseTraining)
      .with(seed)
      .with(static_cast<uint64_t>(step))
      .with(static_cast<uint64_t>(unit.layer))
      .with(static_cast<uint64_t>(unit.expert))
      .with(static_cast<uint64_t>(unit.matrix))
      .with(static_cast<uint64_t>(draw));
}

}  // namespace perseid
