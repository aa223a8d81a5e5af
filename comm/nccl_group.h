#pragma once
#include "comm/group.h"

namespace perseid::comm {

/// Ranks with a GPU each. Throws ConfigError in a build without NCCL.
Group nccl_group();

}  // namespace perseid::comm
