// COMET by its definitions: one token after the other, each leaf by the product on its own path,
// each derivative by the product of the other factors. Sums in double.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/checks.h"
#include "kernels/comet_trees.h"

namespace perseid::kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// One step of a path: the share of this branch and its derivative with respect to z of the node.
struct Step {
  int64_t node;
  double share;
  double slope;
};

struct Leaf {
  std::vector<Step> path;
  double reach;       ///< v
  double soft_reach;  ///< v before hard_eval
  double logit;
  double weight = 0;  ///< w
  int64_t expert;
};

/// Leaves of one tree in the order of a left-first depth-first walk.
void walk(int64_t node, const std::vector<SmoothStep<double>>& switches, std::vector<Step>& path,
          std::vector<Leaf>& leaves) {
  const auto num_splits = static_cast<int64_t>(switches.size());
  if (node >= num_splits) {
    double reach = 1;
    for (const Step& step : path) reach *= step.share;
    leaves.push_back({path, reach, reach, 0, 0, 0});
    return;
  }
  const SmoothStep<double>& step = switches[static_cast<size_t>(node)];
  path.push_back({node, step.value, step.slope});
  walk(2 * node + 1, switches, path, leaves);
  path.back() = {node, step.complement, -step.slope};
  walk(2 * node + 2, switches, path, leaves);
  path.pop_back();
}

struct Token {
  std::vector<std::vector<Leaf>> trees;
  double max = -kInfinity;
  double sum = 0;
  int64_t reached_nodes = 0;
  int64_t saturated_nodes = 0;
  bool has_nan = false;
  bool is_non_finite = false;
};

template <typename T>
Token read_token(const CometShape& shape, const CometOptions& options, const CometInput& input,
                 int64_t t) {
  const int64_t E = shape.num_experts, K = shape.num_trees;
  const T* z = static_cast<const T*>(input.split_logits) + t * K * (E - 1);
  const T* a = static_cast<const T*>(input.leaf_logits) + t * K * E;
  Token token;
  const auto look_at = [&](double x) {
    token.has_nan |= std::isnan(x);
    token.is_non_finite |= !std::isfinite(x);
  };
  for (int64_t i = 0; i < K; ++i) {
    std::vector<SmoothStep<double>> switches;
    for (int64_t q = 0; q < E - 1; ++q) {
      const auto value = static_cast<double>(z[i * (E - 1) + q]);
      look_at(value);
      switches.push_back(smooth_step(value, static_cast<double>(static_cast<T>(options.gamma))));
    }
    std::vector<Step> path;
    std::vector<Leaf> leaves;
    walk(0, switches, path, leaves);
    for (int64_t q = 0; q < E - 1; ++q) {
      double reach = 1;
      for (int64_t node = q; node > 0; node = (node - 1) / 2) {
        const auto& parent = switches[static_cast<size_t>((node - 1) / 2)];
        reach *= node % 2 == 1 ? parent.value : parent.complement;
      }
      if (reach < static_cast<double>(std::numeric_limits<T>::min())) continue;
      ++token.reached_nodes;
      if (switches[static_cast<size_t>(q)].slope == 0) ++token.saturated_nodes;
    }
    size_t largest = 0;
    for (size_t l = 0; l < leaves.size(); ++l) {
      const int64_t place = i * E + static_cast<int64_t>(l);
      leaves[l].logit = static_cast<double>(a[place]);
      look_at(leaves[l].logit);
      leaves[l].expert =
          input.expert_map == nullptr ? static_cast<int64_t>(l) : input.expert_map[place];
      if (leaves[l].reach < static_cast<double>(std::numeric_limits<T>::min())) {
        leaves[l].reach = leaves[l].soft_reach = 0;
      }
      if (leaves[l].reach > leaves[largest].reach) largest = l;
    }
    for (size_t l = 0; l < leaves.size(); ++l) {
      if (options.hard_eval) leaves[l].reach = l == largest ? 1 : 0;
    }
    token.trees.push_back(leaves);
  }
  if (token.has_nan) return token;

  for (const auto& leaves : token.trees) {
    for (const Leaf& leaf : leaves) {
      if (leaf.reach > 0) token.max = std::max(token.max, leaf.logit);
    }
  }
  for (auto& leaves : token.trees) {
    for (Leaf& leaf : leaves) {
      if (leaf.reach == 0) continue;
      leaf.weight =
          leaf.logit == token.max ? leaf.reach : std::exp(leaf.logit - token.max) * leaf.reach;
      token.sum += leaf.weight;
    }
  }
  for (auto& leaves : token.trees) {
    for (Leaf& leaf : leaves) leaf.weight /= token.sum;
  }
  return token;
}

bool is_valid(const CometInput& input, int64_t t) {
  return input.valid == nullptr || input.valid[t] != 0;
}

template <typename T>
void forward(const CometShape& shape, const CometOptions& options, const CometInput& input,
             const CometOutput& output) {
  const int64_t E = shape.num_experts;
  double entropy = 0, removed = 0;
  int64_t reached = 0, saturated = 0, non_finite = 0;
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    std::vector<double> weights(static_cast<size_t>(E), 0.0);
    if (is_valid(input, t)) {
      const Token token = read_token<T>(shape, options, input, t);
      if (!token.has_nan) {
        reached += token.reached_nodes;
        saturated += token.saturated_nodes;
      }
      non_finite += token.is_non_finite ? 1 : 0;
      if (token.has_nan) {
        std::fill_n(weights.begin(), shape.num_trees, kNaN);
        entropy = removed = kNaN;
      }
      for (const auto& leaves : token.trees) {
        for (const Leaf& leaf : leaves) {
          if (token.has_nan) continue;
          weights[static_cast<size_t>(leaf.expert)] += leaf.weight;
          entropy -= leaf.soft_reach * std::log(leaf.soft_reach + kEntropyEpsilon);
        }
      }
    }
    for (int64_t m = 0; m < E; ++m) {
      double& g = weights[static_cast<size_t>(m)];
      if (g < options.min_weight) {
        removed += g;
        g = 0;
      }
      if (output.weights != nullptr) static_cast<T*>(output.weights)[t * E + m] = static_cast<T>(g);
    }
  }
  if (output.entropy_sum != nullptr) *output.entropy_sum = entropy;
  if (output.removed_weight != nullptr) *output.removed_weight = removed;
  if (output.reached_nodes != nullptr) *output.reached_nodes = reached;
  if (output.saturated_nodes != nullptr) *output.saturated_nodes = saturated;
  if (output.non_finite_tokens != nullptr) *output.non_finite_tokens = non_finite;
}

template <typename T>
void backward(const CometShape& shape, const CometOptions& options, const CometInput& input,
              const CometGradInput& grad, T* grad_splits, T* grad_leaves) {
  const int64_t E = shape.num_experts, K = shape.num_trees;
  const auto* const weights = static_cast<const T*>(grad.weights);
  const auto* const grad_weights = static_cast<const T*>(grad.grad_weights);
  const double entropy_coeff = grad.grad_entropy_sum == nullptr ? 0.0 : *grad.grad_entropy_sum;
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    std::vector<double> splits(static_cast<size_t>(K * (E - 1)), 0.0);
    std::vector<double> leaf_grads(static_cast<size_t>(K * E), 0.0);
    if (is_valid(input, t)) {
      const Token token = read_token<T>(shape, options, input, t);
      if (token.has_nan) {
        std::fill(splits.begin(), splits.end(), kNaN);
        std::fill(leaf_grads.begin(), leaf_grads.end(), kNaN);
      }
      const auto gradient_of = [&](int64_t m) {
        const bool is_read = grad_weights != nullptr && weights[t * E + m] > 0;
        return is_read ? static_cast<double>(grad_weights[t * E + m]) : 0.0;
      };
      double mean = 0;
      for (int64_t m = 0; m < E; ++m) {
        if (gradient_of(m) != 0) mean += static_cast<double>(weights[t * E + m]) * gradient_of(m);
      }
      for (int64_t i = 0; i < K && !token.has_nan; ++i) {
        for (int64_t l = 0; l < E; ++l) {
          const Leaf& leaf = token.trees[static_cast<size_t>(i)][static_cast<size_t>(l)];
          double of_reach = 0;
          if (leaf.reach > 0 && grad_weights != nullptr && std::isfinite(token.max)) {
            const double change = gradient_of(leaf.expert) - mean;
            leaf_grads[static_cast<size_t>(i * E + l)] = leaf.weight * change;
            if (!options.hard_eval) of_reach = leaf.weight / leaf.reach * change;
          }
          const double v = leaf.soft_reach;
          if (v > 0) {
            of_reach +=
                entropy_coeff * (-std::log(v + kEntropyEpsilon) - v / (v + kEntropyEpsilon));
          }
          for (const Step& step : leaf.path) {
            double others = step.slope;
            for (const Step& other : leaf.path) {
              if (other.node != step.node) others *= other.share;
            }
            splits[static_cast<size_t>(i * (E - 1) + step.node)] += of_reach * others;
          }
        }
      }
    }
    for (size_t q = 0; q < splits.size(); ++q) {
      grad_splits[static_cast<size_t>(t) * splits.size() + q] = static_cast<T>(splits[q]);
    }
    for (size_t l = 0; l < leaf_grads.size(); ++l) {
      grad_leaves[static_cast<size_t>(t) * leaf_grads.size() + l] = static_cast<T>(leaf_grads[l]);
    }
  }
}

}  // namespace

void check_comet(const char* operation, const CometShape& shape, const CometOptions& options,
                 const CometInput& input) {
  const int64_t E = shape.num_experts, K = shape.num_trees;
  require_count(operation, "num_tokens", shape.num_tokens);
  require(E >= 1, operation, "num_experts", E, "is below 1; a gate needs an expert");
  require(K >= 1 && K <= E, operation, "num_trees", K,
          "is outside [1, num_experts=" + to_text(E) + "]");
  require(std::isnormal(static_cast<float>(options.gamma)) && options.gamma > 0, operation, "gamma",
          options.gamma, "is not a finite number above 0");
  require(options.min_weight >= 0 && options.min_weight < 1, operation, "min_weight",
          options.min_weight, "is outside [0, 1)");
  require_buffer(operation, "split_logits", input.split_logits, shape.num_tokens * K * (E - 1));
  require_buffer(operation, "leaf_logits", input.leaf_logits, shape.num_tokens * K * E);
}

void check_comet_grad(const char* operation, const CometShape& shape, const CometGradInput& grad,
                      const void* grad_split_logits, const void* grad_leaf_logits) {
  const int64_t E = shape.num_experts, K = shape.num_trees;
  if (grad.grad_weights != nullptr) {
    require_buffer(operation, "weights", grad.weights, shape.num_tokens * E);
  }
  require_buffer(operation, "grad_split_logits", grad_split_logits, shape.num_tokens * K * (E - 1));
  require_buffer(operation, "grad_leaf_logits", grad_leaf_logits, shape.num_tokens * K * E);
}

void comet_reference(const CometShape& shape, const CometOptions& options, DType dtype,
                     const CometInput& input, const CometOutput& output) {
  check_comet("comet", shape, options, input);
  dispatch_float_dtype(dtype, "comet",
                       [&](auto tag) { forward<decltype(tag)>(shape, options, input, output); });
}

void comet_backward_reference(const CometShape& shape, const CometOptions& options, DType dtype,
                              const CometInput& input, const CometGradInput& grad,
                              void* grad_split_logits, void* grad_leaf_logits) {
  check_comet("comet_backward", shape, options, input);
  check_comet_grad("comet_backward", shape, grad, grad_split_logits, grad_leaf_logits);
  dispatch_float_dtype(dtype, "comet_backward", [&](auto tag) {
    using T = decltype(tag);
    backward<T>(shape, options, input, grad, static_cast<T*>(grad_split_logits),
                static_cast<T*>(grad_leaf_logits));
  });
}

}  // namespace perseid::kernels
