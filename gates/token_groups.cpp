#include "gates/token_groups.h"

#include <ATen/ops/arange.h>

#include <utility>

#include "kernels/error.h"

namespace perseid::gates {

void require_group_size(const char* operation, int64_t group_size) {
  require(group_size >= 0, operation, "group_size", group_size,
          "is negative; choose 0 to make the tokens of each call one group");
}

std::vector<at::Tensor> token_groups(const GateInput& input, int64_t group_size,
                                     const char* operation) {
  std::vector<at::Tensor> groups;
  const int64_t T = input.tokens.size(0);
  if (T == 0) return groups;
  if (group_size > 0) {
    const std::string limit = "is not a multiple of group_size=" + to_text(group_size);
    require(input.first_token % group_size == 0, operation, "first_token", input.first_token,
            limit + ": a group lies on one rank; give each rank whole groups");
    require(T % group_size == 0, operation, "num_tokens", T,
            limit + ": a group lies on one rank; fill the last one with tokens of valid=false");
  }
  const int64_t size = group_size > 0 ? group_size : T;
  const at::Tensor places = at::arange(T, input.tokens.options().dtype(at::kLong));
  for (int64_t begin = 0; begin < T; begin += size) {
    at::Tensor group = places.narrow(0, begin, size);
    if (input.valid.has_value()) group = group.masked_select(input.valid->narrow(0, begin, size));
    if (group.numel() > 0) groups.push_back(std::move(group));
  }
  return groups;
}

}  // namespace perseid::gates
