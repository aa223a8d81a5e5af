#pragma once
#include <functional>

#include "comm/group.h"

namespace perseid::comm {

/// Collective. Runs `check` on each rank; if it throws an Error anywhere, all ranks throw: the
/// ranks that refused throw their own error, the others one of the same type that names the
/// refusing rank. So an argument that only one rank gets wrong leaves no rank waiting. The group
/// stays usable.
void agree(const Group& group, CallSite site, const std::function<void()>& check);

}  // namespace perseid::comm
