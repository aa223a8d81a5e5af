#pragma once
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/random.h"

// Compares autograd with central differences. LibTorch's C++ API has no such check.

namespace perseid::testing {

struct GradcheckOptions {
  double step = 1e-6;
  int64_t max_elements = 256;  ///< per input; of larger inputs a seeded sample is checked
  uint64_t seed = 1;           ///< of the output cotangents and of the sample
};

struct GradcheckResult {
  double max_error = 0;  ///< |autograd - difference| / scale of the input's gradient
  std::string worst;     ///< where, and both values
};

/// Float64 outputs of a function that reads its inputs from the tensors given to gradcheck:
/// arguments of a lambda's capture, or parameters of a module. Undefined outputs are skipped.
using DifferentiableFunction = std::function<std::vector<at::Tensor>()>;

/// Checks d<cotangents, outputs>/d(inputs) for random cotangents. `inputs` are float64, contiguous
/// leaves; gradients are asked of them here, their values are moved and put back. An undefined
/// gradient counts as zero. The scale of an input is its largest gradient element, but at least
/// 1e-2 of the largest output, below which rounding hides a difference quotient.
inline GradcheckResult gradcheck(const DifferentiableFunction& function,
                                 const std::vector<at::Tensor>& inputs,
                                 const GradcheckOptions& options = {}) {
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK(input.scalar_type() == at::kDouble && input.is_contiguous() && input.is_leaf(),
                "gradcheck needs float64, contiguous leaves");
    input.set_requires_grad(true);
  }
  const kernels::RandomKey key = kernels::random_key(options.seed);

  // Cotangents and the gradients by autograd.
  std::vector<at::Tensor> gradients(inputs.size());
  std::vector<at::Tensor> cotangents;
  double output_max = 0;
  {
    c10::AutoGradMode enable(true);
    const std::vector<at::Tensor> outputs = function();
    std::vector<at::Tensor> roots, root_cotangents;
    for (size_t o = 0; o < outputs.size(); ++o) {
      cotangents.emplace_back();
      if (!outputs[o].defined()) continue;
      TORCH_CHECK(outputs[o].scalar_type() == at::kDouble, "gradcheck needs float64 outputs");
      at::Tensor cotangent = at::empty(outputs[o].sizes(), at::kDouble);
      double* values = cotangent.data_ptr<double>();
      for (int64_t i = 0; i < cotangent.numel(); ++i) {
        values[i] = 2 * kernels::random_uniform(key.with(o), static_cast<uint64_t>(i)) - 1;
      }
      cotangents.back() = cotangent;
      if (outputs[o].numel() > 0) {
        output_max = std::max(output_max, outputs[o].detach().abs().max().item<double>());
      }
      if (outputs[o].requires_grad()) {
        roots.push_back(outputs[o]);
        root_cotangents.push_back(cotangent);
      }
    }
    if (!roots.empty()) {
      gradients = torch::autograd::grad(roots, inputs, root_cotangents, /*retain_graph=*/false,
                                        /*create_graph=*/false, /*allow_unused=*/true);
    }
  }

  const auto values_of = [&] {
    c10::NoGradGuard no_grad;
    std::vector<at::Tensor> values;
    for (const at::Tensor& output : function()) {
      values.push_back(output.defined() ? output.detach().clone() : output);
    }
    return values;
  };
  GradcheckResult result;
  for (size_t n = 0; n < inputs.size(); ++n) {
    const int64_t size = inputs[n].numel();
    std::vector<int64_t> elements(static_cast<size_t>(std::min(size, options.max_elements)));
    for (size_t i = 0; i < elements.size(); ++i) {
      elements[i] = size <= options.max_elements
                        ? static_cast<int64_t>(i)
                        : static_cast<int64_t>(kernels::random_below(key.with(1000 + n), i,
                                                                     static_cast<uint64_t>(size)));
    }
    const at::Tensor gradient =
        gradients[n].defined() ? gradients[n].contiguous() : at::zeros_like(inputs[n]);
    double* data = inputs[n].data_ptr<double>();
    std::vector<double> differences;
    double scale = std::max(1e-2 * output_max, 1e-300);
    if (size > 0) scale = std::max(scale, gradient.abs().max().item<double>());
    for (const int64_t i : elements) {
      const double value = data[i];
      data[i] = value + options.step;
      const std::vector<at::Tensor> above = values_of();
      data[i] = value - options.step;
      const std::vector<at::Tensor> below = values_of();
      data[i] = value;
      // Elements are subtracted before the sum, so that a large sum does not hide a small change.
      double difference = 0;
      for (size_t o = 0; o < cotangents.size(); ++o) {
        if (!cotangents[o].defined()) continue;
        difference += ((above[o] - below[o]) * cotangents[o]).sum().item<double>();
      }
      differences.push_back(difference / (2 * options.step));
      scale = std::max(scale, std::abs(differences.back()));
    }
    for (size_t i = 0; i < elements.size(); ++i) {
      const double expected = differences[i];
      const double found = gradient.data_ptr<double>()[elements[i]];
      double error = std::abs(found - expected) / scale;
      if (std::isnan(error)) error = INFINITY;
      if (error > result.max_error) {
        std::ostringstream text;
        text.precision(12);
        text << "input " << n << " element " << elements[i] << ": autograd " << found
             << ", difference " << expected << ", scale " << scale;
        result = {error, text.str()};
      }
    }
  }
  return result;
}

/// EXPECT_TRUE(gradients_match([&] { return ...; }, {x, w}));
inline ::testing::AssertionResult gradients_match(const DifferentiableFunction& function,
                                                  const std::vector<at::Tensor>& inputs,
                                                  double tolerance = 1e-7,
                                                  const GradcheckOptions& options = {}) {
  const GradcheckResult result = gradcheck(function, inputs, options);
  if (result.max_error <= tolerance) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "relative error " << result.max_error << " above "
                                       << tolerance << " at " << result.worst;
}

}  // namespace perseid::testing
