// The network of the tutorial on sparse evolutionary training (Mocanu et al., IJCAI 2019):
// 784-1000-1000-1000-10 on 2000 images of Fashion-MNIST with 3 % of its weights, or with one of
// each 8, chosen in one of several ways; or dense.
//   sparse_mlp --dst set
//   sparse_mlp --dst all
#include <CLI/CLI.hpp>
#include <iostream>
#include <string>
#include <vector>

#include "examples/common/console.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "examples/common/validators.h"
#include "examples/sparse_mlp/report.h"
#include "examples/sparse_mlp/train.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

struct Options {
  std::string dst = "set";
  std::string data;
  std::string json;
  int64_t epochs = 400;
  uint64_t seed = 0;
  int64_t num_masks = 1;
  int64_t train_images = 2000;
  int64_t test_images = 1000;
};

std::string list_text(const std::vector<double>& values) {
  std::string text;
  for (const double value : values) text += format_text("%s%.4f", text.empty() ? "" : " ", value);
  return text;
}

void run(const Options& options) {
  const ImageSets images = load_images(options.data, options.train_images, options.test_images);
  std::vector<Method> methods = all_methods();
  if (options.dst != "all") methods = {method_of(options.dst)};
  require(options.num_masks == 1 || options.dst == "static", "sparse_mlp", "random_masks",
          options.num_masks, "needs --dst static");

  Progress progress(std::cout, progress_columns());
  JsonLines json(options.json);
  std::vector<MlpResult> results;
  for (const Method& method : methods) {
    for (int64_t mask = 0; mask < options.num_masks; ++mask) {
      const uint64_t seed = options.seed + static_cast<uint64_t>(mask);
      const auto show = [&](const MlpProgress& now) {
        progress.update(format_text(
            "%s seed %llu, epoch %lld of %lld: accuracy %.4f, best %.4f, %.0f s",
            method.name.c_str(), static_cast<unsigned long long>(seed),
            static_cast<long long>(now.epoch + 1), static_cast<long long>(options.epochs),
            now.accuracy, now.best, now.seconds));
      };
      results.push_back(train_mlp(images, method, options.epochs, seed, show));
      const MlpResult& result = results.back();
      json.write(mlp_json(result, options.epochs, options.train_images));
      progress.print(format_text("%s seed %llu: accuracy %.4f in the last epochs%s%s",
                                 method.name.c_str(), static_cast<unsigned long long>(seed),
                                 result.last,
                                 result.density.empty() ? "" : ", densities of the layers ",
                                 list_text(result.density).c_str()));
    }
  }
  std::cout << "\n" << mlp_table(results);
  if (options.num_masks > 1) std::cout << "\n" << random_search_text(results) << "\n";
}

}  // namespace
}  // namespace perseid::examples

int main(int argc, char** argv) {
  using namespace perseid::examples;
  Options options;
  std::vector<std::string> names;
  for (const Method& method : all_methods()) names.push_back(method.name);
  names.emplace_back("all");
  CLI::App app("Sparse training of a small network on Fashion-MNIST");
  app.add_option("--dst", options.dst, "how the active weights are chosen")
      ->check(one_of(names))
      ->capture_default_str();
  app.add_option("--epochs", options.epochs, "passes over the training images")
      ->check(in_range<int64_t>(1, 100000))
      ->capture_default_str();
  app.add_option("--seed", options.seed, "of weights, masks, dropout and order")
      ->capture_default_str();
  app.add_option("--random-masks", options.num_masks,
                 "static masks, seeds from --seed on, of which the best is chosen")
      ->check(in_range<int64_t>(1, 1000))
      ->capture_default_str();
  app.add_option("--train-images", options.train_images, "of the training set")
      ->check(in_range<int64_t>(1, 60000))
      ->capture_default_str();
  app.add_option("--test-images", options.test_images, "for the accuracy of each epoch")
      ->check(in_range<int64_t>(1, 10000))
      ->capture_default_str();
  app.add_option("--json", options.json, "file for a line of JSON per run");
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
