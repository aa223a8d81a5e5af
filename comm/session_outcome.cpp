#include "comm/session_outcome.h"

#include <cstdio>
#include <new>

#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int kExitInternal = 70;
constexpr int kExitOutOfMemory = 71;

}  // namespace

Outcome outcome_of(const std::exception_ptr& failure) {
  Outcome outcome;
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    outcome.status = error.exit_code();
    outcome.is_peer_lost = dynamic_cast<const PeerLost*>(&error) != nullptr;
    outcome.is_agreed = error.detail().culprit >= 0 && !outcome.is_peer_lost;
    outcome.text = error.what();
    ErrorDetail detail = error.detail();
    detail.rank = -1;
    if (outcome.is_agreed) {  // in which the ranks may just have disagreed
      detail.layer = -1;
      detail.step = -1;
    }
    outcome.common_text = InternalError(std::move(detail)).what();
    return outcome;
  } catch (const std::bad_alloc&) {
    outcome.status = kExitOutOfMemory;
    outcome.text = "out of memory";
  } catch (const std::exception& error) {
    outcome.status = kExitInternal;
    outcome.text = error.what();
  } catch (...) {
    outcome.status = kExitInternal;
    outcome.text = "unknown exception";
  }
  outcome.common_text = outcome.text;
  return outcome;
}

void print_error(const std::string& text, int rank, int size) {
  const std::string front = size > 1 ? "[rank " + to_text(rank) + "] " : "";
  std::fflush(stdout);
  std::fprintf(stderr, "%serror: %s\n", front.c_str(), text.c_str());
  std::fflush(stderr);
}

Outcome run_body(const std::function<void(const Group&)>& body, const Group& world) {
  try {
    body(world);
  } catch (...) {
    return outcome_of(std::current_exception());
  }
  return {};
}

}  // namespace perseid::comm
