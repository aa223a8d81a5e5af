#include <barrier>
#include <memory>

#include "ranks.h"

namespace perseid::testing {
namespace {

std::unique_ptr<std::barrier<>> meeting;

}  // namespace

void run_ranks(const RankBody& body) {
  for (const int size : {1, 2, 3, 4}) {
    SCOPED_TRACE(::testing::Message() << size << " ranks");
    meeting = std::make_unique<std::barrier<>>(size);
    const std::string size_text = std::to_string(size);
    comm::run_local(size, [&](const comm::Group& group) {
      SCOPED_TRACE("rank " + std::to_string(group.rank()) + " of " + size_text);
      group.set_timeout_ms(20000);
      try {
        body(group);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "body threw: " << error.what();
        throw;
      }
    });
  }
}

void meet() { meeting->arrive_and_wait(); }

}  // namespace perseid::testing
