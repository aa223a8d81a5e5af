// Saved for the backward, counted by an allocator: T*D + 2*A*F elements and at most 16 bytes for
// each assignment (gated experts; plain ones T*D + A*F). The tokens themselves are the caller's.
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>

#include "gates/top_k_gate.h"
#include "moe/grouped_mlp.h"
#include "moe/moe_layer.h"
#include "tests/closed_form.h"

namespace perseid::testing {
namespace {

/// Counts the bytes that are in use. The size stands before each block.
class CountingAllocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = static_cast<char*>(std::aligned_alloc(kHeader, kHeader * (bytes / kHeader + 2)));
    *reinterpret_cast<size_t*>(block) = bytes;
    live += static_cast<int64_t>(bytes);
    return {block + kHeader, block + kHeader, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
  static inline std::atomic<int64_t> live{0};

 private:
  static constexpr size_t kHeader = 64;
  static void release(void* data) {
    if (data == nullptr) return;
    char* block = static_cast<char*>(data) - kHeader;
    live -= static_cast<int64_t>(*reinterpret_cast<size_t*>(block));
    std::free(block);
  }
};

CountingAllocator& counter() {
  static auto* allocator = [] {
    auto* made = new CountingAllocator;
    c10::SetCPUAllocator(made, /*priority=*/100);
    return made;
  }();
  return *allocator;
}

void check_saved(at::ScalarType dtype, bool gated, int64_t top_k, int64_t num_experts,
                 double aux_loss_coeff, const ActivationSparsity& sparsity = {}) {
  constexpr int64_t kTokens = 640, kModel = 32, kFf = 24;
  SCOPED_TRACE(std::string(c10::toString(dtype)) + " K=" + std::to_string(top_k) +
               " gated=" + std::to_string(gated));
  CountingAllocator& memory = counter();
  const ExpertPlacement placement = ExpertPlacement::contiguous(num_experts, 1);
  const auto experts = std::make_shared<GroupedMLP>(
      GroupedMLPOptions(kModel, kFf).gated(gated).activation_sparsity(sparsity), placement, 0);
  experts->to(dtype);
  const auto gate = std::make_shared<gates::TopKGate>(gates::TopKGateOptions(kModel, num_experts)
                                                          .top_k(top_k)
                                                          .aux_loss_coeff(aux_loss_coeff)
                                                          .z_loss_coeff(aux_loss_coeff));
  MoELayer layer({gate}, experts, placement, make_parallel_groups(comm::Group()));

  int64_t saved = 0;
  for (int round = 0; round < 2; ++round) {  // the first one may fill caches
    at::Tensor tokens = random_tensor({kTokens, kModel}, 5, -1, 1, dtype).requires_grad_(true);
    const int64_t before = memory.live;
    MoEOutput out = layer.forward(tokens);
    at::Tensor loss = out.outputs[0].sum() + out.loss();
    const int64_t results = out.outputs[0].numel() * out.outputs[0].element_size();
    saved = memory.live - before - results;
    loss.backward();
  }
  const int64_t assignments = kTokens * top_k;
  const int64_t element = c10::elementSize(dtype);
  const int64_t pre = (gated ? 2 : 1) * assignments * kFf * element;
  EXPECT_GE(saved, pre);
  EXPECT_LE(saved, pre + 16 * assignments);
}

TEST(LayerMemory, SavesTokensAndPreActivations) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const bool gated : {true, false}) {
      check_saved(dtype, gated, 2, 8, 1e-2);
      check_saved(dtype, gated, 1, 8, 1e-2);
      check_saved(dtype, gated, 8, 64, 1e-2);
      check_saved(dtype, gated, 2, 8, 0);
    }
  }
}

TEST(LayerMemory, ActivationSparsity) {
  for (const bool gated : {true, false}) {
    check_saved(at::kFloat, gated, 2, 8, 0, ActivationSparsity::top_k(5));
    check_saved(at::kBFloat16, gated, 2, 8, 0, ActivationSparsity::statistical_top_k(5));
  }
}

}  // namespace
}  // namespace perseid::testing
