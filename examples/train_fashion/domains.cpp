#include "examples/train_fashion/domains.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid::examples {
namespace {

// Streams of randomness below the data seed.
constexpr uint64_t kStreamPermutation = 1;
constexpr uint64_t kStreamTrain = 2;
constexpr uint64_t kStreamTest = 3;

DomainImages transform_all(const LabelledImages& images, std::span<const int32_t> permutation,
                           kernels::RandomKey key) {
  const auto n = static_cast<size_t>(images.size());
  const auto width = static_cast<size_t>(kImagePixels);
  DomainImages result;
  result.pixels.resize(n * width);
  result.labels = images.labels;
  result.domains.resize(n);
  result.keys.resize(n);
  for (size_t i = 0; i < n; ++i) {
    result.domains[i] =
        static_cast<int64_t>(kernels::random_below(key, i, static_cast<uint64_t>(kNumDomains)));
    const std::span<uint8_t> out(result.pixels.data() + i * width, width);
    transform_image({images.pixels.data() + i * width, width}, result.domains[i], permutation, out);
    // In integers, so that the key is exact.
    result.keys[i] = std::accumulate(out.begin(), out.end(), int64_t{0}) * 1000 / 255;
  }
  return result;
}

DomainImages cut_images(const DomainImages& images, int64_t begin, int64_t end) {
  const auto cut = [&](const auto& values, int64_t width) {
    return std::decay_t<decltype(values)>(values.begin() + begin * width,
                                          values.begin() + end * width);
  };
  return DomainImages{cut(images.pixels, kImagePixels), cut(images.labels, 1),
                      cut(images.domains, 1), cut(images.keys, 1)};
}

}  // namespace

void transform_image(std::span<const uint8_t> image, int64_t domain,
                     std::span<const int32_t> permutation, std::span<uint8_t> out) {
  constexpr auto kSide = static_cast<size_t>(kImageSide);
  switch (domain) {
    case 0:
      std::copy(image.begin(), image.end(), out.begin());
      break;
    case 1:
      std::transform(image.begin(), image.end(), out.begin(),
                     [](uint8_t pixel) { return static_cast<uint8_t>(255 - pixel); });
      break;
    case 2:
      for (size_t i = 0; i < kSide; ++i) {
        for (size_t j = 0; j < kSide; ++j) {
          out[i * kSide + j] = image[j * kSide + (kSide - 1 - i)];
        }
      }
      break;
    default:
      for (size_t p = 0; p < out.size(); ++p) out[p] = image[static_cast<size_t>(permutation[p])];
  }
}

std::vector<int64_t> random_order(int64_t n, uint64_t seed, uint64_t stream) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  const kernels::RandomKey key = kernels::random_key(seed).with(stream);
  for (uint64_t i = order.size(); i > 1; --i) {  // Fisher-Yates
    std::swap(order[i - 1], order[kernels::random_below(key, i, i)]);
  }
  return order;
}

std::vector<int32_t> pixel_permutation(uint64_t data_seed) {
  const std::vector<int64_t> order = random_order(kImagePixels, data_seed, kStreamPermutation);
  return std::vector<int32_t>(order.begin(), order.end());
}

DomainData make_domains(const FashionMnist& images, uint64_t data_seed) {
  const std::vector<int32_t> permutation = pixel_permutation(data_seed);
  const kernels::RandomKey key = kernels::random_key(data_seed);
  return DomainData{transform_all(images.train, permutation, key.with(kStreamTrain)),
                    transform_all(images.test, permutation, key.with(kStreamTest))};
}

DomainData validation_split(const DomainData& data, int64_t count) {
  const int64_t num_images = data.train.size();
  require(count > 0 && count < num_images, "train_fashion", "validation_images", count,
          "must leave images to train on; choose 1 to " + std::to_string(num_images - 1));
  return DomainData{cut_images(data.train, 0, num_images - count),
                    cut_images(data.train, num_images - count, num_images)};
}

}  // namespace perseid::examples
