#include "examples/sparse_mlp/images.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "comm/launcher.h"
#include "examples/common/data_folder.h"
#include "examples/common/fashion_mnist.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

constexpr int64_t kMaxValidation = 1000;

Images images_of(const LabelledImages& source, const std::vector<int64_t>& chosen) {
  Images images{at::empty({static_cast<int64_t>(chosen.size()), kImagePixels}),
                at::empty({static_cast<int64_t>(chosen.size())}, at::kLong)};
  float* const pixels = images.pixels.mutable_data_ptr<float>();
  for (size_t i = 0; i < chosen.size(); ++i) {
    const auto image = static_cast<size_t>(chosen[i]);
    images.labels.mutable_data_ptr<int64_t>()[i] = source.labels[image];
    for (size_t p = 0; p < kImagePixels; ++p) {
      pixels[i * kImagePixels + p] =
          static_cast<float>(source.pixels[image * kImagePixels + p]) / 255.0f;
    }
  }
  return images;
}

}  // namespace

kernels::RandomKey key_of(uint64_t seed, Stream stream) {
  return kernels::random_key(0x5E7).with(seed).with(static_cast<uint64_t>(stream));
}

std::vector<int64_t> random_order(int64_t size, int64_t count, kernels::RandomKey key) {
  std::vector<int64_t> order(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) order[static_cast<size_t>(i)] = i;
  for (int64_t i = 0; i < count; ++i) {
    const auto step = static_cast<uint64_t>(i);
    const uint64_t other = step + kernels::random_below(key, step, static_cast<uint64_t>(size - i));
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(other)]);
  }
  order.resize(static_cast<size_t>(count));
  return order;
}

Images Images::head(int64_t count) const {
  return {pixels.slice(0, 0, count), labels.slice(0, 0, count)};
}

ImageSets load_images(const std::string& folder, int64_t train_images, int64_t test_images) {
  const DataSet set = fashion_mnist_set();
  const FashionMnist data = load_fashion_mnist(
      find_data_folder(set, data_places(set, folder, comm::process_environment())));
  const int64_t num_validation = std::min(train_images, kMaxValidation);
  const int64_t num_drawn = train_images + num_validation;
  require(data.train.size() >= num_drawn, "sparse_mlp", "train_images", train_images,
          "and " + to_text(num_validation) + " for validation are more than the " +
              to_text(data.train.size()) +
              " there are; get the whole set with examples/get_data.sh fashion");
  require(data.test.size() >= test_images, "sparse_mlp", "test_images", test_images,
          "is more than the " + to_text(data.test.size()) +
              " there are; get the whole set with examples/get_data.sh fashion");
  const Images drawn = images_of(
      data.train, random_order(data.train.size(), num_drawn, key_of(0, Stream::kTrainSet)));
  ImageSets sets;
  sets.train = drawn.head(train_images);
  sets.validation = {drawn.pixels.slice(0, train_images), drawn.labels.slice(0, train_images)};
  sets.all_tests = images_of(
      data.test, random_order(data.test.size(), data.test.size(), key_of(0, Stream::kTestSet)));
  sets.test = sets.all_tests.head(test_images);
  return sets;
}

}  // namespace perseid::examples
