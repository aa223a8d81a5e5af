// The network of the tutorial on sparse evolutionary training (Mocanu et al., IJCAI 2019):
// 784-1000-1000-1000-10 on 2000 images of Fashion-MNIST with 3 % of its weights, chosen by static
// masks, SET, RigL, SRigL, whole hidden units or Top-KAST; with one of each 8, by RigL or the soft
// methods; or dense.
//   sparse_mlp --dst set --epochs 400
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/optim/sgd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "comm/launcher.h"
#include "examples/common/data_folder.h"
#include "examples/common/fashion_mnist.h"
#include "examples/common/validators.h"
#include "kernels/error.h"
#include "kernels/random.h"
#include "moe/sparse_linear.h"
#include "moe/sparse_presets.h"

namespace perseid::examples {
namespace {

// The tutorial's numbers.
constexpr int64_t kTrainImages = 2000, kTestImages = 1000, kHidden = 1000, kBatch = 40;
constexpr double kEpsilon = 13, kZeta = 0.3, kWeightStd = 0.1;
constexpr double kLearningRate = 0.05, kMomentum = 0.9, kWeightDecay = 2e-4, kDropRate = 0.2;
constexpr int64_t kStepsPerEpoch = kTrainImages / kBatch;

struct Options {
  std::string dst = "set";
  std::string data;
  int64_t epochs = 400;
  uint64_t seed = 0;
};

enum class Stream : uint64_t { kTrainSet = 1, kTestSet, kWeights, kShuffle, kDropout };
kernels::RandomKey key_of(uint64_t seed, Stream stream) {
  return kernels::random_key(0x5E7).with(seed).with(static_cast<uint64_t>(stream));
}

/// The first `count` of a random order of 0 .. size-1.
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

struct Images {
  at::Tensor pixels;  ///< [n, 784] in [0, 1]
  at::Tensor labels;  ///< [n]
};
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

class Network {
 public:
  explicit Network(uint64_t seed) : seed_(seed) {
    const std::vector<int64_t> widths = {kImagePixels, kHidden, kHidden, kHidden, kNumClasses};
    const c10::NoGradGuard no_grad;
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
      const auto layer = static_cast<int64_t>(i);
      layers_.emplace_back(
          SparseLinearOptions(widths[i], widths[i + 1]).key(UnitKey{layer, 0, Matrix::kWeight}));
      at::Tensor& weight = layers_.back()->weight;
      kernels::fill_normal(weight.mutable_data_ptr(), weight.numel(), kernels::DType::kFloat32,
                           key_of(seed, Stream::kWeights).with(i));
      weight.mul_(kWeightStd);
      layers_.back()->bias.zero_();
    }
  }

  /// Logits in training. Dropped activations pass their gradient on, as in the tutorial.
  at::Tensor forward(const at::Tensor& x, int64_t step) {
    at::Tensor a = x;
    for (size_t i = 0; i < layers_.size(); ++i) {
      a = layers_[i]->forward(a);
      if (i + 1 == layers_.size()) break;
      a = a.relu();
      at::Tensor uniform = at::empty(a.sizes());
      kernels::fill_uniform(
          uniform.mutable_data_ptr(), uniform.numel(), kernels::DType::kFloat32, 0, 1,
          key_of(seed_, Stream::kDropout).with(static_cast<uint64_t>(step)).with(i));
      a = a - (a * uniform.lt(kDropRate)).detach();
    }
    return a;
  }

  /// Of the images, those whose largest logit is their class.
  double accuracy(const Images& images) {
    const c10::NoGradGuard no_grad;
    at::Tensor a = images.pixels;
    for (size_t i = 0; i < layers_.size(); ++i) {
      a = layers_[i]->forward(a);
      if (i > 0) a = a * (1 - kDropRate);
      if (i + 1 < layers_.size()) a = a.relu();
    }
    return a.argmax(1).eq(images.labels).to(at::kDouble).mean().item<double>();
  }

  std::vector<at::Tensor> parameters() const {
    std::vector<at::Tensor> all;
    for (const SparseLinear& layer : layers_) {
      all.push_back(layer->weight);
      all.push_back(layer->bias);
    }
    return all;
  }
  std::vector<SparseUnit> units() const {
    std::vector<SparseUnit> all;
    for (const SparseLinear& layer : layers_) all.push_back(layer->unit());
    return all;
  }

 private:
  uint64_t seed_;
  std::vector<SparseLinear> layers_;
};

SparsifierConfig config_of(const Options& options) {
  const int64_t total_steps = options.epochs * kStepsPerEpoch;
  SparsifierConfig config = presets::set(kEpsilon, kStepsPerEpoch, options.epochs, kZeta);
  const Budget budget = config.budget;
  const double total = static_cast<double>(total_steps);
  // Groups of 8 weights, the longest that fit all layers, keep one.
  if (options.dst == "nm_dst") config = presets::nm_dst(1, 8, total_steps, 200);
  if (options.dst == "srste") config = presets::srste(1, 8);
  if (options.dst == "mdgf_lin") config = presets::mdgf_lin(1, 8, 2 / total);  // 0 at the half
  if (options.dst == "mdgf_exp") config = presets::mdgf_exp(1, 8, 5 / total);
  if (options.dst == "sdgf_step") config = presets::sdgf_step(1, 8, total_steps);
  if (config.forward.method == ForwardMethod::kMaskDecay) {
    config.forward.total_steps = total_steps;
    config.forward.fine_tune = 0.1;  // so that it ends with 1:8
  }
  if (options.dst == "topkast") {
    config = presets::topkast(Density::ratio(81492, 2794000), 0.1, kStepsPerEpoch);
  }
  if (options.dst == "neuron") {
    // Of each hidden layer; its square between two of them: 85 of 1000 make 81 940 weights.
    config = presets::neuron(0.085, total_steps, 200);
    for (int64_t layer = 0; layer < 3; ++layer) {
      config.neurons.links.push_back({UnitKey{layer}, UnitKey{layer + 1}});
    }
  }
  const bool has_own_budget = config.structure.cell == Cell::kGroup ||
                              config.structure.cell == Cell::kNeuron || config.forward.is_soft();
  if (options.dst == "static") config = presets::static_mask(0.1);
  if (options.dst == "rigl") config = presets::rigl(0.1, total_steps, 200);
  if (options.dst == "srigl") {
    config = presets::srigl(0.1, total_steps, 0.3, 200);
    config.ablation.kept = {"layer 3,*"};
  }
  if (config.rule.grow == GrowCriterion::kGrad) {
    config.schedule.begin = 200;  // the first steps have no 10 gradients yet
    config.grad_accum = 10;       // of 40 images each: a smaller sum chooses badly
  }
  if (!has_own_budget) config.budget = budget;  // equal for all others
  config.seed = options.seed;
  return config;
}

void run(const Options& options) {
  const DataSet set = fashion_mnist_set();
  const FashionMnist data = load_fashion_mnist(
      find_data_folder(set, data_places(set, options.data, comm::process_environment())));
  require(data.train.size() >= kTrainImages && data.test.size() >= kTestImages, "sparse_mlp",
          "images", to_text(data.train.size()) + " and " + to_text(data.test.size()),
          "are fewer than the 2000 for training and 1000 for tests of the protocol; get the whole "
          "set with examples/get_data.sh fashion");
  // The same images for all seeds, as in the tutorial.
  const Images train = images_of(
      data.train, random_order(data.train.size(), kTrainImages, key_of(0, Stream::kTrainSet)));
  const std::vector<int64_t> test_order =
      random_order(data.test.size(), data.test.size(), key_of(0, Stream::kTestSet));
  const Images all_tests = images_of(data.test, test_order);
  const Images test{all_tests.pixels.slice(0, 0, kTestImages),
                    all_tests.labels.slice(0, 0, kTestImages)};

  Network network(options.seed);
  torch::optim::SGD optimizer(network.parameters(),
                              torch::optim::SGDOptions(kLearningRate).momentum(kMomentum));
  std::unique_ptr<Sparsifier> sparsifier;
  if (options.dst != "dense") {
    sparsifier = std::make_unique<Sparsifier>(network.units(), config_of(options));
    sparsifier->attach(optimizer);
    std::cout << sparsifier->config() << "\n";
    for (const SparseUnit& unit : sparsifier->units()) {
      const UnitStats stats = sparsifier->stats(unit.key);
      std::printf("%s: %lld weights, density %.4f\n", unit.name.c_str(),
                  static_cast<long long>(stats.nnz), stats.density);
    }
  }
  const bool is_after =
      sparsifier != nullptr && sparsifier->config().order == UpdateOrder::kAfterStep;

  std::vector<double> history;  // at the end of each epoch, before the update if one comes there
  const auto start = std::chrono::steady_clock::now();
  for (int64_t epoch = 0; epoch < options.epochs; ++epoch) {
    const at::Tensor order = at::tensor(
        random_order(kTrainImages, kTrainImages,
                     key_of(options.seed, Stream::kShuffle).with(static_cast<uint64_t>(epoch))),
        at::kLong);
    double before = -1;
    for (int64_t batch = 0; batch < kStepsPerEpoch; ++batch) {
      const int64_t step = epoch * kStepsPerEpoch + batch;
      const bool has_update = sparsifier != nullptr && sparsifier->begin_step(step).has_update();
      if (has_update && !is_after) before = network.accuracy(test);

      const at::Tensor chosen = order.slice(0, batch * kBatch, (batch + 1) * kBatch);
      const at::Tensor labels = train.labels.index_select(0, chosen);
      const at::Tensor target = at::one_hot(labels, kNumClasses).to(at::kFloat);
      optimizer.zero_grad();
      const at::Tensor logits = network.forward(train.pixels.index_select(0, chosen), step);
      // Squared error of sigmoids, whose slope the tutorial takes at the output instead of the
      // logit.
      const at::Tensor output = logits.detach().sigmoid();
      const at::Tensor slope = output.sigmoid() * (1 - output.sigmoid());
      logits.backward((output - target) * slope / kBatch);
      UpdateReport report;
      if (sparsifier != nullptr) report = sparsifier->end_backward(step);
      {
        // Not times the learning rate. In a step that only changes masks nothing decays.
        const c10::NoGradGuard no_grad;
        for (const at::Tensor& parameter : network.parameters()) {
          if (parameter.grad().defined()) parameter.mul_(1 - kWeightDecay);
        }
      }
      optimizer.step();

      if (batch + 1 == kStepsPerEpoch) history.push_back(network.accuracy(test));
      if (has_update && is_after) before = history.back();
      if (sparsifier != nullptr) {
        const UpdateReport late = sparsifier->end_step(step);
        if (is_after) report = late;
      }
      if (has_update) {
        int64_t num_grown = 0;
        for (const UnitUpdate& unit : report.units) num_grown += unit.num_grown;
        std::printf(
            "epoch %3lld step %5lld: %lld weights moved, accuracy %.4f before, %.4f after\n",
            static_cast<long long>(epoch), static_cast<long long>(step),
            static_cast<long long>(num_grown), before, network.accuracy(test));
      }
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("epoch %3lld: accuracy %.4f, best %.4f, %.0f s\n", static_cast<long long>(epoch),
                history.back(), *std::max_element(history.begin(), history.end()), seconds.count());
    std::fflush(stdout);
  }

  double last = 0;
  const size_t count = std::min<size_t>(5, history.size());
  for (size_t i = history.size() - count; i < history.size(); ++i) last += history[i];
  std::printf("%s seed %llu: last epochs %.4f, best %.4f, all 10000 test images %.4f",
              options.dst.c_str(), static_cast<unsigned long long>(options.seed),
              last / static_cast<double>(count), *std::max_element(history.begin(), history.end()),
              network.accuracy(all_tests));
  if (sparsifier != nullptr) {
    std::printf(", %lld weights, ever active %.3f of layer 1",
                static_cast<long long>(sparsifier->nnz()), sparsifier->stats({1}).ever_active);
  }
  std::printf("\n");
}

}  // namespace
}  // namespace perseid::examples

int main(int argc, char** argv) {
  using namespace perseid::examples;
  Options options;
  CLI::App app("Sparse training of a small network on Fashion-MNIST");
  app.add_option("--dst", options.dst, "how the active weights are chosen")
      ->check(one_of({"static", "set", "rigl", "srigl", "neuron", "nm_dst", "srste", "mdgf_lin",
                      "mdgf_exp", "sdgf_step", "topkast", "dense"}))
      ->capture_default_str();
  app.add_option("--epochs", options.epochs, "of 50 steps")
      ->check(in_range<int64_t>(1, 100000))
      ->capture_default_str();
  app.add_option("--seed", options.seed, "of weights, masks, dropout and order")
      ->capture_default_str();
  app.add_option("--data", options.data, "folder with the four files of Fashion-MNIST");
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
  } catch (const perseid::Error& error) {
    std::cerr << "sparse_mlp: " << error.what() << "\n";
    return error.exit_code();
  }
  return 0;
}
