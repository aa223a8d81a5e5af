#pragma once
#include <exception>
#include <functional>
#include <string>

#include "comm/group.h"

namespace perseid::comm {

/// How body ended on a rank.
struct Outcome {
  int status = 0;
  bool is_peer_lost = false;
  bool is_agreed = false;  // all ranks of a group threw it
  std::string text;
  std::string common_text;  // without the rank that speaks, to see that ranks failed alike
};

Outcome outcome_of(const std::exception_ptr& failure);
Outcome run_body(const std::function<void(const Group&)>& body, const Group& world);

/// "[rank 2] error: text" to stderr, without the rank if it is the only one.
void print_error(const std::string& text, int rank, int size);

}  // namespace perseid::comm
