#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "examples/common/data_folder.h"

namespace perseid::examples {

inline constexpr int64_t kImageSide = 28;
inline constexpr int64_t kImagePixels = kImageSide * kImageSide;
inline constexpr int64_t kNumClasses = 10;

/// Grey images with a class each.
struct LabelledImages {
  std::vector<uint8_t> pixels;  ///< [n, 784], 0 to 255
  std::vector<int64_t> labels;  ///< [n], in [0, 10)

  int64_t size() const { return static_cast<int64_t>(labels.size()); }
};

struct FashionMnist {
  LabelledImages train;  ///< 60,000 in the published set
  LabelledImages test;   ///< 10,000
};

/// Where to look for it: see find_data_folder.
DataSet fashion_mnist_set();

/// Reads the four IDX .gz files of a folder; about half a second. Throws IoError and DataError as
/// read_idx does, and DataError if images and labels do not fit each other.
FashionMnist load_fashion_mnist(const std::string& folder);

}  // namespace perseid::examples
