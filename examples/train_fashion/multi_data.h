#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "examples/common/fashion_mnist.h"

// Multi-Fashion-MNIST: two images on one canvas, and two tasks, the class of each. The construction
// is that of the DSelect-k and COMET papers (arXiv 2106.03760, 2306.02824): the images are added,
// so they are not to be compared with sets that take the larger pixel or clip. Canvases are drawn
// when they are needed.

namespace perseid::examples {

inline constexpr int64_t kCanvasSide = 36;
inline constexpr int64_t kCanvasPixels = kCanvasSide * kCanvasSide;
inline constexpr int64_t kCanvasShift = kCanvasSide - kImageSide;  ///< of the bottom-right image
inline constexpr size_t kNumTasks = 2;  ///< 0: the top-left image, 1: the bottom-right one

/// Which images are used, and how often each of them is the top-left one.
enum class Protocol : uint8_t {
  kSmall,      ///< random: 1/4 of the training images twice, 1/12 once for validation, the first
               ///< half of the test images twice: 30,000 / 5,000 / 10,000 samples
  kPublished,  ///< by class: 5/6 of the training images for training, 1/6 for validation, and all
               ///< test images, each twice: 100,000 / 20,000 / 20,000 samples
};

/// Samples of one split as numbers of their images.
struct ImagePairs {
  std::shared_ptr<const LabelledImages> images;
  std::vector<int64_t> top_left;      ///< [n]
  std::vector<int64_t> bottom_right;  ///< [n] another image of the same split

  int64_t size() const { return static_cast<int64_t>(top_left.size()); }
};

struct MultiData {
  ImagePairs train;
  ImagePairs validation;
  ImagePairs test;
};

/// Draws splits and pairs from data_seed alone: equal on every rank and platform. Each top-left
/// image gets a bottom-right one uniformly from the other images of its split.
/// Throws DataError if a split would have less than 2 images.
MultiData make_multi(FashionMnist images, Protocol protocol, uint64_t data_seed);

/// canvas = zeros; the one image is added at rows and columns 0..27, the other at 8..35.
/// @param top_left, bottom_right  784 pixels
/// @param canvas                  1296 pixels, 0 to 510
void draw_canvas(std::span<const uint8_t> top_left, std::span<const uint8_t> bottom_right,
                 std::span<int16_t> canvas);

struct CanvasBatch {
  std::vector<int16_t> pixels;                          ///< [n, 1296], 0 to 510
  std::array<std::vector<int64_t>, kNumTasks> classes;  ///< [2] of [n]
};

/// Canvases and classes of some samples, in the order given; about a microsecond each.
/// @param samples  numbers in [0, pairs.size())
CanvasBatch draw_batch(const ImagePairs& pairs, std::span<const int64_t> samples);

}  // namespace perseid::examples
