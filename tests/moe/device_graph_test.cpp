// The layer of one rank in a CUDA graph: capturing fails if the host waits anywhere in it.
//   ForwardIsCaptured  replayed on other tokens it gives what the layer gives without a graph
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <gtest/gtest.h>

#include "gates/top_k_gate.h"
#include "moe/grouped_mlp.h"
#include "moe/moe_layer.h"
#include "tests/closed_form.h"
#include "tests/device_mode.h"

namespace perseid::testing {
namespace {

TEST(DeviceGraph, ForwardIsCaptured) {
  if (!no_device_reason().empty()) GTEST_SKIP() << "needs a GPU: " << no_device_reason();
  constexpr int64_t kTokens = 256, kWidth = 64, kExperts = 8;
  const ExpertPlacement placement = ExpertPlacement::contiguous(kExperts, 1);
  const auto gate =
      std::make_shared<gates::TopKGate>(gates::TopKGateOptions(kWidth, kExperts).top_k(2));
  const auto experts =
      std::make_shared<GroupedMLP>(GroupedMLPOptions(kWidth, 2 * kWidth), placement, 0);
  experts->to(at::kBFloat16);
  MoELayerOptions options;
  options.on_nonfinite = OnNonFinite::kCount;
  MoELayer layer(std::vector<std::shared_ptr<gates::Gate>>{gate}, experts, placement,
                 make_parallel_groups(comm::self_group()), options);
  layer.to(test_device());

  const auto tokens_of = [&](uint64_t seed) {
    return random_tensor({kTokens, kWidth}, seed).to(test_device(), at::kBFloat16);
  };
  const at::NoGradGuard no_grad;
  const at::Tensor expected = layer.forward(MoEInput(tokens_of(2))).output().clone();
  at::Tensor tokens = tokens_of(1);

  const c10::cuda::CUDAStream side = c10::cuda::getStreamFromPool();
  at::cuda::CUDAGraph graph;
  at::Tensor output;
  {
    const c10::cuda::CUDAStreamGuard guard(side);
    for (int i = 0; i < 3; ++i) layer.forward(MoEInput(tokens));  // libraries make their buffers
    side.synchronize();
    graph.capture_begin();
    output = layer.forward(MoEInput(tokens)).output();
    graph.capture_end();
    tokens.copy_(tokens_of(2));
    graph.replay();
    side.synchronize();
  }
  EXPECT_TRUE(at::equal(output, expected));
}

}  // namespace
}  // namespace perseid::testing
