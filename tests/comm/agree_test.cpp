//   AllPass        nothing is thrown
//   OneRefuses     each rank in turn: it throws its own error, the others one of the same type that
//                  names it and holds its text; the group stays usable
//   ForeignError   another exception becomes InternalError on the other ranks
#include "comm/agree.h"

#include <stdexcept>

#include "comm/collectives.h"
#include "ranks.h"

namespace perseid::testing {
namespace {

using comm::Group;

TEST(Agree, AllPass) {
  run_ranks([](const Group& group) {
    int num_checks = 0;
    comm::agree(group, {"layer"}, [&] { ++num_checks; });
    EXPECT_EQ(num_checks, 1);
  });
}

TEST(Agree, OneRefuses) {
  run_ranks([](const Group& group) {
    for (int bad = 0; bad < group.size(); ++bad) {
      const Caught caught = catch_error([&] {
        comm::agree(group, {"layer", 3, 41},
                    [&] { require(group.rank() != bad, "layer", "tokens", -4, "is negative"); });
      });
      EXPECT_EQ(caught.type, "ConfigError");
      expect_contains(caught.text, {"[layer] tokens=-4 is negative"});
      if (group.rank() != bad) {
        EXPECT_EQ(caught.detail.culprit, bad);
        expect_contains(caught.text, {"by rank " + std::to_string(bad), "step 41"});
      }
      comm::barrier(group);
    }
  });
}

TEST(Agree, ForeignError) {
  run_ranks([](const Group& group) {
    const Caught caught = catch_error([&] {
      comm::agree(group, {"layer"}, [&] {
        if (group.rank() == 0) throw std::runtime_error("foreign");
      });
    });
    EXPECT_EQ(caught.type, group.rank() == 0 ? "std::exception" : "another Error");
    expect_contains(caught.text, {"foreign"});
  });
}

}  // namespace
}  // namespace perseid::testing
