#include "examples/train_fashion/trees.h"

#include <ATen/ops/linear.h>
#include <c10/core/GradMode.h>

#include <limits>

#include "comm/collectives.h"
#include "kernels/smooth_step.h"

namespace perseid::examples {

TreeCounter::TreeCounter(const gates::CometGate& gate, int64_t num_domains)
    : gate_(gate), num_domains_(num_domains) {
  const int64_t num_splits = gate.num_experts() - 1;
  counts_.num_trees = gate.top_k();
  const auto zeros = [&](int64_t per_tree) {
    return std::vector<int64_t>(static_cast<size_t>(gate.top_k() * per_tree), 0);
  };
  counts_.reached = zeros((2 * num_splits + 1) * num_domains);
  counts_.left = zeros(num_splits);
  counts_.right = zeros(num_splits);
}

void TreeCounter::add(const at::Tensor& tokens, const at::Tensor& domains) {
  const c10::NoGradGuard no_grad;
  const int64_t* const domain = domains.const_data_ptr<int64_t>();
  if (gate_.num_experts() == 1) {  // a tree is its leaf
    for (int64_t t = 0; t < tokens.size(0); ++t) ++counts_.reached[static_cast<size_t>(domain[t])];
    return;
  }
  const at::ScalarType type = gate_.split_weight.scalar_type();
  const at::Tensor features = gates::gate_features(tokens, gate_.options().input_norm(), type);
  const at::Tensor logits =
      at::linear(features, gate_.split_weight, gate_.split_bias).cpu().contiguous();
  if (type == at::kDouble) {
    add_rows<double>(logits, domain);
  } else {
    add_rows<float>(logits, domain);
  }
}

template <typename T>
void TreeCounter::add_rows(const at::Tensor& logits, const int64_t* domains) {
  const auto num_splits = static_cast<size_t>(gate_.num_experts() - 1);
  const size_t num_nodes = 2 * num_splits + 1;
  const auto gamma = static_cast<T>(gate_.options().gamma());
  const T* z = logits.const_data_ptr<T>();
  std::vector<T> weight(num_nodes);
  for (int64_t t = 0; t < logits.size(0); ++t) {
    for (size_t tree = 0; tree < static_cast<size_t>(counts_.num_trees); ++tree) {
      weight[0] = 1;
      for (size_t q = 0; q < num_nodes; ++q) {
        const bool is_reached = weight[q] >= std::numeric_limits<T>::min();
        const size_t cell = (tree * num_nodes + q) * static_cast<size_t>(num_domains_);
        counts_.reached[cell + static_cast<size_t>(domains[t])] += is_reached ? 1 : 0;
        if (q >= num_splits) continue;  // a leaf
        const kernels::SmoothStep<T> step = kernels::smooth_step(z[q], gamma);
        weight[2 * q + 1] = weight[q] * step.value;
        weight[2 * q + 2] = weight[q] * step.complement;
        const size_t split = tree * num_splits + q;
        counts_.left[split] += is_reached && step.complement == 0 ? 1 : 0;
        counts_.right[split] += is_reached && step.value == 0 ? 1 : 0;
      }
      z += num_splits;
    }
  }
}

TreeCounts TreeCounter::total(const comm::Group& world) const {
  TreeCounts total = counts_;
  for (auto* counts : {&total.reached, &total.left, &total.right}) {
    comm::all_reduce(counts->data(), static_cast<int64_t>(counts->size()), comm::ReduceOp::kSum,
                     world, {"tree_counts"});
  }
  return total;
}

}  // namespace perseid::examples
