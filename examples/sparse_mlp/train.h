#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "examples/sparse_mlp/images.h"
#include "examples/sparse_mlp/methods.h"

namespace perseid::examples {

/// What the masks of the layers are behind an update; a value for each layer.
struct MaskPoint {
  int64_t step = 0;
  double before = 0;            ///< accuracy on the test images
  double after = 0;             ///< the same
  std::vector<double> churn;    ///< dropped in this update / active
  std::vector<double> overlap;  ///< active ones that were active at the start / active
  std::vector<double> fired;    ///< positions that were active at any time / all positions
};

/// Accuracies are those before the update of a step, if there is one.
struct MlpResult {
  std::string method;
  uint64_t seed = 0;
  int64_t num_weights = 0;         ///< active ones, without biases
  std::vector<double> density;     ///< of each layer
  std::vector<double> accuracy;    ///< on the test images at the end of each epoch
  std::vector<MaskPoint> updates;  ///< each tenth, and all of the last tenth of the schedule
  double last = 0;                 ///< mean accuracy of the last 5 epochs
  double last_all = 0;             ///< the same on all test images
  double last_validation = 0;
  double itop_rate = 0;  ///< positions that were active at any time / all positions
  double seconds = 0;

  double best() const;
  double last_after() const;  ///< mean accuracy behind the last 5 updates; NaN without updates
};

struct MlpProgress {
  int64_t epoch = 0;
  double accuracy = 0;
  double best = 0;
  double seconds = 0;
};

/// The tutorial's training: batches of 40, SGD with momentum, weight decay that is not times the
/// learning rate, squared error of sigmoids whose slope is taken at the output.
MlpResult train_mlp(const ImageSets& images, const Method& method, int64_t epochs, uint64_t seed,
                    const std::function<void(const MlpProgress&)>& report = {});

}  // namespace perseid::examples
