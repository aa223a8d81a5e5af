#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/random.h"

namespace perseid::examples {

/// What random numbers are for; each has its own.
enum class Stream : uint64_t { kTrainSet = 1, kTestSet, kWeights, kShuffle, kDropout };
kernels::RandomKey key_of(uint64_t seed, Stream stream);

/// The first `count` of a random order of 0 .. size-1.
std::vector<int64_t> random_order(int64_t size, int64_t count, kernels::RandomKey key);

struct Images {
  at::Tensor pixels;                 ///< [n, 784] in [0, 1]
  at::Tensor labels;                 ///< [n]
  Images head(int64_t count) const;  ///< the first of them
};

/// Of Fashion-MNIST, chosen at random but the same for all seeds, as in the tutorial.
struct ImageSets {
  Images train;
  Images validation;  ///< of the training set, others
  Images test;        ///< the first of all_tests
  Images all_tests;
};

/// @param folder  with the four files, or empty: see data_places
/// @param train_images  also the number of images for validation, but at most 1000
/// Throws ConfigError for more images than there are.
ImageSets load_images(const std::string& folder, int64_t train_images, int64_t test_images);

}  // namespace perseid::examples
