#include "moe/trace.h"

namespace perseid {

void push_range(const char*) {}
void pop_range() {}

}  // namespace perseid
