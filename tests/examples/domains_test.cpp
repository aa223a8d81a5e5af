// The four domains.
//   Transforms     each pixel of each transform in closed form, on an image without equal pixels
//   Permutation    a permutation, fixed by the seed, not the identity
//   Counts         domains about equally frequent; another seed draws others
//   ValidationSplit  the last training images are tested on, in their order, and not trained on
//   Keys           floor(1000 * sum of pixels) of the transformed image
//   MutualInformation, DeadExperts, MeanAndError   hand-made tables
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <numeric>
#include <set>

#include "examples/train_fashion/domains.h"
#include "examples/train_fashion/metrics.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

constexpr size_t kPixels = size_t{kImagePixels};

TEST(Domains, Transforms) {
  // 784 pixels do not fit a byte: column numbers and row numbers tell them apart together.
  std::array<uint8_t, kPixels> rows{};
  std::array<uint8_t, kPixels> columns{};
  for (size_t p = 0; p < kPixels; ++p) {
    rows[p] = static_cast<uint8_t>(p / 28);
    columns[p] = static_cast<uint8_t>(p % 28);
  }
  const std::vector<int32_t> permutation = pixel_permutation(3);
  const auto moved = [&](const std::array<uint8_t, kPixels>& image, int64_t domain) {
    std::array<uint8_t, kPixels> out;
    out.fill(77);
    transform_image(image, domain, permutation, out);
    return out;
  };
  EXPECT_EQ(moved(rows, 0), rows);
  for (size_t i = 0; i < 28; ++i) {
    for (size_t j = 0; j < 28; ++j) {
      const size_t p = i * 28 + j;
      EXPECT_EQ(moved(rows, 1)[p], 255 - i);
      // out[i][j] = in[j][27-i]
      EXPECT_EQ(moved(rows, 2)[p], j);
      EXPECT_EQ(moved(columns, 2)[p], 27 - i);
      const auto source = static_cast<size_t>(permutation[p]);
      EXPECT_EQ(moved(rows, 3)[p], source / 28);
      EXPECT_EQ(moved(columns, 3)[p], source % 28);
    }
  }
}

TEST(Domains, Permutation) {
  const std::vector<int32_t> permutation = pixel_permutation(0);
  EXPECT_EQ(std::set<int32_t>(permutation.begin(), permutation.end()).size(), kPixels);
  EXPECT_EQ(*std::min_element(permutation.begin(), permutation.end()), 0);
  EXPECT_EQ(*std::max_element(permutation.begin(), permutation.end()), 783);
  EXPECT_EQ(permutation, pixel_permutation(0));
  EXPECT_NE(permutation, pixel_permutation(1));
  int fixed = 0;
  for (size_t p = 0; p < kPixels; ++p) fixed += permutation[p] == static_cast<int32_t>(p);
  EXPECT_LE(fixed, 6);  // one is expected
}

TEST(Domains, OrderOfAnEpoch) {
  const std::vector<int64_t> order = random_order(1000, 5, 1000);
  EXPECT_EQ(std::set<int64_t>(order.begin(), order.end()).size(), size_t{1000});
  EXPECT_NE(order, random_order(1000, 5, 1001));
  EXPECT_NE(order, random_order(1000, 6, 1000));
  EXPECT_TRUE(random_order(0, 5, 1000).empty());
}

TEST(Domains, Counts) {
  LabelledImages many;
  many.labels.assign(8000, 0);
  many.pixels.assign(8000 * kPixels, 0);
  LabelledImages one;
  one.labels.assign(1, 0);
  one.pixels.assign(kPixels, 0);
  const DomainData data = make_domains(FashionMnist{many, one}, 0);
  std::array<int, kNumDomains> counts{};
  for (const int64_t domain : data.train.domains) ++counts.at(static_cast<size_t>(domain));
  for (const int count : counts) EXPECT_NEAR(count, 2000, 4 * std::sqrt(8000 * .25 * .75));
  EXPECT_NE(data.train.domains, make_domains(FashionMnist{many, one}, 1).train.domains);
}

TEST(Domains, ValidationSplit) {
  const DomainData& all = fixture_data();
  const DomainData split = validation_split(all, 56);
  EXPECT_EQ(split.train.size(), 200);
  EXPECT_EQ(split.test.size(), 56);
  const auto joined = [&](auto member) {
    auto values = split.train.*member;
    values.insert(values.end(), (split.test.*member).begin(), (split.test.*member).end());
    return values;
  };
  EXPECT_EQ(joined(&DomainImages::pixels), all.train.pixels);
  EXPECT_EQ(joined(&DomainImages::labels), all.train.labels);
  EXPECT_EQ(joined(&DomainImages::domains), all.train.domains);
  EXPECT_EQ(joined(&DomainImages::keys), all.train.keys);
  for (const int64_t count : {0, 256}) {
    const std::string text = error_text<ConfigError>([&] { validation_split(all, count); });
    EXPECT_NE(text.find("validation_images=" + std::to_string(count)), std::string::npos) << text;
    EXPECT_NE(text.find("1 to 255"), std::string::npos) << text;
  }
}

TEST(Domains, Keys) {
  const FashionMnist images = load_fashion_mnist(fixture_folder());
  const DomainData& data = fixture_data();
  for (size_t i = 0; i < 256; ++i) {
    const auto first = images.train.pixels.begin() + static_cast<std::ptrdiff_t>(i * kPixels);
    int64_t sum = std::accumulate(first, first + kImagePixels, int64_t{0});
    if (data.train.domains[i] == 1) sum = 255 * kImagePixels - sum;
    EXPECT_EQ(data.train.keys[i], 1000 * sum / 255);
  }
}

TEST(Metrics, MutualInformation) {
  EXPECT_NEAR(mutual_information({1, 0, 0, 1}, 2), std::log(2), 1e-15);
  EXPECT_NEAR(mutual_information({3, 3, 1, 1}, 2), 0, 1e-15);
  // p = .3 .2 / .1 .4, marginals .5 .5 and .4 .6
  const double expected = .3 * std::log(.3 / .2) + .2 * std::log(.2 / .3) + .1 * std::log(.1 / .2) +
                          .4 * std::log(.4 / .3);
  EXPECT_NEAR(mutual_information({6, 4, 2, 8}, 2), expected, 1e-15);
  EXPECT_EQ(mutual_information({0, 0, 0, 0}, 2), 0);
}

TEST(Metrics, DeadExperts) {
  EXPECT_EQ(num_dead_experts({0, 100, 100, 100}), 1);
  EXPECT_EQ(num_dead_experts({1, 100, 299, 0}),
            1);  // the fair share is 100, a hundredth of it is 1
  EXPECT_EQ(num_dead_experts({0, 0}), 0);
}

TEST(Metrics, MeanAndError) {
  EXPECT_EQ(mean_and_error({3}).mean, 3);
  EXPECT_EQ(mean_and_error({3}).standard_error, 0);
  EXPECT_NEAR(mean_and_error({1, 2, 3}).standard_error, 1 / std::sqrt(3.0), 1e-15);
}

}  // namespace
}  // namespace perseid::examples
