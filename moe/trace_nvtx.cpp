#include <nvtx3/nvToolsExt.h>

#include "moe/trace.h"

namespace perseid {

void push_range(const char* name) { nvtxRangePushA(name); }
void pop_range() { nvtxRangePop(); }

}  // namespace perseid
