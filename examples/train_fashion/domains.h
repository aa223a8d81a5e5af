#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "examples/common/fashion_mnist.h"

// The mixture of domains: each image is shown through one of four transforms, and a linear expert
// can serve one of them only. No gate is told which.

namespace perseid::examples {

inline constexpr int64_t kNumDomains = 4;
inline constexpr std::array<const char*, 4> kDomainNames = {"plain", "inverted", "rotated",
                                                            "permuted"};

/// Transformed images, in the order of the data set.
struct DomainImages {
  std::vector<uint8_t> pixels;   ///< [n, 784], 0 to 255
  std::vector<int64_t> labels;   ///< [n]
  std::vector<int64_t> domains;  ///< [n], in [0, 4)
  std::vector<int64_t> keys;  ///< [n], floor(1000 * sum of the pixels / 255): the key of hash gates

  int64_t size() const { return static_cast<int64_t>(labels.size()); }
};

struct DomainData {
  DomainImages train;
  DomainImages test;
};

/// Domain 0: the image. 1: inverted. 2: rotated by 90 degrees counter-clockwise,
/// out[i][j] = in[j][27-i]. 3: out[p] = in[permutation[p]].
/// @param image, out   784 pixels that do not overlap
/// @param permutation  784 places, see pixel_permutation
void transform_image(std::span<const uint8_t> image, int64_t domain,
                     std::span<const int32_t> permutation, std::span<uint8_t> out);

/// A permutation of 0..n-1, drawn from (seed, stream) alone: equal on every rank and platform.
std::vector<int64_t> random_order(int64_t n, uint64_t seed, uint64_t stream);

/// The permutation of domain 3, the same for all images.
std::vector<int32_t> pixel_permutation(uint64_t data_seed);

/// Gives each image its domain, drawn uniformly from (data_seed, its number), once for all runs.
DomainData make_domains(const FashionMnist& images, uint64_t data_seed);

/// For choosing settings: the last `count` training images take the place of the test images, and
/// are trained on no more. Throws ConfigError unless 0 < count < number of training images.
DomainData validation_split(const DomainData& data, int64_t count);

}  // namespace perseid::examples
