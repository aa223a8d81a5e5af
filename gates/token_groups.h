#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "gates/gate.h"

// Internal: what the gates that look at many tokens at once have in common.

namespace perseid::gates {

/// Throws ConfigError unless group_size is 0 (one group: the tokens of a call) or more.
void require_group_size(const char* operation, int64_t group_size);

/// The groups of a call: `group_size` consecutive global token ids, the first group from id 0 on.
/// For each group with a valid token the places of its valid tokens here, [n] int64 ascending.
/// Throws ConfigError for a group that is not here as a whole, so for a first_token or a number of
/// tokens that is not a multiple of group_size.
std::vector<at::Tensor> token_groups(const GateInput& input, int64_t group_size,
                                     const char* operation);

}  // namespace perseid::gates
