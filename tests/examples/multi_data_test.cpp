// Multi-Fashion-MNIST: canvases, splits, pairs.
//   Canvas             pixel by pixel: one image, the other one, their sum, zeros outside of both
//   PixelSums          a canvas sums to the sums of its images; overlaps exceed 255 and stay
//   SizesOfProtocols   60,000 + 10,000 images give 100,000 / 20,000 / 20,000 and 30,000 / 5,000 /
//                      10,000 samples; published splits have equal classes
//   Pairs              each image of a split is the top-left one twice (or once), no sample has one
//                      image twice, both come from the same split, splits have no image in common
//   PartnersAreUniform every other image of the split is drawn, the last one too
//   SeedDecides        equal for one seed, different for another
//   OrderOfABatch      samples as asked for; none of them gives an empty batch
//   TooFewImages       DataError with the count
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "examples/train_fashion/multi_data.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

/// Images of one grey value each: `value(i)`, class i mod 10.
LabelledImages flat_images(int64_t count) {
  LabelledImages images;
  for (int64_t i = 0; i < count; ++i) {
    images.pixels.insert(images.pixels.end(), size_t{kImagePixels}, static_cast<uint8_t>(i % 251));
    images.labels.push_back(i % kNumClasses);
  }
  return images;
}

/// As many images as the published set, which are never looked at.
FashionMnist unseen_images() {
  FashionMnist images;
  for (int64_t i = 0; i < 60000; ++i) images.train.labels.push_back(i % kNumClasses);
  for (int64_t i = 0; i < 10000; ++i) images.test.labels.push_back(i % kNumClasses);
  return images;
}

MultiData fixture_pairs(Protocol protocol, uint64_t seed = 0) {
  return make_multi(load_fashion_mnist(fixture_folder()), protocol, seed);
}

std::vector<int64_t> all_samples(const ImagePairs& pairs) {
  std::vector<int64_t> samples(static_cast<size_t>(pairs.size()));
  std::iota(samples.begin(), samples.end(), int64_t{0});
  return samples;
}

TEST(MultiData, Canvas) {
  std::array<uint8_t, size_t{kImagePixels}> first{};
  std::array<uint8_t, size_t{kImagePixels}> second{};
  for (size_t p = 0; p < first.size(); ++p) {
    first[p] = static_cast<uint8_t>(p % 256);
    second[p] = static_cast<uint8_t>((p * 7 + 3) % 256);
  }
  std::array<int16_t, size_t{kCanvasPixels}> canvas{};
  canvas.fill(-1);
  draw_canvas(first, second, canvas);
  for (size_t i = 0; i < 36; ++i) {
    for (size_t j = 0; j < 36; ++j) {
      int expected = 0;
      if (i < 28 && j < 28) expected += first[i * 28 + j];
      if (i >= 8 && j >= 8) expected += second[(i - 8) * 28 + j - 8];
      ASSERT_EQ(canvas[i * 36 + j], expected) << i << ", " << j;
    }
  }
}

TEST(MultiData, PixelSums) {
  const MultiData data = fixture_pairs(Protocol::kSmall);
  const CanvasBatch batch = draw_batch(data.train, all_samples(data.train));
  ASSERT_EQ(batch.pixels.size(), static_cast<size_t>(data.train.size() * kCanvasPixels));
  const LabelledImages& images = *data.train.images;
  const auto sum_of_image = [&](int64_t image) {
    const auto first = images.pixels.begin() + image * kImagePixels;
    return std::accumulate(first, first + kImagePixels, int64_t{0});
  };
  for (int64_t s = 0; s < data.train.size(); ++s) {
    const auto i = static_cast<size_t>(s);
    const auto first = batch.pixels.begin() + s * kCanvasPixels;
    EXPECT_EQ(std::accumulate(first, first + kCanvasPixels, int64_t{0}),
              sum_of_image(data.train.top_left[i]) + sum_of_image(data.train.bottom_right[i]));
    EXPECT_EQ(batch.classes[0][i], images.labels[static_cast<size_t>(data.train.top_left[i])]);
    EXPECT_EQ(batch.classes[1][i], images.labels[static_cast<size_t>(data.train.bottom_right[i])]);
  }
  const int16_t largest = *std::max_element(batch.pixels.begin(), batch.pixels.end());
  EXPECT_GT(largest, 255);
  EXPECT_LE(largest, 510);
  std::array<int16_t, size_t{kCanvasPixels}> canvas{};
  const std::vector<uint8_t> white(size_t{kImagePixels}, 255);
  draw_canvas(white, white, canvas);
  EXPECT_EQ(std::count(canvas.begin(), canvas.end(), 510), 20 * 20);
  EXPECT_EQ(std::count(canvas.begin(), canvas.end(), 255), 2 * (28 * 28 - 20 * 20));
}

TEST(MultiData, SizesOfProtocols) {
  const MultiData small = make_multi(unseen_images(), Protocol::kSmall, 0);
  EXPECT_EQ(small.train.size(), 30000);
  EXPECT_EQ(small.validation.size(), 5000);
  EXPECT_EQ(small.test.size(), 10000);
  EXPECT_EQ(*std::max_element(small.test.top_left.begin(), small.test.top_left.end()), 4999);

  const MultiData published = make_multi(unseen_images(), Protocol::kPublished, 0);
  EXPECT_EQ(published.train.size(), 100000);
  EXPECT_EQ(published.validation.size(), 20000);
  EXPECT_EQ(published.test.size(), 20000);
  for (const ImagePairs* pairs : {&published.train, &published.validation, &published.test}) {
    std::array<int64_t, kNumClasses> counts{};
    for (const int64_t image : pairs->top_left) {
      ++counts.at(static_cast<size_t>(pairs->images->labels[static_cast<size_t>(image)]));
    }
    for (const int64_t count : counts) EXPECT_EQ(count, pairs->size() / 10);
  }
}

TEST(MultiData, Pairs) {
  for (const Protocol protocol : {Protocol::kSmall, Protocol::kPublished}) {
    const MultiData data = fixture_pairs(protocol);
    std::vector<std::set<int64_t>> members;
    for (const ImagePairs* pairs : {&data.train, &data.validation, &data.test}) {
      std::map<int64_t, int> times;
      for (const int64_t image : pairs->top_left) ++times[image];
      const bool once = protocol == Protocol::kSmall && pairs == &data.validation;
      members.emplace_back();
      for (const auto& [image, count] : times) {
        EXPECT_EQ(count, once ? 1 : 2);
        members.back().insert(image);
      }
      ASSERT_EQ(pairs->bottom_right.size(), pairs->top_left.size());
      for (size_t s = 0; s < pairs->top_left.size(); ++s) {
        EXPECT_NE(pairs->bottom_right[s], pairs->top_left[s]);
        EXPECT_EQ(members.back().count(pairs->bottom_right[s]), size_t{1});
      }
    }
    for (const int64_t image : members[1]) EXPECT_EQ(members[0].count(image), size_t{0});
    const size_t used = members[0].size() + members[1].size();
    EXPECT_EQ(used, protocol == Protocol::kSmall ? size_t{64 + 21} : size_t{256});
    EXPECT_EQ(members[2].size(), protocol == Protocol::kSmall ? size_t{32} : size_t{64});
  }
}

TEST(MultiData, PartnersAreUniform) {
  // A test split of 3 images: each pairing of two has the chance 1/2. 2,000 seeds, two draws each.
  const FashionMnist images{flat_images(240), flat_images(3)};
  std::array<std::array<int, 3>, 3> counts{};
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    const ImagePairs test = make_multi(images, Protocol::kPublished, seed).test;
    for (size_t s = 0; s < 6; ++s) {
      ++counts.at(static_cast<size_t>(test.top_left[s]))
            .at(static_cast<size_t>(test.bottom_right[s]));
    }
  }
  for (size_t i = 0; i < 3; ++i) {
    for (size_t j = 0; j < 3; ++j) {
      EXPECT_NEAR(counts[i][j], i == j ? 0 : 2000, i == j ? 0 : 4 * std::sqrt(4000 * .25));
    }
  }
}

TEST(MultiData, SeedDecides) {
  for (const Protocol protocol : {Protocol::kSmall, Protocol::kPublished}) {
    const MultiData first = fixture_pairs(protocol, 5);
    const MultiData same = fixture_pairs(protocol, 5);
    const MultiData other = fixture_pairs(protocol, 6);
    EXPECT_EQ(first.train.top_left, same.train.top_left);
    EXPECT_EQ(first.train.bottom_right, same.train.bottom_right);
    EXPECT_NE(first.train.top_left, other.train.top_left);
    EXPECT_EQ(first.test.top_left, other.test.top_left);
    EXPECT_NE(first.test.bottom_right, other.test.bottom_right);
    // The second partner of an image is another draw.
    const auto half = first.test.bottom_right.begin() + first.test.size() / 2;
    EXPECT_FALSE(std::equal(first.test.bottom_right.begin(), half, half));
  }
}

TEST(MultiData, OrderOfABatch) {
  const MultiData data = fixture_pairs(Protocol::kSmall);
  const CanvasBatch both = draw_batch(data.test, std::vector<int64_t>{3, 1});
  const CanvasBatch one = draw_batch(data.test, std::vector<int64_t>{1});
  EXPECT_TRUE(std::equal(one.pixels.begin(), one.pixels.end(), both.pixels.begin() + 36 * 36));
  EXPECT_EQ(one.classes[1][0], both.classes[1][1]);
  const CanvasBatch none = draw_batch(data.test, {});
  EXPECT_TRUE(none.pixels.empty());
  EXPECT_TRUE(none.classes[0].empty());
}

TEST(MultiData, TooFewImages) {
  const auto text_of = [](int64_t train, int64_t test, Protocol protocol) {
    return error_text<DataError>([&] {
      make_multi(FashionMnist{flat_images(train), flat_images(test)}, protocol, 0);
    });
  };
  for (const std::string& text :
       {text_of(23, 8, Protocol::kSmall), text_of(240, 3, Protocol::kSmall),
        text_of(60, 1, Protocol::kPublished)}) {
    EXPECT_NE(text.find("[make_multi] images=1"), std::string::npos) << text;
  }
  EXPECT_EQ(text_of(24, 4, Protocol::kSmall), "no exception");
}

}  // namespace
}  // namespace perseid::examples
