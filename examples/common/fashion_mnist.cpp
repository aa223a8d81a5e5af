#include "examples/common/fashion_mnist.h"

#include <algorithm>

#include "examples/common/idx.h"
#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

[[noreturn]] void refuse(const std::string& file, const std::string& what) {
  throw DataError(ErrorDetail{"load_fashion_mnist", "file", file, what});
}

LabelledImages load_part(const std::string& folder, const std::string& part) {
  const std::string image_file = folder + "/" + part + "-images-idx3-ubyte.gz";
  const std::string label_file = folder + "/" + part + "-labels-idx1-ubyte.gz";
  IdxBytes images = read_idx(image_file, 3);
  const IdxBytes labels = read_idx(label_file, 1);
  if (images.shape[1] != kImageSide || images.shape[2] != kImageSide) {
    refuse(image_file, format_text("holds images of %lldx%lld pixels, expected 28x28",
                                   static_cast<long long>(images.shape[1]),
                                   static_cast<long long>(images.shape[2])));
  }
  if (images.shape[0] == 0) refuse(image_file, "holds no image");
  if (labels.shape[0] != images.shape[0]) {
    refuse(label_file,
           format_text("holds %lld labels for %lld images", static_cast<long long>(labels.shape[0]),
                       static_cast<long long>(images.shape[0])));
  }
  const auto wrong = std::find_if(labels.values.begin(), labels.values.end(),
                                  [](uint8_t label) { return label >= kNumClasses; });
  if (wrong != labels.values.end()) {
    refuse(label_file, format_text("holds label %d, expected 0 to %lld", int{*wrong},
                                   static_cast<long long>(kNumClasses - 1)));
  }
  LabelledImages result;
  result.pixels = std::move(images.values);
  result.labels.assign(labels.values.begin(), labels.values.end());
  return result;
}

}  // namespace

DataSet fashion_mnist_set() {
  return DataSet{"fashion-mnist", "fashion", "train-images-idx3-ubyte.gz"};
}

FashionMnist load_fashion_mnist(const std::string& folder) {
  return FashionMnist{load_part(folder, "train"), load_part(folder, "t10k")};
}

}  // namespace perseid::examples
