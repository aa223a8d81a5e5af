#include "examples/train_fashion/multi_data.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

#include "examples/train_fashion/domains.h"
#include "kernels/error.h"
#include "kernels/random.h"

namespace perseid::examples {
namespace {

// Streams of randomness below the data seed.
constexpr uint64_t kStreamSplit = 100;  // + class
constexpr uint64_t kStreamTrainPairs = 200;
constexpr uint64_t kStreamValidationPairs = 201;
constexpr uint64_t kStreamTestPairs = 202;

using Members = std::vector<int64_t>;  // image numbers of a split

struct TrainingSplit {
  Members train;
  Members validation;
};

TrainingSplit split_small(int64_t num_images, uint64_t data_seed) {
  const Members order = random_order(num_images, data_seed, kStreamSplit);
  const auto train_end = order.begin() + num_images / 4;
  return {Members(order.begin(), train_end), Members(train_end, train_end + num_images / 12)};
}

TrainingSplit split_by_class(const std::vector<int64_t>& labels, uint64_t data_seed) {
  TrainingSplit split;
  for (int64_t c = 0; c < kNumClasses; ++c) {
    Members of_class;
    for (size_t i = 0; i < labels.size(); ++i) {
      if (labels[i] == c) of_class.push_back(static_cast<int64_t>(i));
    }
    const auto count = static_cast<int64_t>(of_class.size());
    const Members order = random_order(count, data_seed, kStreamSplit + static_cast<uint64_t>(c));
    for (int64_t i = 0; i < count; ++i) {
      Members& part = i < count / 6 ? split.validation : split.train;
      part.push_back(of_class[static_cast<size_t>(order[static_cast<size_t>(i)])]);
    }
  }
  return split;
}

/// Each member `times` times with a partner of its own.
ImagePairs pair_up(std::shared_ptr<const LabelledImages> images, const Members& members,
                   int64_t times, kernels::RandomKey key) {
  const size_t n = members.size();
  if (n < 2) {
    throw DataError(ErrorDetail{"make_multi", "images", std::to_string(n),
                                "in a split are too few for pairs; it takes 2, so 24 training "
                                "images and 4 test images, or 12 of a class with the published "
                                "protocol"});
  }
  ImagePairs pairs;
  pairs.images = std::move(images);
  for (size_t sample = 0; sample < n * static_cast<size_t>(times); ++sample) {
    const size_t place = sample % n;
    const size_t other = kernels::random_below(key, sample, n - 1);
    pairs.top_left.push_back(members[place]);
    pairs.bottom_right.push_back(members[other < place ? other : other + 1]);
  }
  return pairs;
}

std::span<const uint8_t> image_of(const LabelledImages& images, int64_t number) {
  return std::span<const uint8_t>(images.pixels)
      .subspan(static_cast<size_t>(number * kImagePixels), size_t{kImagePixels});
}

}  // namespace

MultiData make_multi(FashionMnist images, Protocol protocol, uint64_t data_seed) {
  const bool small = protocol == Protocol::kSmall;
  const auto train = std::make_shared<const LabelledImages>(std::move(images.train));
  const auto test = std::make_shared<const LabelledImages>(std::move(images.test));
  const TrainingSplit split =
      small ? split_small(train->size(), data_seed) : split_by_class(train->labels, data_seed);
  Members test_members(static_cast<size_t>(small ? test->size() / 2 : test->size()));
  std::iota(test_members.begin(), test_members.end(), int64_t{0});
  const kernels::RandomKey key = kernels::random_key(data_seed);
  return MultiData{
      pair_up(train, split.train, 2, key.with(kStreamTrainPairs)),
      pair_up(train, split.validation, small ? 1 : 2, key.with(kStreamValidationPairs)),
      pair_up(test, test_members, 2, key.with(kStreamTestPairs))};
}

void draw_canvas(std::span<const uint8_t> top_left, std::span<const uint8_t> bottom_right,
                 std::span<int16_t> canvas) {
  constexpr auto kSide = static_cast<size_t>(kImageSide);
  constexpr auto kWide = static_cast<size_t>(kCanvasSide);
  constexpr auto kShift = static_cast<size_t>(kCanvasShift);
  std::fill(canvas.begin(), canvas.end(), int16_t{0});
  for (size_t i = 0; i < kSide; ++i) {
    for (size_t j = 0; j < kSide; ++j) canvas[i * kWide + j] = top_left[i * kSide + j];
  }
  for (size_t i = 0; i < kSide; ++i) {
    for (size_t j = 0; j < kSide; ++j) {
      int16_t& pixel = canvas[(i + kShift) * kWide + j + kShift];
      pixel = static_cast<int16_t>(pixel + bottom_right[i * kSide + j]);
    }
  }
}

CanvasBatch draw_batch(const ImagePairs& pairs, std::span<const int64_t> samples) {
  CanvasBatch batch;
  batch.pixels.resize(samples.size() * static_cast<size_t>(kCanvasPixels));
  std::span<int16_t> left(batch.pixels);
  for (const int64_t sample : samples) {
    const int64_t first = pairs.top_left[static_cast<size_t>(sample)];
    const int64_t second = pairs.bottom_right[static_cast<size_t>(sample)];
    draw_canvas(image_of(*pairs.images, first), image_of(*pairs.images, second),
                left.first(static_cast<size_t>(kCanvasPixels)));
    left = left.subspan(static_cast<size_t>(kCanvasPixels));
    batch.classes[0].push_back(pairs.images->labels[static_cast<size_t>(first)]);
    batch.classes[1].push_back(pairs.images->labels[static_cast<size_t>(second)]);
  }
  return batch;
}

}  // namespace perseid::examples
