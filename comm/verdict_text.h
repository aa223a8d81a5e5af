#pragma once
#include <string>

#include "comm/verdict.h"

namespace perseid::comm {

/// The two sides of a difference, and the rule that it breaks.
struct Compared {
  std::string odd;  ///< "argument=value"
  std::string reference;
  std::string rule;
};
Compared compared(Code code, const Header& odd, const Header& reference);

void describe_difference(ErrorDetail& detail, int culprit, const Compared& texts);
void describe_refusal(ErrorDetail& detail, const Verdict& verdict, int size);

std::string hex(uint32_t value);  ///< "0xbeef"

}  // namespace perseid::comm
