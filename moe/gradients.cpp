#include "moe/gradients.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "comm/agree.h"
#include "comm/collectives.h"
#include "gates/describe.h"
#include "kernels/dtype.h"
#include "kernels/error.h"
#include "kernels/parallel.h"
#include "moe/experts.h"
#include "moe/ranks_agree.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {
constexpr const char* kClip = "clip_grad_norm";
constexpr const char* kSum = "sum_gradients";

/// Walks as Module::parameters does. Tied parameters appear in more than one module and count once.
void collect(const torch::nn::Module& module, bool is_expert, SplitParameters& split,
             std::unordered_set<const void*>& seen) {
  const auto* experts = dynamic_cast<const Experts*>(&module);
  if (experts != nullptr) is_expert = is_expert || !experts->replicated();
  for (const at::Tensor& parameter : module.parameters(/*recurse=*/false)) {
    if (!parameter.requires_grad()) continue;
    if (!seen.insert(parameter.unsafeGetTensorImpl()).second) continue;
    (is_expert ? split.expert : split.dense).push_back(parameter);
  }
  for (const auto& child : module.children()) collect(*child, is_expert, split, seen);
}

std::vector<at::Tensor> defined_gradients(const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> gradients;
  gradients.reserve(parameters.size());
  for (const at::Tensor& parameter : parameters) {
    if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
    gradients.push_back(parameter.grad());
  }
  return gradients;
}

/// Sums through one flat buffer of T, so that a step has few collectives however many parameters.
template <typename T>
void sum_flat(const std::vector<at::Tensor>& gradients, const comm::Group& group) {
  int64_t count = 0;
  for (const at::Tensor& gradient : gradients) count += gradient.numel();
  if (count == 0) return;
  const at::Tensor flat = at::empty({count}, c10::CppTypeToScalarType<T>::value);
  const auto for_each = [&](auto&& body) {
    int64_t offset = 0;
    for (const at::Tensor& gradient : gradients) {
      body(gradient, flat.narrow(0, offset, gradient.numel()).view(gradient.sizes()));
      offset += gradient.numel();
    }
  };
  for_each([](const at::Tensor& gradient, const at::Tensor& part) { part.copy_(gradient); });
  comm::all_reduce(flat.mutable_data_ptr<T>(), count, comm::ReduceOp::kSum, group,
                   {.operation = kSum});
  for_each([](const at::Tensor& gradient, const at::Tensor& part) { gradient.copy_(part); });
}

void sum_over(const std::vector<at::Tensor>& parameters, const comm::Group& group) {
  const std::vector<at::Tensor> gradients = defined_gradients(parameters);
  std::vector<at::Tensor> single, wide;
  for (const at::Tensor& gradient : gradients) {
    const bool is_wide = dtype_of(gradient, kSum) == kernels::DType::kFloat64;
    (is_wide ? wide : single).push_back(gradient);
  }
  if (group.size() == 1) return;  // the sum over one rank, without the buffers
  sum_flat<float>(single, group);
  sum_flat<double>(wide, group);
}

/// Fixed blocks and lanes: the same bits at any number of threads.
double sum_of_squares(const at::Tensor& gradient) {
  constexpr int64_t kBlock = 1 << 14;
  constexpr int64_t kLanes = 8;
  const at::Tensor values = gradient.detach().cpu().contiguous();
  const int64_t count = values.numel();
  const int64_t num_blocks = (count + kBlock - 1) / kBlock;
  std::vector<double> partial(static_cast<size_t>(num_blocks));
  kernels::dispatch_dtype(dtype_of(values, kClip), kClip, [&](auto tag) {
    using T = decltype(tag);
    const T* data = static_cast<const T*>(data_of(values));
    kernels::parallel_for(0, num_blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        double lanes[kLanes] = {};
        const int64_t last = std::min(count, (block + 1) * kBlock);
        int64_t i = block * kBlock;
        for (; i + kLanes <= last; i += kLanes) {
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            const double x = kernels::load(data + i + lane);
            lanes[lane] += x * x;
          }
        }
        for (int64_t lane = 0; i < last; ++i, ++lane) {
          const double x = kernels::load(data + i);
          lanes[lane] += x * x;
        }
        double sum = 0;
        for (const double lane : lanes) sum += lane;
        partial[static_cast<size_t>(block)] = sum;
      }
    });
  });
  double sum = 0;
  for (const double x : partial) sum += x;
  return sum;
}

double sum_of_squares(const std::vector<at::Tensor>& parameters) {
  double sum = 0;
  for (const at::Tensor& parameter : parameters) {
    if (parameter.grad().defined()) sum += sum_of_squares(parameter.grad());
  }
  return sum;
}

/// Collective over all ranks: each of them has gradients that can be summed and groups that fit.
void agree_on_gradients(const SplitParameters& split, const ParallelGroups& groups,
                        const char* operation) {
  comm::agree(groups.world, {.operation = operation}, [&] {
    for (const auto* parameters : {&split.dense, &split.expert}) {
      for (const at::Tensor& parameter : *parameters) {
        const at::Tensor gradient = parameter.grad().defined() ? parameter.grad() : parameter;
        require(gradient.layout() == at::kStrided && gradient.device().is_cpu(), operation,
                "gradient",
                gates::describe(gradient) + " " + to_text(gradient.layout()) + " on " +
                    to_text(gradient.device()),
                "is not a dense CPU tensor");
        dtype_of(gradient, operation);
      }
    }
  });
}
}  // namespace

SplitParameters split_parameters(const torch::nn::Module& module) {
  SplitParameters split;
  std::unordered_set<const void*> seen;
  collect(module, /*is_expert=*/false, split, seen);
  return split;
}

void sum_gradients(const torch::nn::Module& module, const ParallelGroups& groups) {
  c10::NoGradGuard no_grad;
  const SplitParameters split = split_parameters(module);
  agree_on_gradients(split, groups, kSum);
  sum_over(split.dense, groups.world);
  sum_over(split.expert, groups.expert_replicas);
}

double clip_grad_norm(const torch::nn::Module& module, const ParallelGroups& groups,
                      double max_norm) {
  c10::NoGradGuard no_grad;
  const SplitParameters split = split_parameters(module);
  agree_on_gradients(split, groups, kClip);
  double mine[2] = {max_norm, 0};
  if (groups.world.rank() == 0) mine[1] += sum_of_squares(split.dense);
  if (groups.expert_replicas.rank() == 0) mine[1] += sum_of_squares(split.expert);
  std::vector<double> shares(2 * static_cast<size_t>(groups.world.size()));
  const comm::CallSite site{.operation = kClip};
  comm::all_gather(mine, sizeof(mine), shares.data(), groups.world, site);

  double sum = 0;
  std::vector<double> max_norms;  // compared, since replicas must scale alike
  for (size_t i = 0; i < shares.size(); i += 2) {
    max_norms.push_back(shares[i]);
    sum += shares[i + 1];
  }
  require_same_on_ranks(max_norms, "max_norm", groups.world.rank(), site);
  require(max_norm > 0, kClip, "max_norm", max_norm, "must be above 0");
  const double norm = std::sqrt(sum);
  if (!std::isfinite(norm)) {
    ErrorDetail detail{kClip, "norm", to_text(norm),
                       "is not finite; the gradients are left as they are, skip this step or lower "
                       "the learning rate"};
    detail.rank = groups.world.rank();
    throw Diverged(detail);
  }
  const double scale = max_norm / (norm + 1e-6);
  if (scale < 1) {
    for (const auto* parameters : {&split.dense, &split.expert}) {
      for (const at::Tensor& parameter : *parameters) {
        if (parameter.grad().defined()) parameter.mutable_grad().mul_(scale);
      }
    }
  }
  return norm;
}

}  // namespace perseid
