// The bars of Multi-Fashion-MNIST, small protocol, on the whole of Fashion-MNIST. Skipped where it
// is absent.
#include <gtest/gtest.h>

#include <optional>
#include <utility>

#include "examples/train_fashion/multi_train.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

// Accuracy hardly tells gates apart here; one expert for all gets .81 and .80.
TEST(MultiBars, SmallProtocol) {
  std::optional<FashionMnist> images = whole_fashion_mnist();
  if (!images) GTEST_SKIP() << "Fashion-MNIST is absent; get it with: examples/get_data.sh fashion";
  const MultiData data = make_multi(std::move(*images), Protocol::kSmall, 0);
  for (const GateKind gate : {GateKind::kTopK, GateKind::kComet}) {
    MultiOptions options = multi_defaults(Protocol::kSmall);
    options.train.gate = gate;
    const MultiResult result = train_multi(comm::self_group(), data, options);
    EXPECT_EQ(result.num_steps, 936);
    EXPECT_GE(result.test.tasks[0].accuracy, .81) << gate_name(gate);
    EXPECT_GE(result.test.tasks[1].accuracy, .80) << gate_name(gate);
    // Fewer rows than with all six experts.
    EXPECT_LE(result.test.rows_per_sample, 4.5) << gate_name(gate);
  }
}

}  // namespace
}  // namespace perseid::examples
