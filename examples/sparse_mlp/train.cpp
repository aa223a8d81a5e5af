#include "examples/sparse_mlp/train.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>

#include "examples/common/fashion_mnist.h"
#include "examples/sparse_mlp/network.h"
#include "kernels/error.h"
#include "moe/sparse_optimizer.h"

namespace perseid::examples {
namespace {

constexpr int64_t kBatch = 40;
constexpr double kLearningRate = 0.05, kMomentum = 0.9, kWeightDecay = 2e-4;
constexpr size_t kLast = 5;  ///< epochs, or updates, of the final means

double mean_of_last(const std::vector<double>& values) {
  const size_t count = std::min(kLast, values.size());
  if (count == 0) return NAN;
  return std::accumulate(values.end() - static_cast<int64_t>(count), values.end(), 0.0) /
         static_cast<double>(count);
}

/// States of active weights only where masks are hard: soft methods train all weights.
std::unique_ptr<torch::optim::Optimizer> make_optimizer(const Network& network, bool is_hard) {
  const torch::optim::SGDOptions options =
      torch::optim::SGDOptions(kLearningRate).momentum(kMomentum);
  if (is_hard) return std::make_unique<SparseSGD>(network.parameters(), options);
  return std::make_unique<torch::optim::SGD>(network.parameters(), options);
}

/// Watches the masks.
class MaskHistory {
 public:
  explicit MaskHistory(const Sparsifier& sparsifier) : sparsifier_(sparsifier) {
    for (const SparseUnit& unit : sparsifier.units()) first_.push_back(sparsifier.mask(unit.key));
  }

  /// Whether the accuracy around this update is measured.
  bool takes(int64_t step) {
    const int64_t end = sparsifier_.config().schedule.end_step();
    return count_++ % 10 == 0 || 10 * step >= 9 * end;
  }

  MaskPoint point(const UpdateReport& report) const {
    MaskPoint point;
    point.step = report.step;
    for (size_t u = 0; u < first_.size(); ++u) {
      const SparseUnit& unit = sparsifier_.units()[u];
      const PackedMask& mask = sparsifier_.mask(unit.key);
      const auto active = static_cast<double>(mask.count());
      double dropped = 0;
      for (const UnitUpdate& update : report.units) {
        if (update.key == unit.key) dropped = static_cast<double>(update.num_dropped);
      }
      point.churn.push_back(dropped / active);
      point.overlap.push_back(static_cast<double>((mask & first_[u]).count()) / active);
      point.fired.push_back(sparsifier_.stats(unit.key).ever_active);
    }
    return point;
  }

 private:
  const Sparsifier& sparsifier_;
  std::vector<PackedMask> first_;
  int64_t count_ = 0;
};

}  // namespace

double MlpResult::best() const {
  return accuracy.empty() ? NAN : *std::max_element(accuracy.begin(), accuracy.end());
}

double MlpResult::last_after() const {
  std::vector<double> values;
  for (const MaskPoint& point : updates) values.push_back(point.after);
  return mean_of_last(values);
}

MlpResult train_mlp(const ImageSets& images, const Method& method, int64_t epochs, uint64_t seed,
                    const std::function<void(const MlpProgress&)>& report) {
  const int64_t num_images = images.train.labels.size(0);
  const int64_t steps_per_epoch = num_images / kBatch;
  require(steps_per_epoch >= 1, "sparse_mlp", "train_images", num_images,
          "is less than a batch of " + to_text(kBatch));
  Network network(method.hidden, seed);
  std::unique_ptr<Sparsifier> sparsifier;
  if (method.is_sparse) {
    sparsifier = std::make_unique<Sparsifier>(network.units(),
                                              method_config(method, epochs, steps_per_epoch, seed));
  }
  const bool is_hard = sparsifier != nullptr && !sparsifier->config().forward.is_soft();
  const std::unique_ptr<torch::optim::Optimizer> optimizer = make_optimizer(network, is_hard);
  std::unique_ptr<MaskHistory> history;
  if (sparsifier != nullptr) {
    sparsifier->attach(*optimizer);
    history = std::make_unique<MaskHistory>(*sparsifier);
  }
  const bool is_after =
      sparsifier != nullptr && sparsifier->config().order == UpdateOrder::kAfterStep;

  MlpResult result;
  result.method = method.name;
  result.seed = seed;
  std::vector<double> all_tests, validation;
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [start] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (int64_t epoch = 0; epoch < epochs; ++epoch) {
    const at::Tensor order =
        at::tensor(random_order(num_images, num_images,
                                key_of(seed, Stream::kShuffle).with(static_cast<uint64_t>(epoch))),
                   at::kLong);
    for (int64_t batch = 0; batch < steps_per_epoch; ++batch) {
      const int64_t step = epoch * steps_per_epoch + batch;
      const bool has_update = sparsifier != nullptr && sparsifier->begin_step(step).has_update();
      const bool is_measured = has_update && history->takes(step);
      double before = is_measured && !is_after ? network.accuracy(images.test) : NAN;

      const at::Tensor chosen = order.slice(0, batch * kBatch, (batch + 1) * kBatch);
      const at::Tensor labels = images.train.labels.index_select(0, chosen);
      const at::Tensor target = at::one_hot(labels, kNumClasses).to(at::kFloat);
      optimizer->zero_grad();
      const at::Tensor logits = network.forward(images.train.pixels.index_select(0, chosen), step);
      const at::Tensor output = logits.detach().sigmoid();
      const at::Tensor slope = output.sigmoid() * (1 - output.sigmoid());
      logits.backward((output - target) * slope / kBatch);
      UpdateReport updates;
      if (sparsifier != nullptr) updates = sparsifier->end_backward(step);
      {
        // In a step that only changes masks nothing decays.
        const c10::NoGradGuard no_grad;
        for (const at::Tensor& parameter : network.parameters()) {
          if (parameter.grad().defined()) parameter.mul_(1 - kWeightDecay);
        }
      }
      optimizer->step();

      if (batch + 1 == steps_per_epoch) {
        result.accuracy.push_back(network.accuracy(images.test));
        if (epoch + static_cast<int64_t>(kLast) >= epochs) {
          all_tests.push_back(network.accuracy(images.all_tests));
          validation.push_back(network.accuracy(images.validation));
        }
      }
      if (is_measured && is_after) before = network.accuracy(images.test);
      if (sparsifier != nullptr) {
        const UpdateReport late = sparsifier->end_step(step);
        if (is_after) updates = late;
      }
      if (is_measured) {
        MaskPoint point = history->point(updates);
        point.before = before;
        point.after = network.accuracy(images.test);
        result.updates.push_back(std::move(point));
      }
    }
    if (report) report({epoch, result.accuracy.back(), result.best(), seconds()});
  }

  result.last = mean_of_last(result.accuracy);
  result.last_all = mean_of_last(all_tests);
  result.last_validation = mean_of_last(validation);
  result.seconds = seconds();
  for (const at::Tensor& parameter : network.parameters()) {
    if (parameter.dim() == 2) result.num_weights += parameter.numel();
  }
  result.itop_rate = 1;
  if (sparsifier != nullptr) {
    result.num_weights = sparsifier->nnz();
    result.itop_rate = sparsifier->totals().itop_rate();
    for (const SparseUnit& unit : sparsifier->units()) {
      result.density.push_back(sparsifier->stats(unit.key).density);
    }
  }
  return result;
}

}  // namespace perseid::examples
