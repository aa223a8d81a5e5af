#include "moe/selection.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "gates/device.h"
#include "kernels/error.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

struct Row {
  int64_t begin;
  int64_t end;
};

Row row_of(const gates::Routing& routing, int64_t token) {
  if (routing.top_k > 0) return {token * routing.top_k, (token + 1) * routing.top_k};
  const int32_t* offsets = int32_data(routing.token_offsets);
  return {offsets[token], offsets[token + 1]};
}

}  // namespace

Selection merge_routings(const std::vector<gates::Routing>& given) {
  constexpr const char* kOperation = "merge_routings";
  require(!given.empty(), kOperation, "routings", given.size(), "is empty; pass 1 or more");
  if (given.size() == 1) return {given.front(), given.front().weights.unsqueeze(1)};

  std::vector<gates::Routing> routings = given;
  const gates::Routing& first = routings.front();
  const auto num_gates = static_cast<int64_t>(routings.size());
  std::vector<at::Tensor> weights;
  int64_t num_pairs = 0;
  for (gates::Routing& routing : routings) {
    gates::validate_shapes(routing, std::numeric_limits<int32_t>::max(), kOperation);
    require(routing.num_tokens == first.num_tokens, kOperation, "num_tokens", routing.num_tokens,
            "differs from num_tokens=" + to_text(first.num_tokens) + " of the first routing");
    routing.expert_idx = routing.expert_idx.contiguous();
    if (routing.top_k == 0) routing.token_offsets = routing.token_offsets.contiguous();
    weights.push_back(routing.weights);
    num_pairs += routing.num_assignments();
  }
  // Rows are merged on the host, from one copy of all integers.
  const at::Device home = first.expert_idx.device();
  std::vector<at::Tensor> integers;
  for (const gates::Routing& routing : routings) {
    integers.insert(integers.end(), {routing.expert_idx, routing.token_offsets});
  }
  integers = gates::to_host(integers);
  for (size_t g = 0; g < routings.size(); ++g) {
    routings[g].expert_idx = integers[2 * g];
    routings[g].token_offsets = integers[2 * g + 1];
  }
  // place[i]: where weight i of the concatenated gates goes in [A, G].
  at::Tensor place = at::empty({num_pairs}, at::kLong);
  int64_t* place_data = place.mutable_data_ptr<int64_t>();
  at::Tensor offsets = at::empty({first.num_tokens + 1}, at::kInt);
  int32_t* offsets_data = offsets.mutable_data_ptr<int32_t>();
  std::vector<int32_t> merged;
  merged.reserve(static_cast<size_t>(num_pairs));
  std::vector<int32_t> experts;
  offsets_data[0] = 0;
  for (int64_t t = 0; t < first.num_tokens; ++t) {
    experts.clear();
    for (const gates::Routing& routing : routings) {
      const Row row = row_of(routing, t);
      const int32_t* ids = int32_data(routing.expert_idx);
      experts.insert(experts.end(), ids + row.begin, ids + row.end);
    }
    std::sort(experts.begin(), experts.end());
    experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
    const auto base = static_cast<int64_t>(merged.size());
    int64_t gate_base = 0;
    for (int64_t g = 0; g < num_gates; ++g) {
      const gates::Routing& routing = routings[static_cast<size_t>(g)];
      const Row row = row_of(routing, t);
      const int32_t* ids = int32_data(routing.expert_idx);
      for (int64_t a = row.begin; a < row.end; ++a) {
        const auto at = std::lower_bound(experts.begin(), experts.end(), ids[a]);
        place_data[gate_base + a] = (base + (at - experts.begin())) * num_gates + g;
      }
      gate_base += routing.num_assignments();
    }
    merged.insert(merged.end(), experts.begin(), experts.end());
    offsets_data[t + 1] = static_cast<int32_t>(merged.size());
  }

  Selection selection;
  const auto total = static_cast<int64_t>(merged.size());
  selection.routing.num_tokens = first.num_tokens;
  selection.routing.token_offsets = offsets.to(home);
  selection.routing.expert_idx = at::empty({total}, at::kInt);
  std::copy(merged.begin(), merged.end(), selection.routing.expert_idx.mutable_data_ptr<int32_t>());
  selection.routing.expert_idx = selection.routing.expert_idx.to(home);
  const at::Tensor all = at::cat(weights);
  selection.weights = at::zeros({total * num_gates}, all.options())
                          .index_copy(0, place.to(home), all)
                          .view({total, num_gates});
  return selection;
}

}  // namespace perseid
