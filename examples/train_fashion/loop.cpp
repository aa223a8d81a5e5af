#include "examples/train_fashion/loop.h"

#include <cmath>
#include <string>

#include "kernels/error.h"

namespace perseid::examples {
namespace {

constexpr const char* kOperation = "train_fashion";

void check_search(const TrainOptions& options, int64_t num_images) {
  const SearchOptions& search = options.search;
  const gates::PermSearch kind = search.permutation.search();
  require(search.interval >= 0, kOperation, "search.interval", search.interval,
          "is below 0; choose steps, or 0 for an epoch");
  require(search.scramble >= 0, kOperation, "search.scramble", search.scramble, "is below 0");
  require(search.scramble == 0 || kind != gates::PermSearch::kNone, kOperation, "search.scramble",
          search.scramble, "needs a search over orders, sinkhorn or swap");
  if (kind != gates::PermSearch::kSwap && search.scramble == 0) return;
  const int64_t most = num_images / options.global_batch_size;
  require(search.held_batches >= 1 && search.held_batches <= most, kOperation,
          "search.held_batches", search.held_batches,
          "is out of range; choose 1 to " + std::to_string(most) + ", the batches of an epoch");
  require(search.max_evaluations >= 1, kOperation, "search.max_evaluations", search.max_evaluations,
          "is below 1; 64 is usual");
}

}  // namespace

void check_options(const TrainOptions& options, const comm::Group& world, int64_t num_images) {
  require(options.global_batch_size >= 1 && options.global_batch_size <= num_images, kOperation,
          "global_batch_size", options.global_batch_size,
          "is out of range; choose 1 to " + std::to_string(num_images) + ", the training images");
  require(options.idle_ranks >= 0 && options.idle_ranks < world.size(), kOperation, "idle_ranks",
          options.idle_ranks,
          "must leave one of " + std::to_string(world.size()) + " ranks with images; choose 0 to " +
              std::to_string(world.size() - 1));
  require(options.log_interval >= 1, kOperation, "log_interval", options.log_interval,
          "must be at least 1");
  const auto require_rate = [](const char* argument, double rate) {
    require(std::isfinite(rate) && rate > 0, kOperation, argument, rate, "must be above 0");
  };
  require_rate("lr", options.lr);
  require_rate("gate_lr_factor", options.gate_lr_factor);
  require(options.lr_decay >= 0 && options.lr_decay <= 1, kOperation, "lr_decay", options.lr_decay,
          "is a share of the run; choose 0 to 1");
  check_search(options, num_images);
}

}  // namespace perseid::examples
