#include "gates/hash_tables.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

#include "gates/describe.h"
#include "gates/linear_router.h"
#include "kernels/error.h"
#include "kernels/hash.h"
#include "kernels/random.h"

namespace perseid::gates {
namespace {

using at::Tensor;

void require_experts(const char* operation, int64_t num_experts) {
  require(num_experts >= 1 && num_experts <= std::numeric_limits<int32_t>::max(), operation,
          "num_experts", num_experts, "is outside [1, 2147483647]");
}

/// One integer for each key, as int64 without gaps.
Tensor checked_integers(const char* operation, const char* argument, const Tensor& values) {
  require(values.defined() && values.dim() == 1 && values.numel() > 0 &&
              at::isIntegralType(values.scalar_type(), /*includeBool=*/false),
          operation, argument, describe(values), "is not an integer [V] tensor with V >= 1");
  return values.cpu().to(at::kLong).contiguous();
}

std::vector<int64_t> ids_below(int64_t count) {
  std::vector<int64_t> ids(static_cast<size_t>(count));
  std::iota(ids.begin(), ids.end(), int64_t{0});
  return ids;
}

/// Squared distance of each key to one centre, added in the order of the features.
std::vector<double> squared_distances(const Tensor& features, int64_t centre) {
  const int64_t V = features.size(0), D = features.size(1);
  const double* x = features.const_data_ptr<double>();
  const double* c = x + centre * D;
  std::vector<double> result(static_cast<size_t>(V), 0.0);
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t d = 0; d < D; ++d) {
      const double difference = x[v * D + d] - c[d];
      result[static_cast<size_t>(v)] += difference * difference;
    }
  }
  return result;
}

/// [E] keys as first centres (k-means++, Arthur and Vassilvitskii 2007): each is drawn with
/// probability proportional to its squared distance to the nearest centre so far.
Tensor first_centres(const Tensor& features, int64_t num_experts, uint64_t seed) {
  const int64_t V = features.size(0);
  const kernels::RandomKey key = kernels::random_key(seed);
  const Tensor centres = at::empty({num_experts}, at::kLong);
  auto* const chosen = centres.mutable_data_ptr<int64_t>();
  chosen[0] = static_cast<int64_t>(kernels::random_below(key, 0, static_cast<uint64_t>(V)));
  std::vector<double> nearest = squared_distances(features, chosen[0]);
  for (int64_t e = 1; e < num_experts; ++e) {
    double left = std::accumulate(nearest.begin(), nearest.end(), 0.0) *
                  kernels::random_uniform(key, static_cast<uint64_t>(e));
    int64_t last = 0;  // the end of the sum may round above the last key of distance > 0
    for (int64_t v = 0; v < V && left >= 0; ++v) {
      if (nearest[static_cast<size_t>(v)] > 0) last = v;
      left -= nearest[static_cast<size_t>(v)];
    }
    chosen[e] = last;
    const std::vector<double> distances = squared_distances(features, last);
    for (size_t v = 0; v < nearest.size(); ++v) nearest[v] = std::min(nearest[v], distances[v]);
  }
  return centres;
}

/// [V] int32 nearest centre: the largest x c - |c|^2 / 2, equal ones by smaller id.
Tensor nearest_centres(const Tensor& features, const Tensor& centres) {
  LinearRouterOptions options;
  options.top_k = 1;
  const Tensor bias = centres.square().sum(1).mul(-0.5);
  return linear_router(features, centres, bias, {}, options).expert_idx;
}

/// Means of the members; a centre without members stays.
void move_centres(const Tensor& features, const Tensor& table, const Tensor& centres) {
  const Tensor sums = at::zeros(centres.sizes(), centres.options());
  std::vector<int64_t> counts(static_cast<size_t>(centres.size(0)), 0);
  const int64_t D = features.size(1);
  const int32_t* expert = table.const_data_ptr<int32_t>();
  const double* x = features.const_data_ptr<double>();
  auto* const sum = sums.mutable_data_ptr<double>();
  for (int64_t v = 0; v < features.size(0); ++v) {
    ++counts[static_cast<size_t>(expert[v])];
    for (int64_t d = 0; d < D; ++d) sum[expert[v] * D + d] += x[v * D + d];
  }
  for (int64_t e = 0; e < centres.size(0); ++e) {
    const int64_t count = counts[static_cast<size_t>(e)];
    if (count > 0) centres[e].copy_(sums[e].div(static_cast<double>(count)));
  }
}

}  // namespace

Tensor balanced_hash_table(const Tensor& frequencies_in, int64_t num_experts, uint64_t seed) {
  constexpr const char* kOperation = "balanced_hash_table";
  require_experts(kOperation, num_experts);
  const Tensor frequencies = checked_integers(kOperation, "frequencies", frequencies_in);
  const int64_t V = frequencies.numel();
  const int64_t* frequency = frequencies.const_data_ptr<int64_t>();
  for (int64_t key = 0; key < V; ++key) {
    if (frequency[key] >= 0) continue;
    const std::string argument = "frequencies[" + to_text(key) + "]";
    require(false, kOperation, argument.c_str(), frequency[key], "is negative; give a count");
  }

  std::vector<int64_t> by_frequency = ids_below(V);
  std::stable_sort(by_frequency.begin(), by_frequency.end(),
                   [&](int64_t a, int64_t b) { return frequency[a] > frequency[b]; });
  using Bucket = std::pair<int64_t, int64_t>;  // load, expert: the smallest pair is on top
  std::priority_queue<Bucket, std::vector<Bucket>, std::greater<>> buckets;
  for (int64_t e = 0; e < num_experts; ++e) buckets.push({0, e});
  const Tensor table = at::empty({V}, at::kInt);
  auto* const expert = table.mutable_data_ptr<int32_t>();
  for (const int64_t key : by_frequency) {
    if (frequency[key] == 0) {
      expert[key] = kernels::hash_bucket(key, seed, num_experts);
      continue;
    }
    const auto [load, lightest] = buckets.top();
    buckets.pop();
    buckets.push({load + frequency[key], lightest});
    expert[key] = static_cast<int32_t>(lightest);
  }
  return table;
}

Tensor clustered_hash_table(const Tensor& features_in, int64_t num_experts, uint64_t seed,
                            int64_t max_iterations) {
  constexpr const char* kOperation = "clustered_hash_table";
  require_experts(kOperation, num_experts);
  require(features_in.defined() && features_in.dim() == 2 && features_in.numel() > 0 &&
              features_in.is_floating_point(),
          kOperation, "features", describe(features_in),
          "is not a floating [V, D] tensor with V >= 1 and D >= 1");
  require(max_iterations >= 1, kOperation, "max_iterations", max_iterations,
          "is below 1; 100 is usual");
  const c10::NoGradGuard no_grad;
  const Tensor features = features_in.cpu().to(at::kDouble).contiguous();
  require(features.isfinite().all().item<bool>(), kOperation, "features", describe(features_in),
          "holds a NaN or an infinity; give finite features");

  const Tensor centres = features.index_select(0, first_centres(features, num_experts, seed));
  Tensor table = nearest_centres(features, centres);
  for (int64_t i = 0; i < max_iterations; ++i) {
    move_centres(features, table, centres);
    Tensor moved = nearest_centres(features, centres);
    if (at::equal(moved, table)) break;
    table = std::move(moved);
  }
  return table;
}

Tensor dispersed_hash_table(const Tensor& clusters_in, int64_t num_experts, uint64_t seed) {
  constexpr const char* kOperation = "dispersed_hash_table";
  require_experts(kOperation, num_experts);
  const Tensor clusters = checked_integers(kOperation, "clusters", clusters_in);
  const int64_t V = clusters.numel();
  const int64_t* cluster = clusters.const_data_ptr<int64_t>();
  const kernels::RandomKey key = kernels::random_key(seed);
  const auto place = [&](int64_t id) {
    return std::pair{cluster[id], kernels::random_bits(key, static_cast<uint64_t>(id))};
  };
  std::vector<int64_t> order = ids_below(V);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return place(a) < place(b); });
  const Tensor table = at::empty({V}, at::kInt);
  auto* const expert = table.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < V; ++i) {
    expert[order[static_cast<size_t>(i)]] = static_cast<int32_t>(i % num_experts);
  }
  return table;
}

}  // namespace perseid::gates
