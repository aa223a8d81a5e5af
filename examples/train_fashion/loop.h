#pragma once
#include <cstdint>

#include "comm/group.h"
#include "examples/train_fashion/train.h"

// What the training loops of both tasks have in common.

namespace perseid::examples {

inline constexpr uint64_t kStreamOrder = 1000;  ///< + epoch, below the run seed, see random_order
inline constexpr uint64_t kStreamHeld = 500;    ///< of held batches, below the run seed
inline constexpr uint64_t kStreamScramble = 501;
inline constexpr int64_t kTestBatch = 1000;  ///< images of an evaluation, over all ranks

/// Throws ConfigError for what only shows with data and ranks.
void check_options(const TrainOptions& options, const comm::Group& world, int64_t num_images);

}  // namespace perseid::examples
